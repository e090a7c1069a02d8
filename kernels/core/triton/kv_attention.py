"""Attention of a few queries to the packed tokens of a KV cache and to the newest ones, which are not packed.

The tokens are split over programs, each of which keeps the largest score, the sum of the exponentials and the sum of
the values that these weigh; a second kernel puts them together (flash-decoding). All heads that share keys are one
program, so that a key is decoded once. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.packing import packed_width
from hfquant.spec import TensorSpec

from . import launch
from .decode import bits_at, numbers, numbers_of_words
from .decoding import decoding, table_of

LOG2E = 1.4426950408889634
TILE = 64  # tokens at most

Side = tuple[TensorSpec, dict[str, Tensor], Tensor]
"""Keys or values: their numbers, packed tensors, and the tail [B, H, t, D] in full precision."""


@triton.jit
def _spread(values, GROUP: tl.constexpr):
    """`values` [R, G] of groups, for each of their channels: [R, G * GROUP]."""
    wide = tl.broadcast_to(tl.expand_dims(values, 2), (values.shape[0], values.shape[1], GROUP))
    return tl.reshape(wide, (values.shape[0], values.shape[1] * GROUP))


@triton.jit
def _packed_tile(
    codes, words, table, scale, zero, token, block, D, row_bytes, groups, zero_bytes,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr,
    LEVEL: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys or values [R, WIDTH] in `dtype` of tokens `token` [R], whose scales are in rows `block` [R] or [1].

    GROUP: channels that share a scale, 1 for each its own, WIDTH for all. `words`: `codes` of 4 bits, eight at once, or
    None. Channels from D on hold any number.
    """
    channel = tl.arange(0, WIDTH)[None, :]
    channel = channel if EVEN else tl.where(channel < D, channel, 0)
    if GROUP == 1:
        group = channel
    else:
        number = tl.arange(0, WIDTH // GROUP)[None, :]
        group = number if EVEN else tl.where(number < groups, number, 0)
    # A product of two 16-bit numbers is exact in float32: if the scale has the dtype, one 16-bit product is as good.
    narrow: tl.constexpr = KIND == "integer" and dtype == scale.dtype.element_ty
    factor = tl.load(scale + block[:, None] * groups + group)
    if not narrow:
        factor = factor.to(tl.float32) * LEVEL
    if zero is not None:
        offset = bits_at(zero, block[:, None] * zero_bytes, group, BITS)
    else:
        offset = tl.full((1, 1), ZERO, tl.int32)
    if GROUP > 1 and GROUP < WIDTH:
        factor = _spread(factor, GROUP)
        if zero is not None:
            offset = _spread(offset, GROUP)
    if words is not None:
        eight = tl.load(words + token[:, None] * (row_bytes // 4) + tl.arange(0, WIDTH // 8)[None, :])
        number = numbers_of_words(eight, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
    else:
        code = bits_at(codes, token[:, None] * row_bytes, channel, BITS)
        number = numbers(code, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
    return number * factor if narrow else (number.to(tl.float32) * factor).to(dtype)


@triton.jit
def _seen(query, key, mask, at, there, factor):
    """Scores [M, R] in powers of two; -inf for tokens that are not `there` [R] or masked: `mask` + `at` is 0."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    score = tl.where(there[None, :], score, float("-inf"))
    if mask is not None:
        score = tl.where(tl.load(mask + at, mask=there[None, :], other=0) != 0, score, float("-inf"))
    return score


@triton.jit
def _more(top, total, sums, score, value):
    """The largest score, the sum of exponentials and the weighed sum of values, with those of more tokens."""
    best = tl.maximum(top, tl.max(score, 1))
    base = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp2(score - base[:, None])
    before = tl.exp2(top - base)
    total = total * before + tl.sum(weight, 1)
    sums = tl.dot(weight.to(value.dtype), value, sums * before[:, None], input_precision="ieee")
    return best, total, sums


@triton.jit
def attend_kernel(
    q, k_codes, k_words, k_table, k_scale, k_zero, k_tail, v_codes, v_words, v_table, v_scale, v_zero, v_tail, mask,
    part, ends, heads, queries, group_rows, tokens, tail, each, factor, k_width, v_width,
    q_batch, q_head, q_query, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_head, mask_query,
    k_bytes, k_groups, k_zero_bytes, v_bytes, v_groups, v_zero_bytes,
    K_BITS: tl.constexpr, K_KIND: tl.constexpr, K_ZERO: tl.constexpr, K_MANTISSA: tl.constexpr,
    K_FACTOR: tl.constexpr, K_LEVEL: tl.constexpr, K_ROWS: tl.constexpr, K_GROUP: tl.constexpr, K_EVEN: tl.constexpr,
    V_BITS: tl.constexpr, V_KIND: tl.constexpr, V_ZERO: tl.constexpr, V_MANTISSA: tl.constexpr,
    V_FACTOR: tl.constexpr, V_LEVEL: tl.constexpr, V_ROWS: tl.constexpr, V_GROUP: tl.constexpr, V_EVEN: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """`each` tokens of the packed ones for one head of keys in one sequence; the last program has the tail as well.

    `q` [B, heads * H, queries, k_width], of which H * queries = `group_rows` share keys. K_ROWS and V_ROWS: tokens of a
    block, 1 or a multiple of R. `mask` [B, heads * H, queries, tokens + tail] uint8 or None. Writes `part` [B * heads,
    splits, M, V_WIDTH] and `ends` [B * heads, splits, 2, M] float32: sums of values, largest scores, sums.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    owner, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head, owner = (owner // heads).to(tl.int64), (owner % heads).to(tl.int64), owner.to(tl.int64)
    m = tl.arange(0, M)
    row = tl.where(m < group_rows, m, 0)  # rows that do not exist are read as the first one and not used
    of_head = head * (group_rows // queries) + row // queries
    k_channel, v_channel = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    at = batch * q_batch + of_head * q_head + (row % queries) * q_query
    query = tl.load(q + at[:, None] + k_channel[None, :], mask=(k_channel < k_width)[None, :], other=0.0)
    masked = (batch * mask_batch + of_head * mask_head + (row % queries) * mask_query)[:, None]
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, V_WIDTH), tl.float32)
    for start in range(split * each, tl.minimum(tokens, (split + 1) * each), R):
        token = start + tl.arange(0, R)
        there = token < tokens
        place = owner * tokens + tl.where(there, token, 0)
        k_block = place if K_ROWS == 1 else owner * (tokens // K_ROWS) + start // K_ROWS + tl.zeros((1,), tl.int32)
        key = _packed_tile(
            k_codes, k_words, k_table, k_scale, k_zero, place, k_block, k_width, k_bytes, k_groups, k_zero_bytes,
            K_BITS, K_KIND, K_ZERO, K_MANTISSA, K_FACTOR, K_LEVEL, K_GROUP, K_WIDTH, K_EVEN, dtype,
        )  # fmt: skip
        score = _seen(query, key, mask, masked + token[None, :], there, factor)
        v_block = place if V_ROWS == 1 else owner * (tokens // V_ROWS) + start // V_ROWS + tl.zeros((1,), tl.int32)
        value = _packed_tile(
            v_codes, v_words, v_table, v_scale, v_zero, place, v_block, v_width, v_bytes, v_groups, v_zero_bytes,
            V_BITS, V_KIND, V_ZERO, V_MANTISSA, V_FACTOR, V_LEVEL, V_GROUP, V_WIDTH, V_EVEN, dtype,
        )  # fmt: skip
        top, total, sums = _more(top, total, sums, score, value)
    for start in range(0, tl.where(split == splits - 1, tail, 0), R):
        token = start + tl.arange(0, R)
        there = token < tail
        k_at = batch * k_batch + head * k_head + token[:, None].to(tl.int64) * k_token + k_channel[None, :]
        key = tl.load(k_tail + k_at, mask=there[:, None] & (k_channel < k_width)[None, :], other=0.0)
        score = _seen(query, key, mask, masked + (tokens + token)[None, :], there, factor)
        v_at = batch * v_batch + head * v_head + token[:, None].to(tl.int64) * v_token + v_channel[None, :]
        value = tl.load(v_tail + v_at, mask=there[:, None] & (v_channel < v_width)[None, :], other=0.0)
        top, total, sums = _more(top, total, sums, score, value)
    to = owner * splits + split
    tl.store(part + (to * M + m[:, None]) * V_WIDTH + v_channel[None, :], sums)
    tl.store(ends + to * 2 * M + m, top)
    tl.store(ends + (to * 2 + 1) * M + m, total)


@triton.jit
def combine_kernel(
    part, ends, out, heads, queries, group_rows, splits, width,
    M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One query: `part` and `ends` of all splits to `out` [B, queries, heads * H, width]; 0 where all is masked."""
    owner, row = tl.program_id(0), tl.program_id(1)
    head = (owner % heads) * (group_rows // queries) + row // queries
    place = (owner // heads * queries + row % queries).to(tl.int64) * heads * (group_rows // queries) + head
    owner = owner.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    top = tl.load(ends + owner * splits * 2 * M + row)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for split in range(splits):
        to = owner * splits + split
        score = tl.load(ends + to * 2 * M + row)
        best = tl.maximum(top, score)
        base = tl.where(best == float("-inf"), 0.0, best)
        before, now = tl.exp2(top - base), tl.exp2(score - base)
        total = total * before + tl.load(ends + (to * 2 + 1) * M + row) * now
        sums = sums * before + tl.load(part + (to * M + row) * WIDTH + channel) * now
        top = best
    found = tl.where(total == 0.0, 0.0, sums / total)
    tl.store(out + place * width + channel, found.to(out.dtype.element_ty), mask=channel < width)


@dataclass(frozen=True)
class Read:
    """One side as the kernel takes it: tensors and numbers by name, and what sizes depend on."""

    arguments: dict[str, Any]
    padded: int
    rows: int


def read(side: Side, letter: str, dtype: torch.dtype) -> Read:
    """The arguments for keys ("k") or values ("v")."""
    spec, tensors, tail = side
    width, bits = tail.shape[-1], spec.numbers().bits
    rows, group = spec.blocks.sides((1 << 30, width))
    groups = triton.cdiv(width, group)
    padded = max(16, triton.next_power_of_2(width))
    how = decoding(spec.grid, dtype)
    codes = tensors["codes"].contiguous()
    even = padded == width
    words = codes.view(torch.int32) if bits == 4 and even and codes.data_ptr() % 4 == 0 else None
    table = table_of(spec.grid, dtype, codes.device) if how.kind == "table" else None
    tensors_ = {"codes": codes, "words": words, "table": table, "scale": tensors["scale"].contiguous()}
    tensors_ |= {"zero": tensors["zero"].contiguous() if "zero" in tensors else None, "tail": tail}
    sizes = {"width": width, "bytes": packed_width(width, bits), "groups": groups}
    sizes |= {"zero_bytes": packed_width(groups, bits)}
    sizes |= dict(zip(("batch", "head", "token"), tail.stride()[:3], strict=True))
    known = {"BITS": bits, "KIND": how.kind, "ZERO": how.zero, "MANTISSA": how.mantissa, "FACTOR": how.factor}
    known |= {"LEVEL": how.level, "ROWS": rows, "GROUP": padded if group >= width else group}
    known |= {"EVEN": even, "WIDTH": padded}
    named = {f"{letter}_{name}": value for name, value in (tensors_ | sizes).items()}
    return Read(named | {f"{letter.upper()}_{name}": value for name, value in known.items()}, padded, rows)


def splits_of(tokens: int, step: int, programs: int, processors: int) -> tuple[int, int]:
    """In how many parts the packed tokens are split, and tokens in each: programs for twice the processors."""
    steps = triton.cdiv(tokens, step)
    parts = max(1, min(triton.cdiv(2 * processors, programs), steps // 4))
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each * step


def attend(query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float) -> Tensor:
    """Attention [B, L, H, D'] of `query` [B, H, L, D]; see `hfquant.gpu.kv.attend`."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    tails = [tail if tail.stride(-1) == 1 else tail.contiguous() for _, _, tail in (keys, values)]
    keys, values = ((*side[:2], tail) for side, tail in zip((keys, values), tails, strict=True))
    batch, all_heads, queries, _ = query.shape
    heads, tokens = keys[1]["codes"].shape[1:3]
    rows = all_heads // heads * queries
    k, v = read(keys, "k", query.dtype), read(values, "v", query.dtype)
    step = min([TILE, *(side.rows for side in (k, v) if side.rows > 1)])
    high, width = max(16, triton.next_power_of_2(rows)), values[2].shape[-1]
    splits, each = splits_of(tokens, step, batch * heads, launch.hardware(query.device).processors)
    strides = (0, 0, 0)
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = mask.expand(batch, all_heads, queries, mask.shape[-1]).stride()[:3]
        mask = mask.view(torch.uint8)
    part = torch.empty(batch * heads, splits, high, v.padded, dtype=torch.float32, device=query.device)
    ends = torch.empty(batch * heads, splits, 2, high, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, queries, all_heads, width, dtype=query.dtype, device=query.device)
    with launch.on(query.device):
        attend_kernel[(batch * heads, splits)](
            query, mask=mask, part=part, ends=ends, heads=heads, queries=queries, group_rows=rows, tokens=tokens,
            tail=tails[0].shape[2], each=each, factor=scale * LOG2E,
            **dict(zip(("q_batch", "q_head", "q_query"), query.stride()[:3], strict=True)),
            **dict(zip(("mask_batch", "mask_head", "mask_query"), strides, strict=True)),
            **k.arguments, **v.arguments, M=high, R=step, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(batch * heads, rows)](
            part, ends, out, heads, queries, rows, splits, width,
            M=high, WIDTH=v.padded, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
