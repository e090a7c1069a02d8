"""The products of all experts of a call in one launch: each row of x with the weight of its own expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.spec import PackedSpec

from . import launch
from .blocks import tile_for
from .decode import bits_at, numbers, numbers_of_words, scales, zeros_at

WHOLE = ("codes", "zero", "scale", "scale_codes", "scale_scale")  # packed tensors that are read as [E, ...]


@triton.jit
def grouped_kernel(
    x, source, expert_of, first_of, behind_of, codes, table, zero, scale, scale_levels, scale_factors, bias, out,
    N, K, experts, x_stride, row_stride, zero_stride, scale_stride, blocks_high, factors_each, height, scale_group,
    BITS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr, LEVEL: tl.constexpr, GROUP: tl.constexpr, ONE_GROUP: tl.constexpr,
    ZERO_BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BM] of the transposed result for some rows of one expert.

    `expert_of`, `first_of` and `behind_of` [tiles] say whose rows of `out` [S, N] a tile computes: from the first one,
    at most BM, up to the one behind its expert's last; `experts` stands for a tile without rows. Row s of `out` is of
    row `source[s]` of `x`, or of row s if that is None. The weights are [E, ...], described as for
    `weight_only.linear`, with `blocks_high` rows of blocks and `factors_each` factors of quantized scales for each
    expert; `bias` [E, N].
    """
    dtype: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(1)
    expert = tl.load(expert_of + tile)
    if expert < experts:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        m = tl.load(first_of + tile) + tl.arange(0, BM)
        behind = tl.load(behind_of + tile)
        row = tl.where(n < N, n, 0)  # rows that do not exist are read as the first one and not written
        token = tl.where(m < behind, m, behind - 1)
        if source is not None:
            token = tl.load(source + token)
        block = row // height
        zero_row = (expert * blocks_high + block)[:, None].to(tl.int64) * zero_stride
        scale_row = scale + expert.to(tl.int64) * blocks_high * scale_stride
        factors = scale_factors
        if scale_factors is not None:
            factors = scale_factors + expert.to(tl.int64) * factors_each
        code_row = (expert.to(tl.int64) * N + row)[:, None] * row_stride
        x_tile = x + token[None, :].to(tl.int64) * x_stride
        acc = tl.zeros((BN, BM), tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            k = step * BK + tl.arange(0, BK)
            seen = tl.load(x_tile + k[:, None], mask=k[:, None] < K, other=0.0)
            group = step * BK // GROUP
            if zero is not None:
                offset = zeros_at(zero, zero_row, group, ZERO_BITS)
            else:
                offset = tl.full((1, 1), ZERO, tl.int32)
            if WORDS:
                word = step * (BK // 8) + tl.arange(0, BK // 8)
                packed = tl.load(codes + code_row + word[None, :], mask=word[None, :] < K // 8, other=0)
                weight = numbers_of_words(packed, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
            else:
                code = bits_at(codes, code_row, tl.where(k < K, k, 0)[None, :], BITS)
                weight = numbers(code, table, offset, KIND, dtype, BITS, MANTISSA, FACTOR)
            if ONE_GROUP:
                acc = tl.dot(weight, seen, acc, input_precision="ieee")
            else:
                at = block * scale_stride + group
                factor = scales(scale_row, scale_levels, factors, at, scale_group) * LEVEL
                acc += tl.dot(weight, seen, input_precision="ieee") * factor[:, None]
        if ONE_GROUP:
            acc *= (scales(scale_row, scale_levels, factors, block * scale_stride, scale_group) * LEVEL)[:, None]
        if bias is not None:
            acc += tl.load(bias + expert.to(tl.int64) * N + row).to(tl.float32)[:, None]
        inside = (n < N)[:, None] & (m < behind)[None, :]
        tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Routing:
    """Which rows are whose: assignments [T k] sorted by expert, those of other ranks last, and tiles of `rows` rows.

    `sorted` [T k] int64 are the places of the assignments in `top_k_index` [T, k]; `expert`, `first`, `behind` [tiles]
    int32 as `grouped_kernel` takes them. There are as many tiles as there can be: nothing is read back from the GPU.
    """

    sorted: Tensor
    expert: Tensor
    first: Tensor
    behind: Tensor
    rows: int


def routing(top_k_index: Tensor, experts: int, dtype: torch.dtype) -> Routing:
    """The tiles for `top_k_index` [T, k] and inputs of a dtype; an index of `experts` or more is for another rank."""
    architecture = launch.hardware(top_k_index.device).architecture
    flat = top_k_index.reshape(-1).clamp_max(experts)
    most = triton.cdiv(flat.numel(), experts)  # rows of an expert, if they were equal
    rows = tile_for(architecture, most, dtype == torch.float32, False).bm
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    counts = counts[:experts]
    behind, tiles = counts.cumsum(0), (counts + rows - 1) // rows
    last = tiles.cumsum(0)
    number = torch.arange(triton.cdiv(flat.numel(), rows) + experts, device=flat.device)
    expert = torch.searchsorted(last, number, right=True)
    held = expert.clamp_max(experts - 1)
    first = behind[held] - counts[held] + (number - last[held] + tiles[held]) * rows
    return Routing(order, expert.int(), first.int(), behind[held].int(), rows)


def why_not(spec: PackedSpec) -> str | None:
    """Reason why the weights of a projection cannot be run, or None; the kernel for one of them must be able to."""
    if spec.rotated or spec.outliers or not set(spec.names) <= set(WHOLE):
        return "runs experts one by one that are rotated, or have columns in 16 bit or another order, or fitted levels"
    if launch.columns_of(128, launch.shape_of(spec))[1]:
        return "runs experts one by one that have groups of columns that 16 does not divide"
    return None


def project(
    x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, spec: PackedSpec, routed: Routing, top: int
) -> Tensor:
    """Outputs [T k, N] in the order of `routed.sorted` of x [T, K], or for `top` = 0 of x [T k, K] in that order.

    `tensors` [E, ...] are the packed weights, `bias` [E, N]. Rows of other ranks are not written. Raises FormatError if
    there are fewer codes or scales than the shape needs.
    """
    launch.check({name: tensor[0] for name, tensor in tensors.items()}, spec)
    n = spec.shape[0]
    count = routed.sorted.numel()
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = launch.weight_of(tensors, spec, x.dtype)
    tile = tile_for(launch.hardware(x.device).architecture, routed.rows, x.dtype == torch.float32, weight.is_gathered)
    columns = launch.columns_of(tile.bk, weight.shape)[0]
    out = torch.empty(count, n, dtype=x.dtype, device=x.device)
    factors = tensors["scale_scale"][0].numel() if "scale_scale" in tensors else 0
    source = (routed.sorted // top).int() if top else None
    with launch.on(x.device):
        grouped_kernel[(triton.cdiv(n, tile.bn), routed.expert.numel())](
            x, source, routed.expert, routed.first, routed.behind, out=out, experts=tensors["codes"].shape[0],
            bias=None if bias is None else bias.contiguous(), x_stride=x.stride(0), factors_each=factors,
            blocks_high=weight.shape.counts[0], ONE_GROUP=weight.shape.counts[1] == 1, **weight.arguments,
            BM=routed.rows, BN=tile.bn, BK=columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def combine(y: Tensor, routed: Routing, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Tensor:
    """Weighted sums [T, N], in float32 and in the order of the slots, of `y` [T k, N] in the order of `routed`."""
    placed = torch.empty_like(y).index_copy_(0, routed.sorted, y).view(*top_k_index.shape, -1).float()
    # Rows of other ranks were not written.
    placed = placed.masked_fill((top_k_index >= experts)[..., None], 0)
    return (placed * top_k_weights[..., None].float()).sum(1).to(y.dtype)
