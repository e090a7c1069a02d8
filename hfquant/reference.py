"""The reference kernel: runs every layout on every torch device by unpacking, dequantizing and `F.linear`.

It defines what the fast kernels must compute; it is not fast.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .hadamard import hadamard
from .layouts import unpack, unpack_inputs
from .qtensor import InputParams, Outliers
from .ranges import absmax
from .rounders import to_nearest
from .scales import round_to
from .spec import InputSpec, PackedSpec, TensorSpec
from .stats import Stats

_INPUT = Stats("input")


def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> Tensor:
    """y [..., N] = x [..., K] @ W^T + bias in the dtype of `x`.

    With a quantized input the product is taken in float32, which stands in for exact integer accumulation, and of a
    rotated weight in the basis that it is stored in: what is quantized is the rotated input.
    """
    q = unpack(packed, spec)
    if spec.scheme.input is None:
        return F.linear(x, q.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1]).float()
    if q.rotated:
        rows, q = hadamard(rows), replace(q, rotated=False)
    seen = quantize_input(rows, spec.scheme.input, q.outliers, unpack_inputs(packed, spec))
    with torch.autocast(x.device.type, enabled=False):  # it would round what stands for exact integers
        y = F.linear(seen, q.dequantize(), None if bias is None else bias.float())
    return y.reshape(*x.shape[:-1], spec.shape[0]).to(x.dtype)


def quantize_input(x: Tensor, spec: InputSpec, outliers: Outliers | None, inputs: InputParams | None = None) -> Tensor:
    """What the layer sees of its input `x` [T, K] float32: quantized values, outlier columns as they are.

    `inputs` is the range of a static input.
    """
    keep = outlier_columns(x, spec.split, outliers)
    rest = x.masked_fill(keep, 0)
    assert spec.dynamic or inputs is not None
    return torch.where(keep, x, as_seen(rest, spec.tensor, None if spec.dynamic else inputs))


def as_seen(x: Tensor, spec: TensorSpec, inputs: InputParams | None) -> Tensor:
    """Quantize `x` [..., T, K] float32 and dequantize again, with a calibrated range or, for None, its own ones."""
    if inputs is not None:
        return static_round_trip(x, spec, inputs)
    return round_trip(x.reshape(-1, x.shape[-1]), spec).reshape(x.shape)


def outlier_columns(x: Tensor, split: float | None, outliers: Outliers | None) -> Tensor:
    """Mask [K] bool of the columns that stay in floating point.

    Those with 16-bit weights always, and with a `split` those that hold a magnitude of at least that in any token.
    """
    keep = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    if split is not None:
        keep |= (x.abs() >= split).any(0)
    if outliers is not None:
        keep[outliers.index.long()] = True
    return keep


def round_trip(x: Tensor, spec: TensorSpec) -> Tensor:
    """Quantize `x` [T, K] float32 with ranges of its own and dequantize again.

    A block that holds NaN or an infinity has no range and becomes NaN, so that an overflow stays visible.
    """
    if x.numel() == 0:
        return x
    seen = to_nearest(x, absmax(x, spec, _INPUT)).dequantize()
    (peak,) = spec.blocks.reduce(x, lambda block: (block.abs().amax(1),))
    zero_or_nan = peak - peak
    return seen + spec.blocks.expand(zero_or_nan, (x.shape[0], x.shape[1]))


def static_round_trip(x: Tensor, spec: TensorSpec, inputs: InputParams) -> Tensor:
    """Quantize `x` [any shape] float32 with a calibrated range and dequantize again.

    What lies beyond the range becomes its end. NaN and infinite values become NaN: clipping would hide an overflow.
    """
    grid, zero = spec.numbers(), None if inputs.zero is None else inputs.zero.float()
    seen = round_to(x, inputs.scale, zero, grid)
    zero_or_nan = x - x
    return seen + zero_or_nan


def input_grad(grad: Tensor, packed: list[Tensor], spec: PackedSpec) -> Tensor:
    """Gradient [..., K] of the input: grad [..., N] @ W. Quantization of the input counts as identity."""
    return grad @ unpack(packed, spec).dequantize(grad.dtype)
