"""The compiled CPU kernels: weights of any grid of 2 to 8 bits, read as they are stored, times inputs of any kind."""

from ..kernel import Kernel
from .dequantize import columns
from .gradient import input_grad
from .jobs import join, run_jobs
from .linear import bind, run, why_not
from .native import NAME, Library, library
from .rounding import ROUNDING
from .steps import halves

KERNEL = Kernel(
    NAME,
    "*",
    "cpu",
    run,
    why_not,
    priority=10,
    bind=bind,
    columns=columns,
    run_jobs=run_jobs,
    join=join,
    halves=halves,
    input_grad=input_grad,
)

__all__ = ["KERNEL", "ROUNDING", "Library", "bind", "columns", "input_grad", "library", "run", "why_not"]
