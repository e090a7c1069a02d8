"""y = x W^T + b where inputs and weights are levels of floating-point or integer grids, with scales for any blocks.

Products are those of float8 matrix instructions where a GPU has them and both sides are float8 numbers, otherwise of
bfloat16, which holds every level of these grids exactly. Sums are float32; those of float8 instructions, which some
GPUs keep with fewer bits, are added up in float32 after each tile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.grids import FloatGrid, Grid, IntGrid
from hfquant.packing import packed_width
from hfquant.spec import PackedSpec

from . import launch
from .blocks import levels_tile
from .decode import bits_at
from .inputs import quantize
from .int8 import bytes_of
from .plans import Plan
from .quantized_inputs import bound

FLOAT8 = {"e4m3fn": tl.float8e4nv, "e5m2ieee": tl.float8e5}
HALVED = {"e4m3fn": tl.float8e4b8, "e5m2ieee": tl.float8e5b16}  # the same bits stand for half the number


@triton.jit
def placed(magnitude, sign, M: tl.constexpr, FACTOR: tl.constexpr):
    """Numbers bfloat16 of the bits of a magnitude with M mantissa bits; `sign` has its first bit set for negative ones.

    Written over the bits of a bfloat16 they are a power of two, FACTOR, too small.
    """
    bits = (magnitude << (7 - M)) | (sign & 0x8000)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True) * tl.full((1, 1), FACTOR, tl.bfloat16)


@triton.jit
def level_of(code, ZERO: tl.constexpr, M: tl.constexpr, FACTOR: tl.constexpr, KIND: tl.constexpr):
    """Levels bfloat16 of codes int32: "float8" patterns, places in a "float" grid, or "integer", off by ZERO."""
    if KIND == "float8":
        level = placed(code & 0x7F, code << 8, M, FACTOR)
    elif KIND == "float":
        step = code - ZERO
        level = placed(tl.abs(step), step, M, FACTOR)
    else:
        level = ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)).to(tl.bfloat16)
    return level


@triton.jit
def float8_of(words, M: tl.constexpr, FACTOR: tl.constexpr):
    """Numbers bfloat16 [R, 4 W] of the four float8 patterns in each of `words` [R, W] int32, two at once."""
    odd = ((words & 0x7F007F00) >> (M + 1)) | (words & -0x7FFF8000)
    words = words << 8
    even = ((words & 0x7F007F00) >> (M + 1)) | (words & -0x7FFF8000)
    low = tl.join(even.to(tl.uint16), (even >> 16).to(tl.uint16))
    high = tl.join(odd.to(tl.uint16), (odd >> 16).to(tl.uint16))
    level = tl.reshape(tl.join(low, high), (words.shape[0], words.shape[1] * 4)).to(tl.bfloat16, bitcast=True)
    return level * tl.full((1, 1), FACTOR, tl.bfloat16)


@triton.jit
def scaled(sums, a_factor, b_factor, row, bias, A_GROUP: tl.constexpr, B_GROUP: tl.constexpr, OUTSIDE: tl.constexpr):
    """Results float32 of all `sums`: the scales that hold for whole rows, and the bias. See `levels_kernel`."""
    if not A_GROUP:
        sums *= tl.load(a_factor)[:, None]
    if not B_GROUP:
        sums *= tl.load(b_factor).to(tl.float32)[None, :]
    sums *= OUTSIDE
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[None, :]
    return sums


@triton.jit
def levels_kernel(
    a, codes, words, partial, a_scale, scale, bias, y,
    M, N, K, a_stride, half, row_bytes, a_groups, b_groups, height, part_steps,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    MANTISSA: tl.constexpr, FACTOR: tl.constexpr, OUTSIDE: tl.constexpr, A_GROUP: tl.constexpr, B_GROUP: tl.constexpr,
    HALVES: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of `y` [M, N], or with PARTS > 1 of `partial` [PARTS, M, N], sums of `part_steps` tiles each.

    `a` [M, a_stride] holds the input, float8 bits of A_TYPE or bfloat16 levels, `a_scale` [M, a_groups] its scales.
    `codes` [N, row_bytes] holds codes of BITS bits that KIND, ZERO, MANTISSA and FACTOR turn into levels, or float8
    bits of B_TYPE; `words` are the same bytes, four at once, or None. HALVES: two codes in a byte, and the input has
    its even columns first and its odd ones from `half` on. `scale` [N / height, b_groups]. A_GROUP and B_GROUP: columns
    that share a scale, 0 for all; BK divides them. OUTSIDE: a factor of the result.
    """
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    token = tl.where(m < M, m, 0)  # rows that do not exist are read as the first one and not written
    row = tl.where(n < N, n, 0)
    b_row = row.to(tl.int64)[:, None] * row_bytes
    a_row = a + token.to(tl.int64)[:, None] * a_stride
    a_factor = a_scale + token.to(tl.int64) * a_groups
    b_factor = scale + (row // height).to(tl.int64) * b_groups
    SIDE: tl.constexpr = BK // 2 if HALVES else BK  # columns of a product
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(split * part_steps, tl.minimum(tl.cdiv(K, BK), (split + 1) * part_steps)):
        at = step * SIDE + tl.arange(0, SIDE)
        if HALVES:
            if words is not None:
                place = step * (SIDE // 4) + tl.arange(0, SIDE // 4)
                four = tl.load(words + (b_row // 4 + place[None, :]), mask=(place < row_bytes // 4)[None, :], other=0)
                byte = bytes_of(four).to(tl.int32)
            else:
                byte = tl.load(codes + b_row + at[None, :], mask=(at < row_bytes)[None, :], other=0).to(tl.int32)
            first = level_of(byte & 15, ZERO, MANTISSA, FACTOR, KIND)
            second = level_of((byte >> 4) & 15, ZERO, MANTISSA, FACTOR, KIND)
            value = tl.load(a_row + at[None, :], mask=(at < row_bytes)[None, :], other=0.0)
            part = tl.dot(value, tl.trans(first))
            value = tl.load(a_row + half + at[None, :], mask=(at < K // 2)[None, :], other=0.0)
            part = tl.dot(value, tl.trans(second), part)
        else:
            there = (at < K)[None, :]
            value = tl.load(a_row + at[None, :], mask=there, other=0)
            if KIND == "float8" and B_TYPE is None and words is not None:
                place = step * (BK // 4) + tl.arange(0, BK // 4)
                four = tl.load(words + (b_row // 4 + place[None, :]), mask=(place < row_bytes // 4)[None, :], other=0)
                part = tl.dot(value, tl.trans(float8_of(four, MANTISSA, FACTOR)))
            elif B_TYPE is None:
                code = bits_at(codes, b_row, tl.where(at < K, at, 0)[None, :], BITS)
                part = tl.dot(value, tl.trans(level_of(code, ZERO, MANTISSA, FACTOR, KIND)))
            else:
                byte = tl.load(codes + b_row + at[None, :], mask=there, other=0)
                part = tl.dot(value.to(A_TYPE, bitcast=True), tl.trans(byte.to(B_TYPE, bitcast=True)))
        if A_GROUP:
            part *= tl.load(a_factor + step * BK // A_GROUP)[:, None]
        if B_GROUP:
            part *= tl.load(b_factor + step * BK // B_GROUP).to(tl.float32)[None, :]
        sums += part
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    written = (m < M)[:, None] & (n < N)[None, :]
    if PARTS == 1:
        total = scaled(sums, a_factor, b_factor, row, bias, A_GROUP, B_GROUP, OUTSIDE)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=written)
    else:
        tl.store(partial + split.to(tl.int64) * M * N + place, sums, mask=written)


@triton.jit
def add_parts(
    partial, a_scale, scale, bias, y, M, N, a_groups, b_groups, height,
    A_GROUP: tl.constexpr, B_GROUP: tl.constexpr, OUTSIDE: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of `y` [M, N] of the sums in `partial`, added in order; see `levels_kernel`."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    token, row = tl.where(m < M, m, 0), tl.where(n < N, n, 0)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    written = (m < M)[:, None] & (n < N)[None, :]
    sums = tl.zeros((BM, BN), tl.float32)
    for split in range(PARTS):
        sums += tl.load(partial + tl.full((1, 1), split, tl.int64) * M * N + place, mask=written, other=0.0)
    a_factor = a_scale + token.to(tl.int64) * a_groups
    b_factor = scale + (row // height).to(tl.int64) * b_groups
    total = scaled(sums, a_factor, b_factor, row, bias, A_GROUP, B_GROUP, OUTSIDE)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=written)


def native(architecture: str) -> str | None:
    """How the matrix instructions of a GPU read float8: as "numbers", or their bits as "halved" ones; None if not."""
    if architecture.startswith("gfx94"):
        return "halved"
    if architecture.startswith("gfx"):
        return "numbers" if architecture.startswith(("gfx95", "gfx12")) else None
    return "numbers" if architecture.startswith("sm_") and int(architecture[3:]) >= 89 else None


def decoding(spec: PackedSpec) -> tuple[dict[str, Any], float]:
    """How the codes of a weight become levels in bfloat16, and a power of two that they are off by."""
    grid = spec.scheme.weight.numbers()
    if isinstance(grid, IntGrid):
        return {"KIND": "integer", "ZERO": grid.zero_code, "MANTISSA": 0, "FACTOR": 1.0}, 1.0
    assert isinstance(grid, FloatGrid)
    usual = 2 ** (grid.e - 1) - 1
    kind = "float8" if spec.layout == "float8" else "float"
    how = {"KIND": kind, "ZERO": grid.zero_code, "MANTISSA": grid.m, "FACTOR": 2.0 ** (127 - usual)}
    return how, 2.0 ** (usual - grid.exponent_bias)


def bind(packed: list[Tensor], spec: PackedSpec) -> launch.Bound:
    """(x [..., K], packed, bias) -> y [..., N] in the dtype of `x`, for one weight.

    Raises FormatError if there are fewer codes or scales than the shape needs; what it gives raises RuntimeError, as
    torch does, if the shapes do not fit.
    """
    (n, k), input, blocks = spec.shape, spec.scheme.input, spec.scheme.weight.blocks
    assert input is not None
    counts = blocks.counts(spec.shape)
    needed = {"codes": n * row_bytes_of(spec), "scale": counts[0] * counts[1], "order": k, "input_scale": 1}
    seen = input.tensor.blocks
    how = {"width": seen.cols if seen.rows == 1 else -1, "whole": input.dynamic and seen.rows == -1}
    return bound(packed, spec, needed, plan_of, functools.partial(product, grid=input.tensor.numbers(), how=how))


def run(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] in the dtype of `x` [..., K]. Raises like `bind` and what it gives."""
    return bind(packed, spec)(x, packed, bias)


def row_bytes_of(spec: PackedSpec) -> int:
    """Bytes of a row of codes."""
    return packed_width(spec.shape[1], spec.scheme.weight.numbers().bits if spec.layout == "dense" else 8)


def plan_of(spec: PackedSpec, m: int, found: launch.Hardware) -> Plan:
    """The launch for `m` rows."""
    (n, k), weight, input = spec.shape, spec.scheme.weight, spec.scheme.input
    assert input is not None
    counts, sides, row_bytes = weight.blocks.counts(spec.shape), weight.blocks.sides(spec.shape), row_bytes_of(spec)
    bits = weight.numbers().bits if spec.layout == "dense" else 8
    how, outside = decoding(spec)
    a_type, b_type = None, None
    if spec.layout == "float8" and input.tensor.grid in FLOAT8 and (kind := native(found.architecture)):
        types = FLOAT8 if kind == "numbers" else HALVED
        a_type, b_type = types[input.tensor.grid], types[weight.grid]
        outside = 1.0 if kind == "numbers" else 4.0
    width = input.tensor.blocks.cols if input.tensor.blocks.rows == 1 else -1
    a_group = width if 0 < width < k else 0
    b_group = sides[1] if counts[1] > 1 else 0
    tile = levels_tile(found.architecture, m, b_type is not None, bool(a_group or b_group))
    bk = min(tile.bk, *(group for group in (a_group, b_group) if group), tile.bk)
    parts, each = launch.split(tile, bk, m, n, k, found.processors)
    both = {
        "M": m, "N": n, "a_groups": triton.cdiv(k, a_group) if a_group else 1, "b_groups": counts[1],
        "height": sides[0], "A_GROUP": a_group, "B_GROUP": b_group, "OUTSIDE": outside, "PARTS": parts, "BM": tile.bm,
        "BN": tile.bn, "enable_fp_fusion": True,
    }  # fmt: skip
    alone = {
        **how, "K": k, "row_bytes": row_bytes, "part_steps": each, "A_TYPE": a_type, "B_TYPE": b_type, "BITS": bits,
        "HALVES": bits == 4, "BK": bk, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return Plan((triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm)), parts, row_bytes % 4 == 0, both | alone, both)


def product(
    rows: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, y: Tensor, *, grid: Grid, how: dict[str, Any],
    plan: Plan,
) -> None:  # fmt: skip
    """Write `y` [M, N] for `rows` [M, K], M > 0, in the stored order of columns; `how`: ranges of the input."""
    codes, parts = tensors["codes"].view(torch.uint8), plan.splits
    words = launch.words_of(codes) if plan.words and codes.data_ptr() % 4 == 0 else None
    partial = torch.empty(parts, *y.shape, dtype=torch.float32, device=y.device) if parts > 1 else None
    store = "bfloat16" if plan.arguments["A_TYPE"] is None else "float8"
    with launch.on(y.device):
        seen = quantize(
            rows, grid, store, given=tensors.get("input_scale"), planes=plan.arguments["HALVES"], **how
        )  # fmt: skip
        given = {"a_scale": seen.scale, "scale": tensors["scale"], "bias": bias, "y": y}
        stride = seen.codes.stride(0)
        levels_kernel[(plan.grid[0] * plan.grid[1], parts)](
            seen.codes, codes, words, partial, a_stride=stride, half=stride // 2, **given, **plan.arguments
        )
        if parts > 1:
            add_parts[plan.grid](partial, **given, **plan.finish, num_warps=4)
