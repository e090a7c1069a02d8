"""Rounding by the library of CPU kernels, on the instruction set in use and torch's threads."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from ..compiled import Parameters, Rounding, has_core_rounding
from ..grids import FloatGrid, Grid, IntGrid, thresholds
from ..kernel import forced_kernel
from .native import NAME, Library, library
from .types import TYPES


class Described(ctypes.Structure):
    """`hfq_rounding` of hfquant.h."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "k", "row_stride", "group", "scale_height")),
        *(("scale", c_void_p), ("zero", c_void_p)),
        *(("count", c_int32), ("levels", c_void_p), ("thresholds", c_void_p), ("keeps_nan", c_int32)),
    )


def why_not(x: Tensor, grid: Grid, what: str) -> str | None:
    """Reason why `x` cannot be rounded to `grid`, or None; `what`: "codes" or "values"."""
    if x.device.type != "cpu":
        return f"is for cpu, the numbers are on {x.device.type}"
    if x.dtype not in TYPES:
        return f"rounds float32, bfloat16 and float16, not {x.dtype}"
    if x.dim() > 1 and x.shape[-1] > 1 and x.stride(-1) != 1:
        return "rounds matrices whose rows have no gaps"
    if not has_core_rounding(grid):
        return f"knows how the grids of the core round, {grid.name} has a way of its own"
    if what == "values" and isinstance(grid, FloatGrid) and grid.size > _SMALL:
        return "searches for the levels of a floating-point grid, which torch finds by arithmetic"
    if forced_kernel() not in (None, NAME):
        return f"kernel {forced_kernel()!r} was asked for"
    found = library()
    return found if isinstance(found, str) else None


_SMALL = 16  # levels: a search among so few is as fast as arithmetic


def codes(x: Tensor, to: Parameters) -> Tensor:
    """Codes [N, K] uint8 of `x` [N, K]."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return _round("hfq_encode", x, to, out)


def values(x: Tensor, to: Parameters) -> Tensor:
    """Levels times scales [N, K] float32 nearest to `x` [N, K]."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return _round("hfq_round", x, to, out)


def _round(name: str, x: Tensor, to: Parameters, out: Tensor) -> Tensor:
    found = library()
    assert isinstance(found, Library)
    height, width = to.sides
    scale, zero = to.scale.contiguous(), None if to.zero is None else to.zero.contiguous()
    needed = -(-x.shape[0] // height) * -(-x.shape[1] // width)
    for given in (scale,) if zero is None else (scale, zero):  # the library reads what it is told to
        if given.dtype != torch.float32 or given.numel() != needed:
            raise RuntimeError(f"{needed} blocks need as many float32 parameters, found {given.numel()} {given.dtype}")
    levels, limits = _tables(to.grid)
    described = Described(
        *(*x.shape, x.stride(0), width, height, scale.data_ptr(), None if zero is None else zero.data_ptr()),
        *(levels.numel(), levels.data_ptr(), None if limits is None else limits.data_ptr()),
        type(to.grid).nearest is not Grid.nearest,
    )
    found.call(name, ctypes.addressof(described), x.data_ptr(), out.data_ptr(), type=TYPES[x.dtype])
    return out


@lru_cache(maxsize=256)
def _tables(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Levels, and thresholds between them unless arithmetic finds the nearest one."""
    return grid.levels().cpu(), None if isinstance(grid, IntGrid) else thresholds(grid).cpu()


ROUNDING = Rounding(NAME, why_not, codes, values)
