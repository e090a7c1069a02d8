"""Errors of the library: each message says what was asked, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class HfQuantError(Exception):
    """Base class of every error raised on purpose by hfquant."""


class SpecError(HfQuantError, ValueError):
    """A request that cannot be carried out as written: unknown name, bad option, impossible combination."""


class UnsupportedError(HfQuantError):
    """Nothing that is installed can do what was asked; `reasons` holds one line per candidate that declined."""

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n  - ".join([message, *self.reasons]))


class FormatError(HfQuantError):
    """A checkpoint that is damaged, incomplete or of another version; names the file and the tensor."""


class BackendError(HfQuantError):
    """A plugin that is missing, broken or in conflict; names its distribution and entry point."""


class CalibrationError(HfQuantError, ValueError):
    """Calibration that cannot work: no data, bad data, or a model that overflows on it; names the layer."""


class WeightError(HfQuantError, ValueError):
    """A weight that cannot be quantized (NaN or infinite values); names the layer."""
