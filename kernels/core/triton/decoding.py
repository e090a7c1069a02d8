"""How the codes of a grid become numbers of a dtype: the fastest way, and tables where lookup is that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hfquant.grids import FloatGrid, Grid, IntGrid
from hfquant.grids import grid as named

CODES = 256  # entries of a lookup table: what a byte can hold, so that damaged codes stay inside


@dataclass(frozen=True)
class Decoding:
    """How the codes of a grid become numbers of a dtype: constants of the kernels in `decode`."""

    kind: str
    zero: int = 0
    mantissa: int = 0
    factor: float = 1.0
    level: float = 1.0


@lru_cache(maxsize=1024)
def decoding(name: str, dtype: torch.dtype) -> Decoding:
    """The fastest way for a grid. Levels are divided by `level`, a power of two, where float16 needs that."""
    grid = named(name)
    if isinstance(grid, IntGrid):
        return Decoding("integer", zero=grid.zero_code)
    if hasattr(grid, "fit"):
        return Decoding("table")
    level = 2.0 ** shift(grid, dtype)
    if isinstance(grid, FloatGrid):
        factor = 127 - grid.exponent_bias - shift(grid, dtype)
        if -126 <= factor <= 127:
            return Decoding("float", grid.zero_code, grid.m, 2.0**factor, level)
    return Decoding("table", level=level)


def shift(grid: Grid, dtype: torch.dtype) -> int:
    """0, or where float16 does not hold the levels the power of two that brings the largest just below its end."""
    if dtype != torch.float16 or keeps(grid.levels()):
        return 0
    return int(torch.frexp(grid.levels().abs().max()).exponent) - 15


def keeps(levels: Tensor) -> bool:
    """Whether float16 holds numbers as precisely as it can."""
    limits = torch.finfo(torch.float16)
    normal = (levels.abs() >= limits.smallest_normal) & (levels.abs() <= limits.max)
    return bool((normal | (levels.half().float() == levels)).all())


def fits(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether there is a power of two that makes the levels of a grid fit into a dtype."""
    if dtype != torch.float16 or isinstance(grid, IntGrid) or hasattr(grid, "fit"):
        return True
    return keeps(grid.levels() / 2.0 ** shift(grid, dtype))


@lru_cache(maxsize=1024)
def table_of(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Level of every byte [256]; codes that the grid does not have stand for 0."""
    return padded(named(name).levels() / decoding(name, dtype).level, dtype).to(device)


@lru_cache(maxsize=1024)
def bytes_of(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of a grid of 4 bits as `bytes_apart` gives them."""
    return bytes_apart(table_of(name, dtype, device))


def bytes_apart(table: Tensor) -> Tensor:
    """The first 16 entries of a table in 16 bit as `decode.levels_of_words` reads them: [8] int32."""
    return table[:16].view(torch.uint8).reshape(16, 2).T.contiguous().view(torch.int32).flatten()


def padded(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """A table with as many entries as a byte has values."""
    table = torch.zeros(CODES, dtype=dtype, device=levels.device)
    table[: levels.numel()] = levels.to(dtype)
    return table


def permutes(architecture: str) -> bool:
    """Whether a GPU looks bytes up in registers by the instruction that `decode.permuted` is."""
    return architecture.startswith("sm_")
