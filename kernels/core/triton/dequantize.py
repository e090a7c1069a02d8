"""Packed weights as matrices, on the device: what the products decode on the way, written out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfquant.spec import PackedSpec

from . import launch
from .blocks import dequantize_tile
from .weight_only import numbers_of_tile, scales_of_tile


@triton.jit
def dequantize_kernel(
    codes, table, zero, scale, scale_levels, scale_factors, out,
    N, K, first, last, tiles, row_stride, zero_stride, scale_stride, height, scale_group,
    BITS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr, LEVEL: tl.constexpr, GROUP: tl.constexpr, INSIDE: tl.constexpr, ZERO_BITS: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BK] of columns `first` to `last` of a weight, `out` [N, last - first]: numbers times scales.

    `tiles` lie side by side, the first one holds `first`. The other arguments are those of `weight_only.linear`.
    Numbers and scales are float32 and rounded once, after they are multiplied.
    """
    program = tl.program_id(0)
    n = (program // tiles) * BN + tl.arange(0, BN)
    step = first // BK + program % tiles
    row = tl.where(n < N, n, 0)
    block = row // height
    number = numbers_of_tile(
        codes, table, zero, row, block, step, K, row_stride, zero_stride,
        BITS, WORDS, KIND, ZERO, MANTISSA, FACTOR, GROUP, INSIDE, ZERO_BITS, EVEN, BK, tl.float32,
    )  # fmt: skip
    factor = scales_of_tile(
        scale, scale_levels, scale_factors, block, step, K, scale_stride, scale_group, GROUP, LEVEL, INSIDE, BK
    )
    k = (step * BK + tl.arange(0, BK))[None, :]
    mask = (n < N)[:, None] & (k >= first) & (k < last)
    to = n.to(tl.int64)[:, None] * (last - first) + (k - first)
    tl.store(out + to, (number * factor).to(out.dtype.element_ty), mask=mask)


def columns(packed: list[Tensor], spec: PackedSpec, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Columns [N, last - first] of the matrix of a weight that is not rotated, bit for bit as `QTensor.dequantize`.

    All of them where they are stored in another order, or some are kept in 16 bit. Raises FormatError if there are
    fewer codes or scales than it needs.
    """
    tensors = dict(zip(spec.names, packed, strict=True))
    launch.check(tensors, spec)
    out = torch.empty(spec.shape[0], last - first, dtype=dtype, device=tensors["codes"].device)
    if out.numel():
        _dequantize(tensors, spec, out, first, last)
    if "order" in tensors:
        out = torch.empty_like(out).index_copy_(1, tensors["order"].long(), out)
    if spec.outliers:
        out.index_copy_(1, tensors["outlier_index"].long(), tensors["outlier_weight"].to(dtype))
    return out


def _dequantize(tensors: dict[str, Tensor], spec: PackedSpec, out: Tensor, first: int, last: int) -> None:
    device, (n, k) = out.device, spec.shape
    weight = launch.weight_of(tensors, spec, torch.float32)
    tile = dequantize_tile(launch.hardware(device).architecture, weight.is_gathered)
    wide, inside = launch.columns_of(tile.bk, weight.shape)
    tiles = triton.cdiv(last, wide) - first // wide
    with launch.on(device):
        dequantize_kernel[(triton.cdiv(n, tile.bn) * tiles,)](
            out=out, first=first, last=last, tiles=tiles, **weight.arguments, INSIDE=inside, EVEN=k % wide == 0,
            BN=tile.bn, BK=wide, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
