"""Fake quantization: the values that a quantized layer works with, and gradients that pass as if nothing were rounded.

What is computed is what `quantize_linear` and the reference kernel compute. The gradient is the straight-through
estimator (Bengio et al. 2013, arXiv:1308.3432), as in LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled
from .blocks import Blocks, row_chunks
from .qtensor import Outliers
from .quantize import check_finite, quantize_linear
from .ranges import RANGES
from .recipe import Recipe
from .reference import quantize_input
from .rounders import to_nearest
from .spec import InputSpec
from .stats import Stats


class _StraightThrough(torch.autograd.Function):
    """`seen` in the place of `x`; the gradient goes to `x` where `inside` [same shape] bool, everywhere for None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, inside: Tensor | None) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(*([] if inside is None else [inside]))
        return seen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for inside in ctx.saved_tensors:
            grad = grad * inside
        return grad.to(ctx.dtype), None, None


def fake_weight(
    w: Tensor, recipe: Recipe, stats: Stats, columns: Tensor | None = None
) -> tuple[Tensor, Outliers | None]:
    """What a weight [N, K] is after quantization by a recipe, and its 16-bit columns.

    `columns`: as in `quantize_linear`. Values are in the dtype of `w`, or in float32 where the layer's input is
    quantized, as the reference kernel multiplies.

    Each weight gets the gradient of its value. Ranges that clip (any but "absmax") leave weights outside of the grid:
    those that would be rounded to a level beyond the outermost one get no gradient, as in LSQ (Esser et al. 2020,
    arXiv:1902.08153, section 2). Raises WeightError for NaN and infinite weights: training has overflowed.
    """
    with torch.no_grad():
        values, outliers, inside = _rounded(w, recipe, stats, columns)
    return _StraightThrough.apply(w, values, inside), outliers


def _rounded(
    w: Tensor, recipe: Recipe, stats: Stats, columns: Tensor | None
) -> tuple[Tensor, Outliers | None, Tensor | None]:
    """Values of `w` [N, K], its 16-bit columns, and which weights are inside of their grid, None for all."""
    dtype = w.dtype if recipe.scheme.input is None else torch.float32
    spec, clips = recipe.scheme.weight, recipe.range.name != "absmax"
    if recipe.rounder.name != "nearest" or recipe.columns.name != "none":
        q = quantize_linear(w, recipe, stats, columns)
        levels = spec.numbers().levels() if q.levels is None else q.levels
        inside = _inside(w, levels, q.scale_values(), q.zero, spec.blocks) if clips else None
        if inside is not None and q.outliers is not None:
            inside[:, q.outliers.index.long()] = True
        return q.dequantize(dtype), q.outliers, inside
    # The same without codes in between, as every step does it again.
    check_finite(w, stats.name)
    params = RANGES.get(recipe.range.name)(w, spec, stats, **recipe.range.options)
    sides = spec.blocks.sides((w.shape[0], w.shape[1]))
    values = compiled.values_in_blocks(w, compiled.Parameters(params.grid, params.scale, params.zero, sides))
    values = to_nearest(w, params).dequantize(dtype) if values is None else values.to(dtype)
    return values, None, _inside(w, params.grid.levels(), params.scale, params.zero, spec.blocks) if clips else None


def _inside(w: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None, blocks: Blocks) -> Tensor:
    """Which weights [N, K] lie at most half a step beyond the outermost levels of their blocks, bool.

    `levels` [L], sorted; `scale` and `zero` [R, C].
    """
    shift = 0 if zero is None else zero.float()
    low, high = ((end + (end - inner) / 2 - shift) * scale for end, inner in (levels[[0, 1]], levels[[-1, -2]]))
    shape = (w.shape[0], w.shape[1])
    inside = torch.empty(shape, dtype=torch.bool, device=w.device)
    for rows in row_chunks(shape):
        part = w[rows].float()
        inside[rows] = (part >= blocks.expand(low, shape, rows)) & (part <= blocks.expand(high, shape, rows))
    return inside


def fake_input(x: Tensor, spec: InputSpec, outliers: Outliers | None) -> Tensor:
    """What a layer sees of its input [..., K]: float32, with ranges found at run time. All of it gets its gradient."""
    with torch.no_grad():
        seen = quantize_input(x.reshape(-1, x.shape[-1]).float(), spec, outliers).reshape(x.shape)
    return _StraightThrough.apply(x, seen, None)
