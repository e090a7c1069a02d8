"""Ranges: which part of the number line each block's grid covers.

A range picks bounds (low, high) for each block; scale and zero point follow from them in the form in which they will
be stored, so that codes are right for what is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .blocks import row_chunks
from .codebooks import FittedGrid
from .errors import SpecError
from .grids import Grid
from .qtensor import QTensor
from .scales import as_stored, one_for_zero, round_to, scale_from_bounds, store_scales, zero_from_bounds
from .spec import TensorSpec
from .stats import Stats
from .tables import Table

_HISTOGRAM_BINS = 2048
_KL_LEVELS = 128


@dataclass(frozen=True)
class Params:
    """Grid parameters of a matrix: the grid in use, `scale` [R, C] float32 with the values as stored, its stored form,
    and `zero` [R, C] float32 or None.
    """

    spec: TensorSpec
    grid: Grid
    scale: Tensor
    stored: Tensor | QTensor
    zero: Tensor | None

    def stored_zero(self) -> Tensor | None:
        """Zero points in the dtype that they are stored in."""
        return None if self.zero is None else self.zero.to(self.spec.zero_dtype)


class Range(Protocol):
    """Finds the grid parameters of a weight [N, K].

    One that reads statistics is replaced by "absmax" where there are none, as for an embedding, unless it is marked
    with `works_without_data`.
    """

    def __call__(self, w: Tensor, spec: TensorSpec, stats: Stats, /, **options: Any) -> Params:
        """`stats` is what is known about the layer; `options` come from the recipe."""


RANGES: Table[Range] = Table("range")


def params_from_bounds(w: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Params:
    """Grid parameters for bounds [R, C] of each block of `w` [N, K]; fits the grid to `w` if it is a fitted one."""
    grid = spec.numbers()
    fitted = isinstance(grid, FittedGrid)
    scale = torch.maximum(high, -low) if fitted else scale_from_bounds(low, high, grid, spec.zero)
    # All-zero blocks have any scale. Where scales are quantized, a 1 would dwarf the others and round them away.
    nested = not isinstance(spec.scale, str)
    scale = scale.masked_fill((low == 0) & (high == 0), 0) if nested else one_for_zero(scale)
    stored = store_scales(scale, spec.scale)
    values = stored.dequantize().reshape(scale.shape) if isinstance(stored, QTensor) else stored.float()
    if isinstance(grid, FittedGrid):
        shape = (w.shape[0], w.shape[1])
        parts = [w[rows].float() / spec.blocks.expand(values, shape, rows) for rows in row_chunks(shape)]
        grid = grid.fit(torch.cat(parts))
    zero = zero_from_bounds(low, values, grid, whole=spec.zero is True) if spec.zero else None
    return Params(spec, grid, values, stored, zero)


def absmax(w: Tensor, spec: TensorSpec, stats: Stats) -> Params:
    """The whole range of each block: no clipping."""
    low, high = spec.blocks.reduce(w, lambda x: (x.amin(1), x.amax(1)))
    return params_from_bounds(w, low, high, spec)


def percentile(w: Tensor, spec: TensorSpec, stats: Stats, percentile: float = 99.9) -> Params:
    """Clip each block at a percentile (0 to 100) of its magnitudes, or of its two tails when asymmetric."""
    if not 50 < percentile <= 100:
        raise SpecError(f"percentile is above 50 and at most 100, got {percentile}")
    share = percentile / 100

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        if spec.zero:
            ordered = x.sort(dim=1).values
            return _quantile(ordered, 1 - share), _quantile(ordered, share)
        high = _quantile(x.abs().sort(dim=1).values, share)
        return -high, high

    low, high = spec.blocks.reduce(w, bounds)
    return params_from_bounds(w, low, high, spec)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile [B] of the rows of sorted `ordered` [B, E], interpolated linearly."""
    where = share * (ordered.shape[1] - 1)
    low = int(where)
    high = min(low + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], where - low)


def mse(w: Tensor, spec: TensorSpec, stats: Stats, norm: float = 2.0, steps: int = 80, shrink: float = 0.8) -> Params:
    """Shrink each block's range by the factor that gives the smallest sum of |error|^norm.

    Candidates are `steps` factors from 1 down to 1 - `shrink`, measured with scales as stored (in float32 where scales
    are quantized themselves). Source: GPTQ's `find_params` (with norm 2.4); the unclipped range is always among the
    candidates, so absmax is never better.
    """
    if not isinstance(steps, int) or steps < 2 or not 0 < shrink < 1 or not norm > 0:
        found = f"steps={steps}, shrink={shrink}, norm={norm}"
        raise SpecError(f"mse needs a whole number of steps >= 2, 0 < shrink < 1 and norm > 0, got {found}")
    grid = spec.numbers()
    if isinstance(grid, FittedGrid):
        raise SpecError(f"range 'mse' cannot search a grid that is fitted to the data ({grid.name}): use 'absmax'")
    factors = torch.linspace(1, 1 - shrink, steps).tolist()

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.amin(1), x.amax(1)
        best = torch.full_like(low, torch.inf)
        factor = torch.ones_like(low)
        for candidate in factors:
            loss = clipping_error(x, low * candidate, high * candidate, spec).pow_(norm).sum(1)
            factor = torch.where(loss < best, candidate, factor)
            best = torch.minimum(loss, best)
        return low * factor, high * factor

    low, high = spec.blocks.reduce(w, bounds)
    return params_from_bounds(w, low, high, spec)


def clipping_error(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """Magnitude of the quantization error [B, E] of the blocks `x` [B, E] with bounds [B], scales as stored."""
    grid = spec.numbers()
    scale = as_stored(scale_from_bounds(low, high, grid, spec.zero), spec.scale_dtype).float()[:, None]
    zero = zero_from_bounds(low[:, None], scale, grid) if spec.zero else None
    return round_to(x, scale, zero, grid).sub_(x).abs_()


def kl(w: Tensor, spec: TensorSpec, stats: Stats) -> Params:
    """Clip each block where the histogram of its magnitudes loses least information (TensorRT's entropy calibration).

    Needs blocks of at least 2048 values, that is whole channels or tensors. Symmetric grids only.
    """
    if spec.zero:
        raise SpecError("range 'kl' works on magnitudes: use a symmetric grid")

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] < _HISTOGRAM_BINS:
            raise SpecError(
                f"range 'kl' needs blocks of at least {_HISTOGRAM_BINS} values, found {x.shape[1]} in {stats.name}: "
                "use whole tensors, or range 'mse' or 'percentile'"
            )
        high = torch.stack([_kl_of_block(row) for row in x])
        return -high, high

    low, high = spec.blocks.reduce(w, bounds)
    return params_from_bounds(w, low, high, spec)


def _kl_of_block(x: Tensor) -> Tensor:
    """Clipping threshold (float32 scalar) of the values `x` [E]."""
    top = x.abs().max()
    if top == 0:
        return top
    # In parts, because float32 counts stop growing at 2^24.
    parts = (torch.histc(part, bins=_HISTOGRAM_BINS, min=0.0, max=float(top)) for part in x.abs().split(1 << 22))
    counts = torch.stack([part.double() for part in parts]).sum(0)
    return top * kl_threshold(counts.cpu().numpy()) / _HISTOGRAM_BINS


def kl_threshold(counts: np.ndarray, levels: int = _KL_LEVELS) -> float:
    """Bin edge at which to clip a histogram `counts` [bins] of magnitudes, in bins.

    For each candidate i, P is the first i bins with the clipped tail added to the last one, Q the same bins merged
    into `levels` and spread again over the bins where P is not 0; the candidate with the smallest KL(P || Q) wins. The
    tail's mass enters P but not Q, and bin 0 is dropped because zeros would dominate it. Source: TensorRT's entropy
    calibrator.
    """
    counts = counts.copy()
    counts[0] = 0
    candidates = range(levels, len(counts) + 1)
    losses = [_merge_divergence(counts, i, levels) for i in candidates]
    return float(candidates[int(np.argmin(losses))])


def _merge_divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) in nats for clipping after `kept` bins."""
    inside = counts[:kept]
    reference = inside.copy()
    reference[-1] += counts[kept:].sum()
    if inside.sum() == 0:
        return np.inf
    level = np.arange(kept) * levels // kept
    filled = reference > 0
    mass = np.bincount(level, inside, levels)
    share = mass / np.maximum(np.bincount(level, filled, levels), 1)
    merged = np.where(filled, share[level], 0.0)
    p, q = reference / reference.sum(), merged / merged.sum()
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum())


BUILTIN: dict[str, Callable[..., Params]] = {"absmax": absmax, "percentile": percentile, "mse": mse, "kl": kl}
