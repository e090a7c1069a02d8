"""From the bounds of a block to its scale and zero point, as they will be stored."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled
from .grids import Grid
from .qtensor import QTensor
from .spec import SCALE_DTYPES, TensorSpec


def scale_from_bounds(low: Tensor, high: Tensor, grid: Grid, zero: bool | str) -> Tensor:
    """Scales (real units per grid step, same shape, float32) that map [low, high] onto the grid; 1 where both are 0.

    Asymmetric: (high - low) / (L - 1) with 0 inside the range. Symmetric: max(|low|, |high|) / largest level.
    """
    if zero:
        scale = (high.clamp_min(0) - low.clamp_max(0)) / (grid.size - 1)
    else:
        scale = torch.maximum(high, -low).clamp_min(0) / grid.top
    return one_for_zero(scale)


def one_for_zero(scale: Tensor) -> Tensor:
    """Scales with 0, that of an all-zero block, replaced by 1; NaN stays, so that a bad input is seen in the output."""
    return scale.masked_fill(scale == 0, 1)


def zero_from_bounds(low: Tensor, scale: Tensor, grid: Grid, whole: bool = True) -> Tensor:
    """Zero points (codes of the real number 0, float32) for the scales as stored; `whole`: on the grid."""
    zero = -low.clamp_max(0) / scale
    return zero.round().clamp_(0, grid.size - 1) if whole else zero


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [any shape] float32 rounded to `dtype`, kept positive and finite: never 0 by underflow, never infinite.

    Where `dtype` gets coarse they are rounded up, as a smaller scale would clip. The subnormal numbers of float16 are
    used, because weights of 1e-4 and less need them; those of the wide dtypes are not: devices flush them to 0.
    """
    limits = torch.finfo(dtype)
    if dtype == torch.float16:
        step = limits.smallest_normal * limits.eps
        scale = torch.where(scale < limits.smallest_normal, (scale / step).ceil().clamp_min(1) * step, scale)
    else:
        scale = scale.clamp_min(limits.smallest_normal)
    return scale.clamp_max(limits.max).to(dtype)


def store_scales(scale: Tensor, how: str | TensorSpec) -> Tensor | QTensor:
    """Scales [R, C] float32 in their stored form: a tensor of a dtype, or a QTensor [1, R * C]."""
    if isinstance(how, str):
        return as_stored(scale, SCALE_DTYPES[how])
    return _quantize_scales(scale.reshape(1, -1), how)


def _quantize_scales(scale: Tensor, spec: TensorSpec) -> QTensor:
    """Quantize a row of positive scales [1, S] by absmax; the smallest positive level is the floor.

    Rounding a scale to 0 would erase its whole block.
    """
    grid = spec.numbers()
    (top,) = spec.blocks.reduce(scale, lambda x: (x.amax(1) / grid.top,))
    outer = store_scales(top, spec.scale)
    shape = (scale.shape[0], scale.shape[1])
    outer_values = outer.dequantize().reshape(top.shape) if isinstance(outer, QTensor) else outer.float()
    codes = grid.encode(scale / spec.blocks.expand(outer_values, shape))
    return QTensor(codes.clamp_min(grid.zero_code + 1), outer, None, None, spec)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Codes [same shape] uint8 of float32 `x`; `scale` and `zero` broadcast against it."""
    if zero is None:
        return grid.encode(x / scale)
    return _nearest_code(x, scale, zero, grid).to(torch.uint8)


def _nearest_code(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes [same shape] float32. Steps are rounded before whole zero points are added: ties go to an even step."""
    whole = zero.round()
    return (x / scale).add_(zero - whole).round_().add_(whole).clamp_(0, grid.size - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Real values [same shape] float32 of `codes`."""
    numbers = grid.decode(codes)
    return (numbers if zero is None else numbers - zero) * scale


def round_to(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Real values [same shape] float32 nearest to float32 `x`: `decode(encode(...))` without the codes in between."""
    if (found := compiled.values(x, scale, zero, grid)) is not None:
        return found
    if zero is None:
        return grid.nearest(x / scale).mul_(scale)
    return _nearest_code(x, scale, zero, grid).sub_(zero).mul_(scale)
