"""Quantizing new tokens of a KV cache: codes, scales and zero points as torch finds them, to the last bit."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.grids import IntGrid, thresholds
from hfquant.grids import grid as named
from hfquant.packing import packed_width
from hfquant.spec import TensorSpec

from . import launch

CHANNELS = 64  # of a tile


@triton.jit
def _scale_of(low, high, peak, STEPS: tl.constexpr, ASYMMETRIC: tl.constexpr, MOST: tl.constexpr, dtype: tl.constexpr):
    """Scales in `dtype`, never 0 or infinite: of [low, high] with 0 inside, or of the larger magnitude.

    `peak` holds the bits of the largest magnitude; where it is not finite, the scale is NaN.
    """
    if ASYMMETRIC:
        reach = tl.maximum(high, 0.0) - tl.minimum(low, 0.0)
    else:
        reach = peak.to(tl.float32, bitcast=True)
    scale = tl.div_rn(reach, tl.full(reach.shape, STEPS, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    if dtype == tl.float16:
        # Its subnormal numbers are used, rounded up: a smaller scale would clip.
        small = tl.maximum(tl.ceil(scale * 16777216.0), 1.0) * 5.9604644775390625e-08
        scale = tl.where(scale < 6.103515625e-05, small, scale)
    else:
        scale = tl.maximum(scale, 1.1754943508222875e-38)
    return tl.where(peak >= 0x7F800000, float("nan"), tl.minimum(scale, MOST)).to(dtype)


@triton.jit
def _rounded(value):
    """The nearest integers, ties to even, of numbers that matter between -512 and 512."""
    return (tl.minimum(tl.maximum(value, -512.0), 512.0) + 12582912.0) - 12582912.0


@triton.jit
def _whole(value):
    """Integers int32 of float32 ones between 0 and 255, without a conversion instruction, which is slow."""
    return (value + 12582912.0).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _codes(value, scale, zero, table, LAST: tl.constexpr, BITS: tl.constexpr):
    """Codes int32: integers by arithmetic, others by a search among the ends [2^BITS] of the levels in `table`."""
    ratio = tl.div_rn(value, scale + tl.zeros_like(value))
    if table is None:
        code = _whole(tl.minimum(tl.maximum(_rounded(ratio) + zero, 0.0), LAST))
    else:
        code = tl.zeros_like(ratio).to(tl.int32)
        for step in tl.static_range(BITS):
            next = code + (1 << (BITS - 1 - step))
            code = tl.where(ratio > tl.load(table + next - 1), next, code)
    return code


@triton.jit
def _store_packed(at, code, first, row_bytes, mask, BITS: tl.constexpr):
    """Codes [R, C] int32 to rows of `row_bytes` that begin at `at` [R, 1], from column `first` on: multiples of 8."""
    eight: tl.constexpr = code.shape[1] // 8
    shift = tl.arange(0, 8).to(tl.int64) * BITS
    word = tl.sum(tl.reshape(code, (code.shape[0], eight, 8)).to(tl.int64) << shift[None, None, :], 2)
    place = (first // 8 + tl.arange(0, eight)) * BITS
    for byte in tl.static_range(BITS):
        to = place + byte
        tl.store(at + to[None, :], ((word >> (8 * byte)) & 255).to(tl.uint8), mask=mask & (to < row_bytes)[None, :])


@triton.jit
def by_channel(
    x, table, codes, scale, zero, heads, blocks, D, x_batch, x_head, x_token, row_bytes, zero_bytes,
    STEPS: tl.constexpr, LAST: tl.constexpr, ZERO: tl.constexpr, ASYMMETRIC: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some channels of one block of ROWS tokens, of `x` [B, heads, blocks * ROWS, D]; each channel has a scale.

    `codes` [B, heads, blocks * ROWS, row_bytes], `scale` [B, heads, blocks, D], `zero` [B, heads, blocks, zero_bytes].
    """
    number = tl.program_id(0)
    block, owner = number.to(tl.int64), number // blocks
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = column < D
    row = tl.arange(0, ROWS)
    start = (owner // heads).to(tl.int64) * x_batch + (owner % heads) * x_head
    start += (number % blocks).to(tl.int64) * ROWS * x_token
    at = start + row[:, None].to(tl.int64) * x_token + column[None, :]
    value = tl.load(x + at, mask=inside[None, :], other=0.0).to(tl.float32)
    peak = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    stored = _scale_of(tl.min(value, 0), tl.max(value, 0), peak, STEPS, ASYMMETRIC, MOST, scale.dtype.element_ty)
    tl.store(scale + block * D + column, stored, mask=inside)
    factor = stored.to(tl.float32)
    if ASYMMETRIC:
        offset = _rounded(tl.minimum(tl.div_rn(tl.maximum(-tl.min(value, 0), 0.0), factor), LAST))
        whole = _whole(tl.where(inside & (peak < 0x7F800000), offset, 0.0))
        nowhere = tl.zeros((1, 1), tl.int64)
        _store_packed(zero + block * zero_bytes + nowhere, whole[None, :], first, zero_bytes, nowhere == 0, BITS)
    else:
        offset = tl.full((COLUMNS,), ZERO, tl.float32)
    code = _codes(value, factor[None, :], offset[None, :], table, LAST, BITS)
    code = tl.where(inside[None, :], code, 0)
    to = codes + (block * ROWS + row[:, None]) * row_bytes
    _store_packed(to, code, first, row_bytes, row[:, None] >= 0, BITS)


@triton.jit
def by_token(
    x, table, codes, scale, zero, rows, heads, tokens, D, groups, width,
    x_batch, x_head, x_token, row_bytes, zero_bytes,
    STEPS: tl.constexpr, LAST: tl.constexpr, ZERO: tl.constexpr, ASYMMETRIC: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Up to eight groups of `width` channels of ROWS tokens, of `x` [B, heads, tokens, D]; `rows` tokens in all.

    `codes` [rows, row_bytes], `scale` [rows, groups], `zero` [rows, zero_bytes].
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = place < rows
    owner = place // tokens
    start = (owner // heads).to(tl.int64) * x_batch + (owner % heads) * x_head + (place % tokens).to(tl.int64) * x_token
    row = place.to(tl.int64)
    zeros = tl.zeros((ROWS,), tl.int64)
    for number in range(0, tl.minimum(groups - tl.program_id(1) * 8, 8)):
        group = tl.program_id(1) * 8 + number
        first = group * width
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < tl.minimum(first + width, D))[None, :]
        value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        peak = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        low = tl.min(value, 1)
        stored = _scale_of(low, tl.max(value, 1), peak, STEPS, ASYMMETRIC, MOST, scale.dtype.element_ty)
        tl.store(scale + row * groups + group, stored, mask=there)
        factor = stored.to(tl.float32)
        if ASYMMETRIC:
            offset = _rounded(tl.minimum(tl.div_rn(tl.maximum(-low, 0.0), factor), LAST))
            whole = _whole(tl.where(peak < 0x7F800000, offset, 0.0))
            zeros |= whole.to(tl.int64) << (number * BITS)
        else:
            offset = tl.full((ROWS,), ZERO, tl.float32)
        code = tl.where(inside, _codes(value, factor[:, None], offset[:, None], table, LAST, BITS), 0)
        _store_packed(codes + row[:, None] * row_bytes, code, first, row_bytes, there[:, None], BITS)
    if ASYMMETRIC:
        for byte in tl.static_range(BITS):
            to = tl.program_id(1) * BITS + byte
            tl.store(zero + row * zero_bytes + to, (zeros >> (8 * byte)).to(tl.uint8), mask=there & (to < zero_bytes))


@lru_cache(maxsize=256)
def ends_of(name: str, device: torch.device) -> Tensor | None:
    """The largest number of each code but the last [2^bits - 1] float32, infinite beyond; None for integers."""
    grid = named(name)
    if isinstance(grid, IntGrid):
        return None
    table = torch.full((2**grid.bits - 1,), torch.inf)
    table[: grid.size - 1] = thresholds(grid)
    return table.to(device)


def quantize(x: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    """Tokens `x` [B, H, T, D], T a multiple of the tokens in a block, in the form of `kv_states.Packed`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, width = x.shape
    grid, high = spec.numbers(), spec.blocks.rows
    group = spec.blocks.sides((tokens, width))[1]
    groups, blocks, all_tokens = triton.cdiv(width, group), tokens // high, batch * heads * tokens
    row_bytes, zero_bytes = packed_width(width, grid.bits), packed_width(groups, grid.bits)
    codes = torch.empty(batch, heads, tokens, row_bytes, dtype=torch.uint8, device=x.device)
    scale = torch.empty(batch, heads, blocks, groups, dtype=spec.scale_dtype, device=x.device)
    made = {"codes": codes, "scale": scale}
    if spec.zero:
        made["zero"] = torch.empty(batch, heads, blocks, zero_bytes, dtype=torch.uint8, device=x.device)
    arguments = dict(  # noqa: C408
        x=x, table=ends_of(spec.grid, x.device), codes=codes, scale=scale, zero=made.get("zero"), heads=heads, D=width,
        x_batch=x.stride(0), x_head=x.stride(1), x_token=x.stride(2), row_bytes=row_bytes, zero_bytes=zero_bytes,
        STEPS=float(grid.size - 1) if spec.zero else grid.top, LAST=float(grid.size - 1), ZERO=float(grid.zero_code),
        ASYMMETRIC=spec.zero, MOST=torch.finfo(spec.scale_dtype).max, BITS=grid.bits, enable_fp_fusion=False,
    )  # fmt: skip
    wide = max(8, triton.next_power_of_2(group if high == 1 else min(width, CHANNELS)))
    with launch.on(x.device):
        if high > 1:
            by_channel[(all_tokens // high, triton.cdiv(width, wide))](
                blocks=blocks, ROWS=high, COLUMNS=wide, num_warps=8 if high * wide > 4096 else 4, **arguments
            )
        else:
            rows = max(1, 2048 // wide)
            by_token[(triton.cdiv(all_tokens, rows), triton.cdiv(groups, 8))](
                rows=all_tokens, tokens=tokens, groups=groups, width=group, ROWS=rows, COLUMNS=wide, num_warps=4,
                **arguments,
            )  # fmt: skip
    return made
