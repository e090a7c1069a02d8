"""hfquant: pluggable quantization for Hugging Face models.

Importing it registers the method "hfquant" with transformers: `from_pretrained` takes an `HfQuantConfig`, and loads
checkpoints that were saved with one.
"""

from typing import TYPE_CHECKING, Any

from . import builtin as _builtin  # noqa: F401
from . import hf as _hf  # noqa: F401
from .api import coverage, explain, quantize
from .backend import backends
from .config import HfQuantConfig
from .errors import (
    BackendError,
    CalibrationError,
    FormatError,
    HfQuantError,
    SpecError,
    UnsupportedError,
    WeightError,
)
from .kernel import use_kernel
from .optimizing import optimize
from .tuning import finetune

if TYPE_CHECKING:
    from .kv_cache import KVCache

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CalibrationError",
    "FormatError",
    "HfQuantConfig",
    "HfQuantError",
    "KVCache",
    "SpecError",
    "UnsupportedError",
    "WeightError",
    "backends",
    "coverage",
    "explain",
    "finetune",
    "optimize",
    "quantize",
    "use_kernel",
]


def __getattr__(name: str) -> Any:
    """What is imported where it is first used."""
    if name == "KVCache":
        from .kv_cache import KVCache

        return KVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
