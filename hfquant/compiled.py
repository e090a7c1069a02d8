"""Compiled rounding: what may stand in for the torch code that rounds to a grid, because it gives the same bits.

`scales` and `rounders` define what rounding is; they ask here whether something faster takes the very same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import FloatGrid, Grid, IntGrid
from .tables import Table


@dataclass(frozen=True)
class Parameters:
    """What a matrix is rounded to: `scale` [R, C] float32, and `zero` like it or None, of blocks with sides `sides`."""

    grid: Grid
    scale: Tensor
    zero: Tensor | None
    sides: tuple[int, int]


@dataclass(frozen=True)
class Rounding:
    """One compiled way to round a matrix `x` [N, K].

    `why_not(x, grid, what)`: the reason why it cannot give `what`, "codes" or "values", or None. `codes(x, to)` gives
    uint8 [N, K] as `scales.encode` does, and `values(x, to)` float32 [N, K] as `scales.round_to` does, bit for bit.
    `both(x, to)`, where there is one, gives the two of them. `real_zeros`: whether zero points may be any numbers,
    as those of a merged adapter are, and need not be on the grid.
    """

    name: str
    why_not: Callable[[Tensor, Grid, str], str | None]
    codes: Callable[[Tensor, Parameters], Tensor]
    values: Callable[[Tensor, Parameters], Tensor]
    both: Callable[[Tensor, Parameters], tuple[Tensor, Tensor]] | None = None
    real_zeros: bool = False


ROUNDINGS: Table[Rounding] = Table("rounding")


def codes(x: Tensor, to: Parameters) -> Tensor | None:
    """Codes [N, K] uint8 of `x` [N, K], or None if there is only torch to find them."""
    found = _best(x, to.grid, "codes", to.zero)
    return None if found is None else found.codes(x, to)


def values_in_blocks(x: Tensor, to: Parameters) -> Tensor | None:
    """What a matrix `x` [N, K] is rounded to, float32 [N, K], or None if there is only torch to find it."""
    found = _best(x, to.grid, "values", to.zero)
    return None if found is None or not x.numel() else found.values(x, to)


def values(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor | None:
    """What `x` is rounded to, float32 [same shape], or None; `scale` and `zero` broadcast against it.

    Takes one scale for all of `x`, and for a matrix one for each row, column or number.
    """
    found = _best(x, grid, "values", zero)
    if found is None or not x.numel() or (zero is not None and zero.shape != scale.shape):
        return None
    if scale.numel() == 1 and x.is_contiguous():
        to = Parameters(grid, scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1), (1, x.numel()))
        return found.values(x.reshape(1, -1), to).reshape((1,) * (scale.dim() - x.dim()) + x.shape)
    if x.dim() != 2 or scale.dim() != 2:
        return None
    sides = tuple(zip(x.shape, scale.shape, strict=True))
    if any(count not in (1, length) for length, count in sides):
        return None
    height, width = (length if count == 1 else 1 for length, count in sides)
    return found.values(x, Parameters(grid, scale, zero, (height, width)))


def both(like: Tensor, grid: Grid, zero: Tensor | None) -> Callable[[Tensor, Parameters], tuple[Tensor, Tensor]] | None:
    """What gives codes and values at once, of matrices of the dtype and on the device of `like`, or None.

    `zero`: all zero points that there will be.
    """
    found = _best(like, grid, "codes", zero)
    return None if found is None else found.both


def has_core_rounding(grid: Grid) -> bool:
    """Whether a grid rounds as those of the core do, which is what compiled code knows."""
    return type(grid).encode in _ENCODES and type(grid).nearest in _NEARESTS


_ENCODES = (Grid.encode, IntGrid.encode, FloatGrid.encode)
_NEARESTS = (Grid.nearest, IntGrid.nearest, FloatGrid.nearest)


def _best(x: Tensor, grid: Grid, what: str, zero: Tensor | None) -> Rounding | None:
    if _is_watched(x):
        return None
    able = (ROUNDINGS.get(name) for name in ROUNDINGS.names())
    found = next((rounding for rounding in able if rounding.why_not(x, grid, what) is None), None)
    return found if found is None or found.real_zeros or _is_whole(zero) else None


def _is_whole(zero: Tensor | None) -> bool:
    """Whether zero points are on the grid. On a GPU this waits for it."""
    return zero is None or torch.equal(zero, zero.round())


def _is_watched(x: Tensor) -> bool:
    """Whether somebody follows what is done to `x`: gradients, a compiler, a tracer, a mode, a tensor subclass."""
    return (
        type(x) not in (Tensor, torch.nn.Parameter)
        or (x.requires_grad and torch.is_grad_enabled())
        or are_operators_watched(x)
    )


def are_operators_watched(x: Tensor) -> bool:
    """Whether a compiler, a tracer, a function transform or a mode follows what is done to `x`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or torch._C._len_torch_dispatch_stack() > 0
    )
