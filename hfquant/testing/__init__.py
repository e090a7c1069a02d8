"""What authors of backends and hfquant's own tests share: tiny models, a local Hub, conformance checks."""

from .conformance import conformance
from .report import Check, ConformanceError, Report

__all__ = ["Check", "ConformanceError", "Report", "conformance"]
