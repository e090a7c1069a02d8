"""y = x W^T + b for a packed W that is decoded on the way to the matrix instruction; x is floating point."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import bits_at, four_bits_of, from_magic, numbers, scales


@triton.jit
def linear(
    x, codes, table, zero, scale, scale_levels, scale_factors, bias, out,
    M, N, K, x_stride, row_stride, zero_stride, scale_stride, height, scale_group, split_steps,
    BITS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr, LEVEL: tl.constexpr, GROUP: tl.constexpr, ONE_GROUP: tl.constexpr, INSIDE: tl.constexpr,
    ZERO_BITS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BM] of the transposed result, or of its part for some of the columns of W.

    `x` [M, K] has rows of `x_stride`; `codes` rows of `row_stride` bytes, or WORDS of eight 4-bit codes; blocks
    `height` rows and GROUP columns. `table`, `zero`, `scale_levels`, `scale_factors` and `bias` [N] may be None.
    Scales are applied to the sums over BK columns, which lie in one block, so that the matrix instruction gets exact
    integers or levels, and with INSIDE to each weight. `out` is [M, N], or with SPLIT > 1 partial sums [SPLIT, M, N]
    float32 of `split_steps` tiles each.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = tl.swizzle2d(tile // tiles_m, tile % tiles_m, tiles_n, tiles_m, 8)
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    row = tl.where(n < N, n, 0)  # rows that do not exist are read as the first one and not written
    token = tl.where(m < M, m, 0)
    block = row // height
    code_row = row[:, None].to(tl.int64) * row_stride
    x_tile = x + token[None, :].to(tl.int64) * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(split * split_steps, tl.minimum(tl.cdiv(K, BK), (split + 1) * split_steps)):
        start = step * BK
        k = start + tl.arange(0, BK)
        if EVEN:
            seen = tl.load(x_tile + k[:, None])
            column = k
        else:
            seen = tl.load(x_tile + k[:, None], mask=k[:, None] < K, other=0.0)
            column = tl.where(k < K, k, 0)
        group = start // GROUP
        if zero is not None:
            if INSIDE:
                offset = bits_at(zero, block[:, None] * zero_stride, column[None, :] // GROUP, ZERO_BITS)
            else:
                offset = bits_at(zero, block[:, None] * zero_stride, group, ZERO_BITS)
        else:
            offset = tl.full((1, 1), ZERO, tl.int32)
        if WORDS:
            word = step * (BK // 8) + tl.arange(0, BK // 8)
            if EVEN:
                packed = tl.load(codes + code_row + word[None, :])
            else:
                packed = tl.load(codes + code_row + word[None, :], mask=word[None, :] < K // 8, other=0)
            if KIND == "integer" and dtype != tl.float32:
                placed = four_bits_of(packed, 0x6400 if dtype == tl.float16 else 0x4300)
                weight = from_magic(placed, offset, dtype)
            else:
                code = four_bits_of(packed, 0)
                weight = numbers(code, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
        else:
            code = bits_at(codes, code_row, column[None, :], BITS)
            weight = numbers(code, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
        if INSIDE:
            at = block[:, None] * scale_stride + column[None, :] // GROUP
            factor = scales(scale, scale_levels, scale_factors, at, scale_group) * LEVEL
            weight = (weight.to(tl.float32) * factor).to(dtype)
            acc = tl.dot(weight, seen, acc, input_precision="ieee")
        elif ONE_GROUP:
            acc = tl.dot(weight, seen, acc, input_precision="ieee")
        else:
            factor = scales(scale, scale_levels, scale_factors, block * scale_stride + group, scale_group) * LEVEL
            acc += tl.dot(weight, seen, input_precision="ieee") * factor[:, None]
    if ONE_GROUP and not INSIDE:
        acc *= (scales(scale, scale_levels, scale_factors, block * scale_stride, scale_group) * LEVEL)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT == 1:
        if bias is not None:
            acc += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], acc.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + (split * M + m[None, :]).to(tl.int64) * N + n[:, None], acc, mask=inside)


@triton.jit
def add_splits(partial, bias, out, size, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `partial` [SPLIT, size] float32 in order and add `bias` [N]: `out` [size]. No atomics: equal on every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)
