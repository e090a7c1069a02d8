"""Rounding one column after the other, bit for bit as `hfquant.scales` rounds a matrix, with few small operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hfquant import compiled
from hfquant.grids import Grid, IntGrid
from hfquant.ranges import Params

Both = Callable[[Tensor, compiled.Parameters], tuple[Tensor, Tensor]]


class RoundColumn(Protocol):
    """Rounds a column [N] float32 of a block column; returns (codes [N] of any dtype, real values [N] float32)."""

    def __call__(self, x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """`block`: which block of the row the column belongs to."""


def column_rounder(params: Params, shape: tuple[int, int]) -> RoundColumn:
    """The rounding of the columns of a matrix of `shape` [N, K] by its grid parameters [R, C]."""
    scale = _by_block(params.scale, params, shape)
    zero = None if params.zero is None else _by_block(params.zero, params, shape)
    if (both := compiled.both(scale, params.grid, zero)) is not None:
        return _compiled(both, scale, zero, params.grid)
    if zero is not None:
        return _asymmetric(scale, zero, params.grid.size - 1)
    if isinstance(params.grid, IntGrid):
        return _integer(scale, params.grid)
    return _lookup(scale, params.grid)


def _by_block(values: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
    """Parameters [R, C] as [C, N], or [C, 1] where all rows share them."""
    rows = params.spec.blocks.sides(shape)[0]
    spread = values.repeat_interleave(rows, dim=0)[: shape[0]] if 1 < rows < shape[0] else values
    return spread.T.contiguous()


def _compiled(both: Both, scale: Tensor, zero: Tensor | None, grid: Grid) -> RoundColumn:
    """In one operation, where there is one: columns become rows, with a scale for all or for each number."""

    def round_column(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        shared = None if zero is None else zero[block : block + 1]
        to = compiled.Parameters(grid, scale[block : block + 1], shared, (1, x.numel() // scale.shape[1]))
        codes, values = both(x[None], to)
        return codes[0], values[0]

    return round_column


def _asymmetric(scale: Tensor, zero: Tensor, top: int) -> RoundColumn:
    whole = zero.round()
    rest = zero - whole  # of zero points that are real numbers

    def round_column(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        codes = (x / scale[block]).add_(rest[block]).round_().add_(whole[block]).clamp_(0, top)
        return codes, (codes - zero[block]).mul_(scale[block])

    return round_column


def _integer(scale: Tensor, grid: IntGrid) -> RoundColumn:
    low, high = float(grid.levels()[0]), grid.top

    def round_column(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        numbers = (x / scale[block]).round_().clamp_(low, high)
        return numbers - low, numbers * scale[block]

    return round_column


def _lookup(scale: Tensor, grid: Grid) -> RoundColumn:
    def round_column(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        codes = grid.encode(x / scale[block])
        return codes, grid.decode(codes).mul_(scale[block])

    return round_column
