"""Rounding by a Triton kernel, for weights that are quantized on a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..compiled import Parameters, Rounding, has_core_rounding
from ..grids import Grid
from ..kernel import forced_kernel
from .weight_only import DTYPES, KERNEL, why_not_here

_MOST = 1 << 31  # numbers: a row of a kernel is counted in 32 bits


def why_not(x: Tensor, grid: Grid, what: str) -> str | None:
    """Reason why `x` cannot be rounded to `grid`, or None."""
    if x.device.type != "cuda":
        return f"is for cuda, the numbers are on {x.device.type}"
    return why_not_numbers(x, grid) or why_not_here(torch.cuda.get_device_capability(x.device))


def why_not_numbers(x: Tensor, grid: Grid) -> str | None:
    """The same on a GPU that can."""
    if x.dtype not in DTYPES:
        return f"rounds float32, bfloat16 and float16, not {x.dtype}"
    if x.dim() > 1 and x.shape[-1] > 1 and x.stride(-1) != 1:
        return "rounds matrices whose rows have no gaps"
    if x.numel() >= _MOST:
        return f"rounds fewer than {_MOST} numbers at once, these are {x.numel()}"
    if not has_core_rounding(grid):
        return f"knows how the grids of the core round, {grid.name} has a way of its own"
    if forced_kernel() not in (None, KERNEL.name):
        return f"kernel {forced_kernel()!r} was asked for"
    return None


def kernels() -> Any:
    """The module with the kernel."""
    return import_module("hfquant.kernels.triton.rounding")


def codes(x: Tensor, to: Parameters) -> Tensor:
    """Codes [N, K] uint8 of `x` [N, K]."""
    found: Tensor = kernels().codes(x, to)
    return found


def values(x: Tensor, to: Parameters) -> Tensor:
    """Levels times scales [N, K] float32 nearest to `x` [N, K]."""
    found: Tensor = kernels().values(x, to)
    return found


def both(x: Tensor, to: Parameters) -> tuple[Tensor, Tensor]:
    """Codes and values of `x` [N, K]."""
    found: tuple[Tensor, Tensor] = kernels().both(x, to)
    return found


ROUNDING = Rounding(KERNEL.name, why_not, codes, values, both, real_zeros=True)
