"""Ranges that know the inputs: an error matters as much as the input channel that it is multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .codebooks import FittedGrid
from .errors import SpecError
from .ranges import Params, clipping_error, params_from_bounds
from .spec import TensorSpec
from .stats import CHANNELS, Stats, needs


@needs(CHANNELS)
def weighted_mse(
    w: Tensor, spec: TensorSpec, stats: Stats, norm: float = 2.0, steps: int = 64, shrink: float = 0.8
) -> Params:
    """Shrink each block's range by the factor that gives the smallest sum of E[x_j^2] |error|^norm.

    With `norm` 2 this is the squared error of the layer's output for inputs that are uncorrelated. Candidates are
    `steps` factors from 1 down to 1 - `shrink`: first a few spread over all, then the neighbours of the best one; the
    unclipped range is always among them. A layer that calibration sent no token weighs all columns alike. Source: the
    importance matrix of llama.cpp. Raises CalibrationError without calibration.
    """
    if not isinstance(steps, int) or steps < 2 or not 0 < shrink < 1 or not norm > 0:
        found = f"steps={steps}, shrink={shrink}, norm={norm}"
        raise SpecError(f"weighted_mse needs a whole number of steps >= 2, 0 < shrink < 1 and norm > 0, got {found}")
    if isinstance(spec.numbers(), FittedGrid):
        raise SpecError(f"range 'weighted_mse' cannot search {spec.grid!r}, which is fitted to the data: use 'absmax'")
    shape = (w.shape[0], w.shape[1])
    weights = _weights(stats).to(w.device)
    bounds = w.new_empty((2, *spec.blocks.counts(shape)), dtype=torch.float32)
    width = spec.blocks.sides(shape)[1]
    for index, start in enumerate(range(0, shape[1], width)):
        columns = slice(start, start + width)
        search = _search(weights[columns], spec, norm, steps, shrink)
        low, high = spec.blocks.reduce(w[:, columns], search)
        bounds[0, :, index : index + 1], bounds[1, :, index : index + 1] = low, high
    return params_from_bounds(w, bounds[0], bounds[1], spec)


def _weights(stats: Stats) -> Tensor:
    """What the errors of each column [K] count, float32 with a largest value of 1."""
    inputs = stats.seen(CHANNELS)
    moments = inputs.square_sum
    if inputs.tokens == 0:
        stats.note("no calibration token reached this layer: its ranges weigh all input channels alike")
        moments = torch.ones_like(moments)
    return (moments / moments.max().clamp_min(torch.finfo(moments.dtype).tiny)).float()


def _search(
    weights: Tensor, spec: TensorSpec, norm: float, steps: int, shrink: float
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function from blocks [B, E], which lie below each other, to their bounds; `weights` [k] are their columns'."""
    stride = max(1, math.isqrt(steps) // 2)

    def bounds(x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin(1), x.amax(1)
        importance = weights.repeat(x.shape[1] // weights.numel())
        best = torch.full_like(low, torch.inf)
        chosen = torch.zeros_like(low)

        def factors(index: Tensor) -> Tensor:
            return 1 - index * (shrink / (steps - 1))

        def attempt(index: Tensor) -> None:
            nonlocal best, chosen
            factor = factors(index)
            loss = clipping_error(x, low * factor, high * factor, spec).pow_(norm) @ importance
            chosen = torch.where(loss < best, index, chosen)
            best = torch.minimum(loss, best)

        for coarse in range(0, steps, stride):
            attempt(torch.full_like(low, coarse))
        middle = chosen
        for step in range(1, stride):
            for index in (middle - step, middle + step):
                attempt(index.clamp(0, steps - 1))
        return low * factors(chosen), high * factors(chosen)

    return bounds


BUILTIN: dict[str, Callable[..., Params]] = {"weighted_mse": weighted_mse}
