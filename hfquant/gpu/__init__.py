"""The Triton kernels for GPUs: what they take, and how they are run.

Triton and the kernels are imported when the first layer asks for them. AMD's GPUs are "cuda" devices to torch, too.
"""

from .inputs import INT8, LEVELS
from .rounding import ROUNDING
from .weight_only import KERNEL as WEIGHT_ONLY
from .weight_only import missing

KERNELS = (WEIGHT_ONLY, INT8, LEVELS)

__all__ = ["INT8", "KERNELS", "LEVELS", "ROUNDING", "WEIGHT_ONLY", "missing"]
