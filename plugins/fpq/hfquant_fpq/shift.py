"""The transform "fpq_shift": input channels times powers of two, so that one exponent bias fits all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfquant import processes
from hfquant.blockview import BlockView
from hfquant.errors import SpecError
from hfquant.folds import Fold, apply_folds, find_folds
from hfquant.input_ranges import SeenInput
from hfquant.matrices import Group
from hfquant.ranges import absmax
from hfquant.rounders import to_nearest
from hfquant.stats import CHANNELS, Stats

from .inputs import find
from .space import Space, float_grid, formats

_COARSE = 2  # candidates per octave while shifts are compared


def fpq_shift(view: BlockView, layers: str = "all") -> None:
    """Multiply each input channel j by 2^b_j, and the weights that read it by 2^-b_j: exact, whatever the format.

    b_j is the whole number nearest to log2(max_i max|X_i| / max|X_j|), at most 2^E - 1 for E exponent bits, so that a
    small channel uses the same exponents as the largest one. The maxima are over all calibration tokens. E is that of
    one of the formats that are searched, or 0 for no shift: whichever has the smallest error at the outputs of the
    layers that read the input, with their weights rounded to nearest, over the sample of tokens that is kept.
    `layers`: "all", or "norm" for inputs that a norm makes. Raises SpecError for a recipe without quantized inputs.
    Source: Liu et al. 2023, "LLM-FP4", section 4.2, where shifts belong to the exponent biases of the input's grid.
    """
    if layers not in ("all", "norm"):
        raise SpecError(f"layers of fpq_shift is 'all' or 'norm', got {layers!r}")
    if view.recipe.scheme.input is None:
        raise SpecError("fpq_shift makes inputs easier to quantize, and this recipe leaves them as they are")
    folds = find_folds(view, norms_only=layers == "norm")
    view.collect(CHANNELS)
    for producer in reversed(dict.fromkeys(fold.producer for fold in folds)):
        mine = [fold for fold in folds if fold.producer is producer]
        shifts = [shift(fold) for fold in mine]
        most = best_limit(view, mine, shifts)
        scales = [(fold, bounded(shift, most)) for fold, shift in zip(mine, shifts, strict=True)]
        if most and apply_folds(view, scales, "fpq_shift"):
            used = int(max(shift.max() for shift in shifts).clamp_max(most))
            view.notes.append(f"fpq_shift: {mine[0].name}, by up to 2^{used}")


def shift(fold: Fold) -> Tensor:
    """The unbounded shift b [C] float32 of each channel of a fold's producer; 0 for channels that are always 0."""
    inputs = torch.stack([group.stats.absmax for group in fold.groups if group.stats is not None]).amax(0)
    peak = fold.by_channel(inputs, "amax")
    wanted = (peak.max() / peak).log2().round()
    return torch.where(peak > 0, wanted, 0.0)


def bounded(shift: Tensor, most: int) -> Tensor:
    """What a fold divides its channels by: 2^-b [C]."""
    return shift.clamp(0, most).neg().exp2()


def best_limit(view: BlockView, folds: Sequence[Fold], shifts: Sequence[Tensor]) -> int:
    """The largest shift 2^E - 1, of all formats that are searched, with the smallest error; 0 if none is best."""
    given: Any = view.recipe.scheme.input
    space = Space(formats(float_grid(given.tensor.grid).bits), steps=_COARSE)
    wanted, losses = max(float(shift.max()) for shift in shifts), dict[int, float]()
    for most in (0, *(2 ** float_grid(name).e - 1 for name in space.names)):
        losses[most] = _loss(view, folds, [shift.clamp(0, most) for shift in shifts], space)
        if most >= wanted:  # larger limits are none
            break
    best = min(losses, key=lambda most: (losses[most], most))
    return int(processes.of_first(best))  # every process rewrites its own copy of the model, and all alike


def _loss(view: BlockView, folds: Sequence[Fold], shifts: Sequence[Tensor], space: Space) -> float:
    """Error of the outputs of all layers that read what is shifted."""
    given: Any = view.recipe.scheme.input
    total = 0.0
    for fold, chosen in zip(folds, shifts, strict=True):
        factor = fold.by_column(chosen.exp2())
        for group in fold.groups:
            if group.targets and group.stats is not None and len(group.stats.sample):
                total += find(_shifted(view, group, factor), given, space)[1]
    return total


def _shifted(view: BlockView, group: Group, factor: Tensor) -> SeenInput:
    """The input of a group whose columns are `factor` [K] times as large, and the weights that read it."""
    assert group.stats is not None
    spec = view.recipe.scheme.weight
    weights = tuple(matrix.values().float() / factor.to(matrix.values().device) for matrix in group.targets)
    rounded = tuple(to_nearest(w, absmax(w, spec, Stats())).dequantize() for w in weights)
    stats = group.stats
    peak = float((stats.absmax * factor.to(stats.absmax)).max())
    sample, counts = stats.sample * factor.to(stats.sample), stats.importance(m.name for m in group.targets)
    return SeenInput(group.name, None, sample, peak, weights, rounded, importance=counts)
