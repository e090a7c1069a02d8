"""y = x W^T + b for integer weights and inputs: exact sums, and columns that take part in floating point."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.grids import Grid
from hfquant.packing import packed_width
from hfquant.spec import PackedSpec

from . import launch
from .blocks import int8_tile
from .inputs import Outlying, outlying, quantize
from .plans import Plan
from .quantized_inputs import bound

COLUMNS = 32  # of one step over columns in floating point


@triton.jit
def _product(a, b, sums, dtype: tl.constexpr):
    """sums + a b for operands of a 16-bit dtype, or in float32 without rounding them."""
    if dtype == tl.float32:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def bytes_of(words):
    """The four bytes of each of `words` [R, W] int32, low ones first: [R, 4 W] int8."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 4))


@triton.jit
def finished(
    sums, token, row, a_scale, a_sum, codes, scale, x, index, count, stored_index, stored_weight, bias,
    stored, row_bytes, x_stride,
    HALVES: tl.constexpr, LOW: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr, STORED: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Results float32 of all `sums` of integers: scales, columns in floating point and the bias. See `int8_kernel`."""
    if OFFSET != 0:
        sums += tl.load(a_sum + token)[:, None] * OFFSET
    total = sums.to(tl.float32) * (tl.load(a_scale + token) * (0.0625 if HALVES else 1.0))[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    x_tile = x + token.to(tl.int64)[:, None] * x_stride
    part = tl.arange(0, STEP)
    if SPLIT:
        found = tl.load(count)
        for start in range(0, found, STEP):
            there = part < found - start
            column = tl.load(index + start + part, mask=there, other=0)
            value = tl.load(x_tile + column[None, :], mask=there[None, :], other=0.0)
            place = column // 2 if HALVES else column
            byte = tl.load(codes + row.to(tl.int64)[None, :] * row_bytes + place[:, None]).to(tl.int32)
            code = (byte >> ((column % 2) * 4)[:, None]) & 15 if HALVES else byte
            level = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - LOW)
            total = _product(value, level.to(dtype), total, dtype)
    total *= tl.load(scale + row).to(tl.float32)[None, :]
    if STORED:
        same: tl.constexpr = dtype if stored_weight.dtype.element_ty == dtype else tl.float32
        for start in range(0, stored, STEP):
            there = part < stored - start
            column = tl.load(stored_index + start + part, mask=there, other=0)
            value = tl.load(x_tile + column[None, :], mask=there[None, :], other=0.0)
            kept = stored_weight + row.to(tl.int64)[None, :] * stored + (start + part)[:, None]
            weight = tl.load(kept, mask=there[:, None], other=0.0)
            total = _product(value.to(same), weight.to(same), total, same)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    return total


@triton.jit
def int8_kernel(
    a, words, partial,
    a_scale, a_sum, codes, scale, x, index, count, stored_index, stored_weight, bias, y,
    M, N, K, stored, a_stride, half, row_bytes, x_stride, part_steps,
    HALVES: tl.constexpr, LOW: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr, STORED: tl.constexpr,
    STEP: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of `y` [M, N], or with PARTS > 1 of `partial` [PARTS, M, N], sums of `part_steps` tiles.

    `a` [M, a_stride] int8, `a_scale` [M] float32 and `a_sum` [M] int32 are the quantized input. A byte of `codes` [N,
    row_bytes] becomes an int8 by turning its first bit over, which is the level that it stands for less OFFSET; `words`
    are the same bytes, four at once, which takes a fraction of the instructions, or None. With HALVES a byte holds two
    codes of 4 bits, which become the upper halves of int8, 16 times the levels; the input then has its even columns
    first and its odd ones from `half` on. `scale` [N]. Columns in floating point: the first `count` in `index` (SPLIT)
    with `x` [M, K] and levels, code + LOW; those in `stored_index` [stored] (STORED) with `x` and `stored_weight` [N,
    stored].
    """
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile, part = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    token = tl.where(m < M, m, 0)  # rows that do not exist are read as the first one and not written
    row = tl.where(n < N, n, 0)
    at = tl.arange(0, BK)
    a_tile = a + token.to(tl.int64)[:, None] * a_stride + at[None, :]
    b_row = row.to(tl.int64)[:, None] * row_bytes
    sums = tl.zeros((BM, BN), tl.int32)
    for step in range(part * part_steps, tl.minimum(tl.cdiv(row_bytes, BK), (part + 1) * part_steps)):
        start = step * BK
        inside = at < row_bytes - start
        if words is not None:
            place = start // 4 + tl.arange(0, BK // 4)
            four = tl.load(words + (b_row // 4 + place[None, :]), mask=(place < row_bytes // 4)[None, :], other=0)
            first = bytes_of((((four << 4) & -0xF0F0F10) if HALVES else four) ^ -0x7F7F7F80)
            second = bytes_of((four & -0xF0F0F10) ^ -0x7F7F7F80) if HALVES else first
        else:
            byte = tl.load(codes + b_row + (start + at)[None, :], mask=inside[None, :], other=0)
            first = ((byte << 4 if HALVES else byte) ^ 0x80).to(tl.int8, bitcast=True)
            second = ((byte & 0xF0) ^ 0x80).to(tl.int8, bitcast=True) if HALVES else first
        value = tl.load(a_tile + start, mask=inside[None, :], other=0)
        sums = tl.dot(value, tl.trans(first), sums)
        if HALVES:
            value = tl.load(a_tile + half + start, mask=(at < K // 2 - start)[None, :], other=0)
            sums = tl.dot(value, tl.trans(second), sums)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    written = (m < M)[:, None] & (n < N)[None, :]
    if PARTS == 1:
        total = finished(
            sums, token, row, a_scale, a_sum, codes, scale, x, index, count, stored_index, stored_weight, bias,
            stored, row_bytes, x_stride, HALVES, LOW, OFFSET, SPLIT, STORED, STEP,
        )  # fmt: skip
        tl.store(y + place, total.to(y.dtype.element_ty), mask=written)
    else:
        tl.store(partial + part.to(tl.int64) * M * N + place, sums, mask=written)


@triton.jit
def finish_kernel(
    partial,
    a_scale, a_sum, codes, scale, x, index, count, stored_index, stored_weight, bias, y,
    M, N, stored, row_bytes, x_stride,
    HALVES: tl.constexpr, LOW: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr, STORED: tl.constexpr,
    STEP: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of `y` [M, N] of the sums in `partial`; see `int8_kernel`. Integers: any order is exact."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    token, row = tl.where(m < M, m, 0), tl.where(n < N, n, 0)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    written = (m < M)[:, None] & (n < N)[None, :]
    sums = tl.zeros((BM, BN), tl.int32)
    for part in range(PARTS):
        sums += tl.load(partial + tl.full((1, 1), part, tl.int64) * M * N + place, mask=written, other=0)
    total = finished(
        sums, token, row, a_scale, a_sum, codes, scale, x, index, count, stored_index, stored_weight, bias,
        stored, row_bytes, x_stride, HALVES, LOW, OFFSET, SPLIT, STORED, STEP,
    )  # fmt: skip
    tl.store(y + place, total.to(y.dtype.element_ty), mask=written)


def bind(packed: list[Tensor], spec: PackedSpec) -> launch.Bound:
    """(x [..., K], packed, bias) -> y [..., N] in the dtype of `x`, for one weight.

    Raises FormatError if there are fewer codes, scales or outlier columns than the shape needs; what it gives raises
    RuntimeError, as torch does, if the shapes do not fit.
    """
    (n, k), halves = spec.shape, spec.layout == "dense"
    needed = {"codes": n * packed_width(k, 4 if halves else 8), "scale": n, "order": k, "input_scale": 1}
    needed |= {"outlier_index": spec.outliers, "outlier_weight": n * spec.outliers}
    input = spec.scheme.input
    assert input is not None
    launched = functools.partial(product, grid=input.tensor.numbers(), split=input.split)
    return bound(packed, spec, needed, plan_of, launched)


def run(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] in the dtype of `x` [..., K]. Raises like `bind` and what it gives."""
    return bind(packed, spec)(x, packed, bias)


def plan_of(spec: PackedSpec, m: int, found: launch.Hardware) -> Plan:
    """The launch for `m` rows."""
    (n, k), halves, input = spec.shape, spec.layout == "dense", spec.scheme.input
    assert input is not None
    low, row_bytes = int(spec.scheme.weight.numbers().levels()[0]), packed_width(k, 4 if halves else 8)
    tile = int8_tile(found.architecture, m)
    step = tile.bk // 2 if halves else tile.bk
    parts, each = launch.split(tile, step, m, n, row_bytes, found.processors)
    both = {
        "M": m, "N": n, "stored": spec.outliers, "row_bytes": row_bytes, "HALVES": halves, "LOW": low,
        "OFFSET": 16 * (low + 8) if halves else low + 128, "SPLIT": input.split is not None,
        "STORED": "outlier_index" in spec.names, "STEP": COLUMNS, "PARTS": parts, "BM": tile.bm, "BN": tile.bn,
        "enable_fp_fusion": True,
    }  # fmt: skip
    alone = {"K": k, "part_steps": each, "BK": step, "num_warps": tile.warps, "num_stages": tile.stages}
    return Plan((triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm)), parts, row_bytes % 4 == 0, both | alone, both)


def product(
    rows: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, y: Tensor, *, grid: Grid, split: float | None,
    plan: Plan,
) -> None:  # fmt: skip
    """Write `y` [M, N] for `rows` [M, K], M > 0, in the stored order of columns."""
    codes, stored, halves = tensors["codes"], tensors.get("outlier_index"), plan.arguments["HALVES"]
    parts = plan.splits
    with launch.on(y.device):
        apart = outlying(rows, split, stored) or Outlying(None)
        seen = quantize(
            rows, grid, "int8", given=tensors.get("input_scale"), keep=apart.keep, planes=halves,
            sums=plan.arguments["OFFSET"] != 0,
        )  # fmt: skip
        given = {
            "a_scale": seen.scale, "a_sum": seen.sums, "codes": codes, "scale": tensors["scale"], "x": rows,
            "index": apart.index, "count": apart.count, "stored_index": stored,
            "stored_weight": tensors.get("outlier_weight"), "bias": bias, "y": y, "x_stride": rows.stride(0),
        }  # fmt: skip
        words = launch.words_of(codes) if plan.words and codes.data_ptr() % 4 == 0 else None
        partial = torch.empty(parts, *y.shape, dtype=torch.int32, device=y.device) if parts > 1 else None
        stride = seen.codes.stride(0)
        int8_kernel[(plan.grid[0] * plan.grid[1], parts)](
            seen.codes, words, partial, a_stride=stride, half=stride // 2, **given, **plan.arguments
        )
        if parts > 1:
            finish_kernel[plan.grid](partial, **given, **plan.finish, num_warps=4)
