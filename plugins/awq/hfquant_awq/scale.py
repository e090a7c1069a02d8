"""The transform "awq": input channels are scaled so that the weights lose least by rounding, and the model stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfquant.blockview import BlockView
from hfquant.errors import SpecError
from hfquant.folds import Fold, apply_folds, find_folds
from hfquant.matrices import Group
from hfquant.ranges import absmax
from hfquant.rounders import to_nearest
from hfquant.spec import TensorSpec
from hfquant.stats import CHANNELS, HESSIAN, Stats

_STATISTICS = 1 << 31  # bytes of Gram matrices that are gathered in one pass
_FLOOR = 1e-4  # added to the weights' part of a scale, so that it stays finite


@dataclass
class Search:
    """The candidates for the scale [C] of one fold, and the output error that each has caused so far.

    The first candidate is no scaling at all.
    """

    fold: Fold
    names: list[str]
    scales: list[Tensor]
    losses: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = [0.0] * len(self.scales)

    def best(self) -> int:
        """Number of the candidate with the smallest loss, the first of equals."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)


def awq(view: BlockView, duo: bool = True, steps: int = 20, rows: int = 512) -> None:
    """Scale input channels by s before rounding, and what makes them by 1/s, with the s of least output error.

    Candidates are x^r and, with `duo`, x^r / w^(1-r) for r = 0, 1/`steps`, ..., 1, where x is a channel's mean
    magnitude over the calibration tokens and w that of its weights relative to their blocks' largest; and no scaling.
    The error is tr(D G D^T), D = Q(W s)/s - W, summed over all weights that read the input: exact for all tokens, as G
    is the sum of x x^T, and measured on at most `rows` rows of each weight, in the recipe's own numbers. Source: Lin et
    al. 2023, "AWQ", equation 4 (the two-sided form is AutoAWQ's). Raises SpecError for options out of range.
    """
    if not all(isinstance(value, int) and value >= 1 for value in (steps, rows)):
        raise SpecError(f"awq needs whole numbers of steps and rows, at least 1, got {steps=}, {rows=}")
    folds = find_folds(view)
    spec = view.recipe.scheme.weight
    groups = [(fold, group) for fold in folds for group in fold.groups if group.targets]
    passes = list(_passes([group for _, group in groups]))
    view.collect(HESSIAN if len(passes) == 1 else CHANNELS)
    searches = {fold: Search(fold, *candidates(fold, spec, duo, steps)) for fold in folds}
    owner = {group: searches[fold] for fold, group in groups}
    for part in passes:
        if len(passes) > 1:
            view.gather(part, frozenset({HESSIAN}))
        for group in part:
            _measure(owner[group], group, spec, rows)
            group.stats = None
    for group in view.groups:
        group.stats = None
    for producer in dict.fromkeys(fold.producer for fold in folds):
        _settle(view, [searches[fold] for fold in folds if fold.producer is producer])


def candidates(fold: Fold, spec: TensorSpec, duo: bool, steps: int) -> tuple[list[str], list[Tensor]]:
    """Names and scales [C] to try for a fold; channels that are always 0 and empty weights have scale 1."""
    seen = [group.stats for group in fold.groups if group.stats is not None]
    tokens = sum(stats.tokens for stats in seen)
    mean = torch.stack([stats.abs_sum for stats in seen]).sum(0) / max(tokens, 1)
    weights = [matrix.values() for group in fold.groups for matrix in group.targets]
    x = fold.by_channel(mean.float().to(weights[0].device), "mean")
    w = fold.by_channel(_weight_size(weights, spec), "mean")
    alive = (x > 0) & (w > 0)
    names, scales = ["none"], [torch.ones_like(x)]
    if not alive.any():
        return names, scales
    for step in range(steps + 1):
        r = step / steps
        plain = _centred(x**r, alive)
        if step:
            names.append(f"x^{r:.3g}")
            scales.append(plain)
        if duo and step < steps:  # with r = 1 it is the plain one
            names.append(f"x^{r:.3g} / w^{1 - r:.3g}")
            scales.append(_centred(x**r / (w ** (1 - r) + _FLOOR), alive))
    return names, scales


def _centred(scale: Tensor, alive: Tensor) -> Tensor:
    """`scale` [C] over the geometric mean of its extremes, 1 where a channel is not `alive`."""
    live = scale[alive]
    middle = (live.max() * live.min()).sqrt()
    return torch.where(alive, scale / middle, 1.0).clamp(_FLOOR, 1 / _FLOOR)


def _weight_size(weights: Sequence[Tensor], spec: TensorSpec) -> Tensor:
    """Mean magnitude of each column [K] over all rows, relative to the largest of the blocks that they are in."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for w in weights:
        (top,) = spec.blocks.reduce(w, lambda x: (x.abs().amax(1),))
        shape = (w.shape[0], w.shape[1])
        total += (w.float().abs() / spec.blocks.expand(top.clamp_min(1e-12), shape)).sum(0)
    return total / sum(len(w) for w in weights)


def _passes(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups whose Gram matrices are gathered in one pass over the data, as far as they fit into memory."""
    part: list[Group] = []
    size = 0
    for group in groups:
        needed = 8 * group.features**2
        if part and size + needed > _STATISTICS:
            yield part
            part, size = [], 0
        part.append(group)
        size += needed
    if part:
        yield part


def _measure(search: Search, group: Group, spec: TensorSpec, rows: int) -> None:
    """Add the error of the weights of one group to the losses of all candidates."""
    assert group.stats is not None and group.stats.gram is not None
    for matrix in group.targets:
        w = _some_rows(matrix.values().float(), spec, rows)
        share = matrix.values().shape[0] / w.shape[0]
        gram = group.stats.gram.float().to(w.device)
        for index, scale in enumerate(search.scales):
            search.losses[index] += share * output_error(w, search.fold.by_column(scale), gram, spec)


def _some_rows(w: Tensor, spec: TensorSpec, rows: int) -> Tensor:
    """At most `rows` rows, evenly spread, if rows are quantized one by one."""
    if spec.blocks.rows != 1 or len(w) <= rows:
        return w.contiguous()
    return w[torch.linspace(0, len(w) - 1, rows, device=w.device).long()]


def output_error(w: Tensor, scale: Tensor, gram: Tensor, spec: TensorSpec) -> float:
    """tr(D G D^T) for D = Q(w s)/s - w: `w` [N, K] float32, `scale` [K], `gram` [K, K]."""
    scaled = w * scale
    error = (quantized(scaled, spec) / scale).sub_(w)
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def quantized(w: Tensor, spec: TensorSpec) -> Tensor:
    """`w` [N, K] rounded to nearest in `spec` without clipping, float32."""
    stats = Stats()
    return to_nearest(w, absmax(w, spec, stats)).dequantize()


def _settle(view: BlockView, searches: Sequence[Search]) -> None:
    """Apply the best candidates of folds with the same producer: one, or one for each expert."""
    chosen = [(search, search.best()) for search in searches]
    name = searches[0].fold.name if len(searches) == 1 else f"{searches[0].fold.producer.name} -> second projections"
    scaled = [(search.fold, search.scales[best]) for search, best in chosen if best]
    if not scaled:
        view.notes.append(f"awq: {name} not scaled, no candidate is better")
        return
    gain = sum(search.losses[best] for search, best in chosen) / sum(search.losses[0] for search in searches)
    how = (
        f"by {searches[0].names[chosen[0][1]]}"
        if len(searches) == 1
        else f"in {len(scaled)} of {len(searches)} experts"
    )
    if apply_folds(view, scaled, "awq"):
        view.notes.append(f"awq: {name} scaled {how}, error {gain:.3f} of the unscaled")
