"""The range "awq_clip": each group is clipped where that lowers the error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfquant.codebooks import FittedGrid
from hfquant.errors import SpecError
from hfquant.ranges import Params, params_from_bounds
from hfquant.scales import as_stored, round_to, scale_from_bounds, zero_from_bounds
from hfquant.spec import TensorSpec
from hfquant.stats import HESSIAN, Stats, needs


@needs(HESSIAN)
def awq_clip(w: Tensor, spec: TensorSpec, stats: Stats, steps: int = 20, shrink: float = 0.5) -> Params:
    """Shrink each block's range by the factor that gives the smallest squared error of what the block adds to outputs.

    That is d G d^T for its error d and the Gram matrix G of its input columns over all calibration tokens. Candidates
    are `steps` + 1 factors from 1 down to 1 - `shrink`, measured with scales as stored; the unclipped range is among
    them, so absmax is never better. A layer that calibration sent no token weighs all columns alike. Source: Lin et al.
    2023, "AWQ", and its code, which measures on sampled tokens. Raises CalibrationError without calibration.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or not 0 < shrink < 1:
        raise SpecError(f"awq_clip needs a whole number of steps >= 1 and 0 < shrink < 1, got {steps=}, {shrink=}")
    if isinstance(spec.numbers(), FittedGrid):
        raise SpecError(f"range 'awq_clip' cannot search {spec.grid!r}, which is fitted to the data: use 'absmax'")
    inputs = stats.seen(HESSIAN)
    assert inputs.gram is not None
    if inputs.tokens == 0:
        stats.note("no calibration token reached this layer: its ranges weigh all input channels alike")
    shape = (w.shape[0], w.shape[1])
    bounds = w.new_empty((2, *spec.blocks.counts(shape)), dtype=torch.float32)
    width = spec.blocks.sides(shape)[1]
    factors = torch.linspace(1, 1 - shrink, steps + 1).tolist()
    for index, start in enumerate(range(0, shape[1], width)):
        columns = slice(start, min(start + width, shape[1]))
        gram = inputs.gram[columns, columns] if inputs.tokens else torch.eye(columns.stop - start)
        gram = (gram / gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)).float().to(w.device)
        low, high = spec.blocks.reduce(w[:, columns], _search(gram, spec, factors))
        bounds[0, :, index : index + 1], bounds[1, :, index : index + 1] = low, high
    return params_from_bounds(w, bounds[0], bounds[1], spec)


def _search(gram: Tensor, spec: TensorSpec, factors: list[float]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function from blocks [B, E], which lie below each other, to their bounds; `gram` [k, k] is their columns'."""

    def bounds(x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin(1), x.amax(1)
        best = torch.full_like(low, torch.inf)
        chosen = torch.ones_like(low)
        for factor in factors:
            error = _error(x, low * factor, high * factor, spec).reshape(-1, len(gram))
            loss = ((error @ gram) * error).sum(1).reshape(len(x), -1).sum(1)
            chosen = torch.where(loss < best, factor, chosen)
            best = torch.minimum(loss, best)
        return low * chosen, high * chosen

    return bounds


def _error(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """Quantization error [B, E] of the blocks `x` [B, E] with bounds [B], scales as stored."""
    grid = spec.numbers()
    scale = as_stored(scale_from_bounds(low, high, grid, spec.zero), spec.scale_dtype).float()[:, None]
    zero = zero_from_bounds(low[:, None], scale, grid) if spec.zero else None
    return round_to(x, scale, zero, grid).sub_(x)
