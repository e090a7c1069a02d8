"""Weights to the nearest level of a grid: integers and floating point by arithmetic, other levels by a search.

The same operations in the same order as in `hfquant.grids`, each rounded once: codes and values are those of torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.compiled import Parameters
from hfquant.grids import FloatGrid, Grid, IntGrid, thresholds

from . import launch

NUMBERS = 2048  # of a tile
NARROWEST = 32  # columns of a tile that has one scale for each of its rows


@triton.jit
def limited(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`x` float32 between two bounds. NaN stays, and so does the sign of 0."""
    x = tl.where(x < LOW, LOW, x)
    return tl.where(x > HIGH, HIGH, x)


@triton.jit
def to_integer(x):
    """The nearest integer of `x` float32, of a magnitude below 2^22, ties to even, with the sign of `x`."""
    whole = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no room for fractions
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def to_any_integer(x):
    """The same for any `x` float32, but 0 has no sign; NaN and what is infinite stay."""
    magnitude = tl.abs(x)
    whole = (magnitude + 8388608.0) - 8388608.0  # 2^23: from there on there are no fractions
    return tl.where(magnitude < 8388608.0, tl.where(x < 0, -whole, whole), x)


@triton.jit
def to_float(x, EXPONENT: tl.constexpr, M: tl.constexpr):
    """The nearest number with M mantissa bits of `x` float32, which the largest one bounds; NaN stays.

    EXPONENT: that of the smallest normal number, as float32 stores it; smaller ones have the same step.
    """
    bits = x.to(tl.int32, bitcast=True)
    smallest: tl.constexpr = EXPONENT << 23
    if M == 0:
        # In the middle of two powers of two, the one with the even code.
        magnitude = bits & 0x7FFFFFFF
        odd = ((magnitude >> 23) + (1 + EXPONENT)) & 1
        power = tl.maximum((magnitude + odd + 0x3FFFFF) & 0x7F800000, smallest)
        power = tl.where(magnitude <= smallest - (1 << 23), 0, power)
        level = (power | (bits & -0x80000000)).to(tl.float32, bitcast=True) + (x - x)
    else:
        # A number of 1.5 * 2^23 steps leaves no room for less than one.
        binade = tl.maximum(bits & 0x7F800000, smallest)
        shifter = (binade + (((23 - M) << 23) + 0x400000)).to(tl.float32, bitcast=True)
        level = (x + shifter) - shifter
    return level


@triton.jit
def code_of_float(level, EXPONENT: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
                  MOST: tl.constexpr):  # fmt: skip
    """Codes int32 of levels that `to_float` gives: their bits, counted from that of 0. STEPS: of a subnormal in 1."""
    magnitude = level.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = (magnitude >> (23 - M)) - ((EXPONENT - 1) << M)
    whole = magnitude.to(tl.float32, bitcast=True) * STEPS + 8388608.0  # 2^23: an integer in the last bits
    step = tl.where(magnitude < (EXPONENT << 23), whole.to(tl.int32, bitcast=True) & 0xFF, normal)
    step = tl.minimum(step, MOST)  # NaN has more
    return ZERO + tl.where(level < 0, -step, step)


@triton.jit
def search(x, thresholds, LAST: tl.constexpr, BITS: tl.constexpr):
    """How many of LAST sorted `thresholds` `x` is above; of all for NaN."""
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS):
        half = 1 << (BITS - 1 - bit)
        at = code + (half - 1)
        threshold = tl.load(thresholds + tl.minimum(at, LAST - 1))
        code = tl.where((at >= LAST) | (x <= threshold), code, code + half)
    return code


@triton.jit
def round_kernel(
    x, scale, zero, thresholds, levels, codes, values, N, K, x_stride, height, width, groups, tiles,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, LAST: tl.constexpr, INSIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes [N, K] uint8 and values [N, K] float32, or one of them, of a tile of `x` [N, K]; `tiles` lie side by side.

    `scale` and `zero` (or None) are float32 of blocks of `height` rows and `width` columns, `groups` of them in a row.
    INSIDE: a row of a tile has more than one. KIND: "integer" from LOW to HIGH; "float", see `to_float`; "table", the
    `levels` between LAST `thresholds`.
    """
    program = tl.program_id(0)
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)
    first = (program % tiles) * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    mask = (row < N)[:, None] & (column < K)
    number = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    group = tl.where(column < K, column, 0) // width if INSIDE else first // width
    block = (tl.where(row < N, row, 0) // height).to(tl.int64)[:, None] * groups + group
    factor = tl.load(scale + block)
    x = tl.div_rn(number, tl.broadcast_to(factor, (ROWS, COLUMNS)))
    if KIND == "integer":
        if zero is not None:
            offset = tl.load(zero + block)
            whole = to_any_integer(offset)
            place = limited(to_any_integer(x + (offset - whole)) + whole, 0.0, HIGH - LOW)
            level = place - offset
        else:
            level = limited(to_integer(limited(x, -1024.0, 1024.0)), LOW, HIGH)
            place = level - LOW
        code = tl.where(place == place, (place + 8388608.0).to(tl.int32, bitcast=True), 0)
    elif KIND == "float":
        level = to_float(limited(x, LOW, HIGH), EXPONENT, M)
        code = code_of_float(level, EXPONENT, M, STEPS, ZERO, LAST - ZERO)
    else:
        code = search(x, thresholds, LAST, BITS)
        level = tl.load(levels + code) if values is not None else x
    to = row.to(tl.int64)[:, None] * K + column
    if codes is not None:
        tl.store(codes + to, code.to(tl.uint8), mask=mask)
    if values is not None:
        tl.store(values + to, level * factor, mask=mask)


@lru_cache(maxsize=256)
def described(grid: Grid, device: torch.device) -> dict[str, Any]:
    """The arguments of the kernel that say what is rounded to."""
    levels = grid.levels()
    how = {
        "thresholds": None, "levels": None, "KIND": "integer", "LOW": float(levels[0]), "HIGH": float(levels[-1]),
        "ZERO": grid.zero_code, "BITS": grid.bits, "EXPONENT": 0, "M": 0, "STEPS": 1.0, "LAST": grid.size - 1,
    }  # fmt: skip
    if isinstance(grid, FloatGrid):
        steps = 2.0 ** (grid.exponent_bias + grid.m - 1)
        return how | {"KIND": "float", "EXPONENT": 128 - grid.exponent_bias, "M": grid.m, "STEPS": steps}
    if isinstance(grid, IntGrid):
        return how
    return how | {"KIND": "table", "thresholds": thresholds(grid).to(device), "levels": levels.to(device)}


def codes(x: Tensor, to: Parameters) -> Tensor:
    """Codes [N, K] uint8 of `x` [N, K]."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _round(x, to, out, None)
    return out


def values(x: Tensor, to: Parameters) -> Tensor:
    """Levels times scales [N, K] float32 nearest to `x` [N, K]."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _round(x, to, None, out)
    return out


def both(x: Tensor, to: Parameters) -> tuple[Tensor, Tensor]:
    """Codes and values of `x` [N, K]."""
    found = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    nearest = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _round(x, to, found, nearest)
    return found, nearest


def _round(x: Tensor, to: Parameters, codes: Tensor | None, values: Tensor | None) -> None:
    (n, k), (height, width) = x.shape, to.sides
    groups = triton.cdiv(k, width)
    needed = triton.cdiv(n, height) * groups
    scale, zero = to.scale.contiguous(), None if to.zero is None else to.zero.contiguous()
    for given in (scale,) if zero is None else (scale, zero):  # the kernel reads what it is told to
        if given.dtype != torch.float32 or given.numel() != needed:
            raise RuntimeError(f"{needed} blocks need as many float32 parameters, found {given.numel()} {given.dtype}")
    columns, inside = tile_columns(k, width)
    rows = min(NUMBERS // columns, triton.next_power_of_2(n))
    tiles = triton.cdiv(k, columns)
    if n and k:
        with launch.on(x.device):
            round_kernel[(triton.cdiv(n, rows) * tiles,)](
                x, scale, zero, codes=codes, values=values, N=n, K=k, x_stride=x.stride(0), height=height,
                width=width, groups=groups, tiles=tiles, **described(to.grid, x.device), INSIDE=inside, ROWS=rows,
                COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def tile_columns(k: int, width: int) -> tuple[int, bool]:
    """Columns of a tile, and whether there may be more than one scale for a row of it."""
    most = min(triton.next_power_of_2(max(k, 1)), NUMBERS // 2)
    if width >= k:
        return most, False
    fitting = min(most, width & -width)
    return (fitting, False) if fitting >= NARROWEST else (most, True)
