"""FP8 for hfquant: 8-bit floating-point weights and activations in torch's native float8 dtypes."""

from hfquant.backend import Backend

from .layout import Float8
from .preset import fp8

backend = Backend("fp8", layouts=(Float8(),), presets={"fp8": fp8})

__all__ = ["Float8", "backend", "fp8"]
