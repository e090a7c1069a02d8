"""SmoothQuant: move part of the size of input channels into the weights, so that inputs are easier to quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from .blockview import BlockView
from .errors import SpecError
from .folds import Fold, apply_folds, find_folds
from .stats import CHANNELS
from .transforms import Transform

LAYERS = ("norm", "all")


def smoothquant(view: BlockView, alpha: float = 0.5, layers: str = "norm") -> None:
    """Divide each input channel j by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and multiply the weights by it.

    The maxima are over all calibration tokens, and over the rows of all weights that are going to be quantized and read
    the input. `alpha`: 0 to 1, how much of the difficulty moves into the weights. `layers`: "norm" for inputs that a
    norm makes, as in the paper, "all" for those of attention's output and of gated MLPs' second layer too. Channels
    that are always 0, and those of empty weight columns, are left alone. Raises SpecError for options out of range.
    Source: Xiao et al. 2022, "SmoothQuant", equation 4.
    """
    check_options(alpha, layers)
    folds = find_folds(view, norms_only=layers == "norm")
    view.collect(CHANNELS)
    producers = dict.fromkeys(fold.producer for fold in folds)
    for producer in reversed(producers):  # what comes later first: it divides rows of weights that are looked at here
        scales = [(fold, smoothing(fold, alpha)) for fold in folds if fold.producer is producer]
        if apply_folds(view, scales, "smoothquant"):
            low, high = torch.cat([scale for _, scale in scales]).aminmax()
            view.notes.append(f"smoothquant: {scales[0][0].name}, scales {float(low):.3g} to {float(high):.3g}")


def check_options(alpha: float, layers: str) -> None:
    """Raise SpecError for options out of range."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise SpecError(f"alpha of smoothquant is a number from 0 to 1, got {alpha!r}")
    if layers not in LAYERS:
        raise SpecError(f"layers of smoothquant is one of {', '.join(map(repr, LAYERS))}, got {layers!r}")


def smoothing(fold: Fold, alpha: float) -> Tensor:
    """The scale [C] float32 of each channel of a fold's producer, from the statistics of its groups.

    Computed as (max|X_j| max|W_j|)^alpha / max|W_j|: the product stays the same, bit for bit, when a channel is made
    2^n times as large and its weights as small, so that the smoothed model does too.
    """
    inputs = torch.stack([group.stats.absmax for group in fold.groups if group.stats is not None]).amax(0)
    weights = torch.stack([m.values().abs().amax(0).float() for g in fold.groups for m in g.targets]).amax(0)
    x = fold.by_channel(inputs.to(weights.device), "amax")
    w = fold.by_channel(weights, "amax")
    scale = (x * w) ** alpha / w
    return torch.where((x > 0) & (scale > 0) & scale.isfinite(), scale, 1.0)


BUILTIN = {"smoothquant": Transform(smoothquant, needs=frozenset({CHANNELS}))}
