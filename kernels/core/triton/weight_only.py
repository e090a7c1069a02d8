"""Products with a packed W that is decoded on the way to the matrix instruction: x W^T + b, and its gradient.

The other operand is in floating point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import bits_at, numbers, numbers_of_words, scales, zeros_at


@triton.jit
def numbers_of_tile(
    codes, table, zero, row, block, step, K, row_stride, zero_stride,
    BITS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, INSIDE: tl.constexpr, ZERO_BITS: tl.constexpr, EVEN: tl.constexpr,
    BK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Numbers [BN, BK] of the grid in `dtype`, without scales: rows `row`, columns from BK times `step` on.

    Columns that do not exist hold any number.
    """
    code_row = row[:, None].to(tl.int64) * row_stride
    k = step * BK + tl.arange(0, BK)
    column = k if EVEN else tl.where(k < K, k, 0)
    if zero is not None:
        group = column[None, :] // GROUP if INSIDE else step * BK // GROUP
        offset = zeros_at(zero, block[:, None] * zero_stride, group, ZERO_BITS)
    else:
        offset = tl.full((1, 1), ZERO, tl.int32)
    if WORDS:
        word = step * (BK // 8) + tl.arange(0, BK // 8)
        if EVEN:
            packed = tl.load(codes + code_row + word[None, :])
        else:
            packed = tl.load(codes + code_row + word[None, :], mask=word[None, :] < K // 8, other=0)
        weight = numbers_of_words(packed, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
    else:
        code = bits_at(codes, code_row, column[None, :], BITS)
        weight = numbers(code, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
    return weight


@triton.jit
def scales_of_tile(
    scale, levels, factors, block, step, K, scale_stride, scale_group,
    GROUP: tl.constexpr, LEVEL: tl.constexpr, INSIDE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the numbers of the same tile are multiplied by, float32 [BN, 1], or [BN, BK] with INSIDE."""
    if INSIDE:
        k = step * BK + tl.arange(0, BK)
        group = tl.where(k < K, k, 0)[None, :] // GROUP
    else:
        group = step * BK // GROUP
    return scales(scale, levels, factors, block[:, None] * scale_stride + group, scale_group) * LEVEL


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
    x_tile = x + token[None, :].to(tl.int64) * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(split * split_steps, tl.minimum(tl.cdiv(K, BK), (split + 1) * split_steps)):
        k = step * BK + tl.arange(0, BK)[:, None]
        if EVEN:
            seen = tl.load(x_tile + k)
        else:
            seen = tl.load(x_tile + k, mask=k < K, other=0.0)
        weight = numbers_of_tile(
            codes, table, zero, row, block, step, K, row_stride, zero_stride,
            BITS, WORDS, KIND, ZERO, MANTISSA, FACTOR, GROUP, INSIDE, ZERO_BITS, EVEN, BK, dtype,
        )  # fmt: skip
        if ONE_GROUP:
            acc = tl.dot(weight, seen, acc, input_precision="ieee")
        else:
            factor = scales_of_tile(
                scale, scale_levels, scale_factors, block, step, K, scale_stride, scale_group, GROUP, LEVEL, INSIDE, BK
            )
            if INSIDE:
                weight = (weight.to(tl.float32) * factor).to(dtype)
                acc = tl.dot(weight, seen, acc, input_precision="ieee")
            else:
                acc += tl.dot(weight, seen, input_precision="ieee") * factor
    if ONE_GROUP:
        acc *= scales(scale, scale_levels, scale_factors, block[:, None] * scale_stride, scale_group) * LEVEL
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT == 1:
        if bias is not None:
            acc += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], acc.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + (split * M + m[None, :]).to(tl.int64) * N + n[:, None], acc, mask=inside)


@triton.jit
def input_grad(
    grad, codes, table, zero, scale, scale_levels, scale_factors, out,
    M, N, K, grad_stride, row_stride, zero_stride, scale_stride, height, scale_group,
    BITS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr, LEVEL: tl.constexpr, GROUP: tl.constexpr, INSIDE: tl.constexpr,
    ZERO_BITS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BK, BM] of the transposed `grad` [M, N] W: `out` [M, K]. Arguments as for `linear`.

    The sums are over rows, each of which has scales of its own, so that these are applied to each weight.
    """
    dtype: tl.constexpr = grad.dtype.element_ty
    tiles_k, tiles_m = tl.cdiv(K, BK), tl.cdiv(M, BM)
    tile = tl.program_id(0)
    step, tile_m = tl.swizzle2d(tile // tiles_m, tile % tiles_m, tiles_k, tiles_m, 8)
    m = tile_m * BM + tl.arange(0, BM)
    token = tl.where(m < M, m, 0)
    acc = tl.zeros((BK, BM), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        row = tl.where(n < N, n, 0)
        block = row // height
        seen = tl.load(grad + token[None, :].to(tl.int64) * grad_stride + n[:, None], mask=n[:, None] < N, other=0.0)
        weight = numbers_of_tile(
            codes, table, zero, row, block, step, K, row_stride, zero_stride,
            BITS, WORDS, KIND, ZERO, MANTISSA, FACTOR, GROUP, INSIDE, ZERO_BITS, EVEN, BK, dtype,
        )  # fmt: skip
        factor = scales_of_tile(
            scale, scale_levels, scale_factors, block, step, K, scale_stride, scale_group, GROUP, LEVEL, INSIDE, BK
        )
        scaled = (weight.to(tl.float32) * factor).to(dtype)
        acc = tl.dot(tl.trans(scaled), seen, acc, input_precision="ieee")
    k = step * BK + tl.arange(0, BK)
    inside = (k[:, None] < K) & (m[None, :] < M)
    tl.store(out + m[None, :].to(tl.int64) * K + k[:, None], acc.to(out.dtype.element_ty), mask=inside)


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
