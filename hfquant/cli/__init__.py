"""The command line: `hfquant quantize | eval | inspect | backends | doctor | demo`."""

from .app import app, main

__all__ = ["app", "main"]
