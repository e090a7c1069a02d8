"""Quantizing the input of a layer: codes for matrix instructions and float32 scales, the numbers of the reference.

A row whose values have no range, because one of them is NaN or infinite, gets the scale NaN: codes cannot say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.grids import FloatGrid, Grid, IntGrid

from .rounding import to_float

ALIGNMENT = 16  # bytes of the widest load: rows of codes start at multiples of it


@triton.jit
def _magnitude(x, at, mask, keep, column, KEEP: tl.constexpr):
    """Float32 values, 0 where a column takes part in floating point, and the bits of their magnitudes.

    Bits of magnitudes are ordered like them, infinity and then NaN above all: integers never lose a NaN.
    """
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        kept = tl.load(keep + column, mask=mask, other=1)
        value = tl.where(kept == 0, value, 0.0)
    return value, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(peak, TOP: tl.constexpr):
    """Scales that map magnitudes, given as bits, to the largest level; 1 for 0 and NaN for what is not finite."""
    scale = tl.div_rn(peak.to(tl.float32, bitcast=True), tl.full(peak.shape, TOP, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.minimum(tl.maximum(scale, 1.1754943508222875e-38), 3.4028234663852886e38)
    return tl.where(peak >= 0x7F800000, float("nan"), scale)


@triton.jit
def _rounded(value, LOW: tl.constexpr, TOP: tl.constexpr, E: tl.constexpr, M: tl.constexpr):
    """The nearest levels, ties to even: of integers (E = 0), or with E exponent and M mantissa bits."""
    value = tl.minimum(tl.maximum(value, LOW), TOP)
    if E == 0:
        level = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no room for fractions
    else:
        level = to_float(value, 129 - (1 << (E - 1)), M)
    return level


@triton.jit
def _as_stored(level, STORE: tl.constexpr, E: tl.constexpr, M: tl.constexpr):
    """Levels as products read them: "int8", "bfloat16", or "float8" as patterns of sign, exponent and mantissa."""
    if STORE == "int8":
        stored = (level + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif STORE == "bfloat16":
        stored = level.to(tl.bfloat16)
    else:
        smallest: tl.constexpr = (129 - (1 << (E - 1))) << 23
        steps: tl.constexpr = 1 << ((1 << (E - 1)) + M - 2)  # of the smallest subnormal in 1
        magnitude = level.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        normal = (magnitude >> (23 - M)) - ((128 - (1 << (E - 1))) << M)
        whole = magnitude.to(tl.float32, bitcast=True) * steps + 8388608.0
        pattern = tl.where(magnitude < smallest, whole.to(tl.int32, bitcast=True) & 0xFF, normal)
        stored = (pattern | tl.where(level < 0, 0x80, 0)).to(tl.uint8)
    return stored


@triton.jit
def quantize_kernel(
    x, keep, given, codes, scales, sums, rows, columns, width, groups, x_stride, codes_stride, half,
    MODE: tl.constexpr, STORE: tl.constexpr, LOW: tl.constexpr, TOP: tl.constexpr, E: tl.constexpr, M: tl.constexpr,
    SHIFT: tl.constexpr, KEEP: tl.constexpr, PLANES: tl.constexpr, SUMS: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of some rows and one group of columns.

    MODE says where the scale comes from: "own" the values themselves, "peak" the bits of the largest magnitude in
    `given`, "static" the scale in `given`. SHIFT is a power of two that levels are multiplied by, and scales divided.
    PLANES: even columns lie before odd ones, which begin at `half`. ONCE: the group fits into registers.
    """
    program = tl.program_id(0)
    row = (program // groups) * ROWS + tl.arange(0, ROWS)
    group = program % groups
    first = group * width
    behind = tl.minimum(first + width, columns)
    inside = row < rows
    from_row = row.to(tl.int64)[:, None] * x_stride
    to_row = row.to(tl.int64)[:, None] * codes_stride
    offset = tl.arange(0, COLUMNS)
    if ONCE:
        column = (first + offset)[None, :]
        value, bits = _magnitude(x, from_row + column, inside[:, None] & (column < behind), keep, column, KEEP)
        peak = tl.max(bits, 1)
    else:
        peak = tl.zeros((ROWS,), tl.int32)
        for start in range(first, behind, COLUMNS):
            column = (start + offset)[None, :]
            value, bits = _magnitude(x, from_row + column, inside[:, None] & (column < behind), keep, column, KEEP)
            peak = tl.maximum(peak, tl.max(bits, 1))
    if MODE == "own":
        scale = _scale_of(peak, TOP)
    elif MODE == "peak":
        scale = _scale_of(tl.zeros((ROWS,), tl.int32) + tl.load(given), TOP)
    else:
        scale = tl.where(peak >= 0x7F800000, float("nan"), tl.load(given))
    total = tl.zeros((ROWS,), tl.int32)
    for start in range(first, behind, COLUMNS):
        column = (start + offset)[None, :]
        mask = inside[:, None] & (column < behind)
        if not ONCE:
            value, bits = _magnitude(x, from_row + column, mask, keep, column, KEEP)
        level = _rounded(tl.div_rn(value, scale[:, None] + tl.zeros_like(value)) * SHIFT, LOW, TOP * SHIFT, E, M)
        stored = _as_stored(level, STORE, E, M)
        if SUMS:
            total += tl.sum(tl.where(mask, stored.to(tl.int32), 0), 1)
        place = (column % 2) * half + column // 2 if PLANES else column
        tl.store(codes + to_row + place, stored, mask=mask)
    tl.store(scales + row.to(tl.int64) * groups + group, scale * (1.0 / SHIFT), mask=inside)
    if SUMS:
        tl.store(sums + row, total, mask=inside)


@triton.jit
def peak_kernel(x, peak, rows, columns, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits of the largest magnitude of all, into `peak`, which holds 0 before."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.zeros((ROWS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = (row < rows)[:, None] & (column < columns)
        bits = _magnitude(x, row.to(tl.int64)[:, None] * x_stride + column, mask, x, column, False)[1]
        top = tl.maximum(top, tl.max(bits, 1))
    tl.atomic_max(peak, tl.max(top, 0))


@triton.jit
def mark_kernel(x, keep, rows, columns, split, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 into `keep` for columns that hold a magnitude of at least `split` and have no mark yet."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows) & (column < columns)[None, :]
    value = tl.load(x + row.to(tl.int64) * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    large = tl.max((tl.abs(value) >= split).to(tl.int32), 0)  # NaN is not
    unmarked = tl.load(keep + column, mask=column < columns, other=1) == 0
    tl.store(keep + column, tl.full((COLUMNS,), 1, tl.uint8), mask=unmarked & (large != 0))


@triton.jit
def list_kernel(keep, index, count, columns, COLUMNS: tl.constexpr):
    """The columns marked 1, in ascending order, and how many they are."""
    found = 0
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        marked = (tl.load(keep + column, mask=column < columns, other=0) == 1).to(tl.int32)
        tl.store(index + found + tl.cumsum(marked, 0) - 1, column, mask=marked != 0)
        found += tl.sum(marked, 0)
    tl.store(count, found)


@dataclass(frozen=True)
class Outlying:
    """Columns that take part in floating point.

    `keep` [K] uint8: 0 for a column that is quantized, 2 for one with 16-bit weights, 1 for one that holds a large
    magnitude; `index` [K] int32 begins with the `count` [1] int32 columns of the last kind (None without a split).
    """

    keep: Tensor
    index: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """An input [M, K] as `codes` [M, Kp] and `scale` [M, groups] float32; `sums` [M] int32 of the codes of a row.

    What `codes` are worth times `scale` is the quantized input. Kp is K, aligned; with planes, even columns lie before
    odd ones, which begin at Kp / 2.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor | None = None


def outlying(x: Tensor, split: float | None, stored: Tensor | None) -> Outlying | None:
    """Which columns of `x` [M, K] stay in floating point, decided on the GPU; None if no column can.

    `stored` are those with 16-bit weights.
    """
    if split is None and stored is None:
        return None
    rows, columns = x.shape
    keep = torch.zeros(columns, dtype=torch.uint8, device=x.device)
    if stored is not None:
        keep.index_fill_(0, stored.long(), 2)
    if split is None:
        return Outlying(keep)
    index = torch.empty(columns, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    high = min(64, triton.next_power_of_2(rows))
    mark_kernel[(triton.cdiv(rows, high), triton.cdiv(columns, 64))](
        x, keep, rows, columns, split, x.stride(0), ROWS=high, COLUMNS=64, enable_fp_fusion=False
    )
    list_kernel[(1,)](keep, index, count, columns, COLUMNS=1024, num_warps=8, enable_fp_fusion=False)
    return Outlying(keep, index, count)


@lru_cache(maxsize=256)
def described(grid: Grid) -> dict[str, Any]:
    """The arguments of the kernel that say what is quantized to."""
    if isinstance(grid, FloatGrid):
        shift = 2.0 ** (grid.exponent_bias - (2 ** (grid.e - 1) - 1))
        return {"LOW": float(grid.levels()[0]) * shift, "TOP": grid.top, "E": grid.e, "M": grid.m, "SHIFT": shift}
    assert isinstance(grid, IntGrid)
    return {"LOW": float(grid.levels()[0]), "TOP": grid.top, "E": 0, "M": 0, "SHIFT": 1.0}


def quantize(
    x: Tensor,
    grid: Grid,
    store: str,
    width: int = -1,
    given: Tensor | None = None,
    whole: bool = False,
    keep: Tensor | None = None,
    planes: bool = False,
    sums: bool = False,
) -> Quantized:
    """Quantize `x` [M, K] to the levels of a signed integer or a float grid.

    `store`: "int8"; "float8", patterns as uint8; or "bfloat16". `width`: columns that share a scale, -1 for all.
    `given` [1] float32 is a static scale for all, `whole` one range for all that `x` has at this time; `keep`, `planes`
    and `sums`: see `Outlying` and `Quantized`. The powers of two of an unusual exponent bias go into the scale.
    """
    rows, columns = x.shape
    width = columns if width == -1 else min(width, columns)
    groups = triton.cdiv(columns, width)
    padded = triton.cdiv(columns, 2 * ALIGNMENT) * 2 * ALIGNMENT
    dtype = {"int8": torch.int8, "float8": torch.uint8, "bfloat16": torch.bfloat16}[store]
    codes = torch.empty(rows, padded, dtype=dtype, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    total = torch.empty(rows, dtype=torch.int32, device=x.device) if sums else None
    block = min(triton.next_power_of_2(width), 4096)
    high = max(1, min(2048 // block, 16, triton.next_power_of_2(rows)))
    mode = "own"
    if given is not None:
        mode = "static"
    elif whole:
        mode, given = "peak", torch.zeros(1, dtype=torch.int32, device=x.device)
        peak_kernel[(triton.cdiv(rows, high),)](
            x, given, rows, columns, x.stride(0), ROWS=high, COLUMNS=block, enable_fp_fusion=False
        )
    quantize_kernel[(triton.cdiv(rows, high) * groups,)](
        x, keep, given, codes, scale, total, rows, columns, width, groups, x.stride(0), padded, padded // 2,
        MODE=mode, STORE=store, **described(grid), KEEP=keep is not None, PLANES=planes, SUMS=sums,
        ONCE=block >= width, ROWS=high, COLUMNS=block,
        num_warps=min(8, max(1, high * block // 512)),  # 16 bytes of 16-bit numbers a thread, on AMD, too
        enable_fp_fusion=False,
    )  # fmt: skip
    return Quantized(codes, scale, total)
