"""The range "fpq": the format of a weight and the largest value of each of its blocks, searched together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import SpecError
from hfquant.ranges import Params, params_from_bounds
from hfquant.scales import as_stored, round_to, scale_from_bounds
from hfquant.spec import TensorSpec
from hfquant.stats import FISHER, HESSIAN, Stats

from .loss import OutputError
from .space import Space, searches_nothing

LOSSES = ("output", "fisher")
_CACHED = 1 << 18  # weights whose candidates are tried while they stay in cache
_NEAR = 1.02  # times the smallest error by a sketch: formats that are compared exactly
_TALL = 1 << 10  # rows whose exact errors are computed at once: a Gram matrix may not fit into any cache


def fpq(
    w: Tensor,
    spec: TensorSpec,
    stats: Stats,
    search: str = "joint",
    names: list[str] | None = None,
    lowest: float = -3.0,
    highest: float = 0.5,
    steps: int = 32,
    loss: str = "output",
) -> Params:
    """The format of `w` [N, K], and the largest value of each block, with the smallest error of the layer's output.

    `spec.grid` says how many bits there are; the format may be any of that width, or of `names`. Each output channel
    (each block of columns, with groups) has a largest value of its own; the format is the one that is best for all of
    them. `search`, `lowest`, `highest`, `steps`: the candidates, see `Space`. Errors are exact sums over all
    calibration tokens. For more than 1024 input channels candidates are compared by a sketch of these sums, and then
    the best formats exactly, with no clipping in each row. Without tokens, all weights count alike.
    `loss` "fisher": outputs and tokens count by their effect on the model's answer (`fisher.importance`).
    Source: Liu et al. 2023, "LLM-FP4", algorithm 1 and equations 12 and 24.
    """
    if loss not in LOSSES:
        raise SpecError(f"loss is one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    space = Space.of(spec.grid, stats.grid_is_given, names, search, lowest, highest, steps)
    if stats.inputs is not None and stats.inputs.tokens == 0:
        stats.note("no calibration token reached this layer: its ranges weigh all input channels alike")
    error = OutputError(w, stats.inputs, stats.name)
    found = {name: bounds(w, replace(spec, grid=name), error, space) for name in space.names}
    if error.sketch is not None:
        found = verified(found, w, spec, error, space)
    best = min(found, key=lambda name: found[name][1])
    high = found[best][0]
    return params_from_bounds(w, -high, high, replace(spec, grid=best))


def _needs(options: dict[str, Any]) -> frozenset[str]:
    if searches_nothing(options):
        return frozenset()
    return frozenset({HESSIAN, FISHER} if options.get("loss") == "fisher" else {HESSIAN})


vars(fpq)["needs"] = _needs
vars(fpq)["works_without_data"] = True


Found = tuple[Tensor, float]
"""The largest values [R, C] float32 of the blocks of a weight, and the error of the whole."""


def bounds(w: Tensor, spec: TensorSpec, error: OutputError, space: Space) -> Found:
    """What the search finds for `w` on the grid of `spec`."""
    shape = (w.shape[0], w.shape[1])
    width = spec.blocks.sides(shape)[1]
    found = []
    for start in range(0, shape[1], width):
        columns = slice(start, start + width)
        found.append(_stacked(w[:, columns], spec, error.part(columns), space))
    high = torch.stack([part for part, _ in found], dim=1)
    if len(found) == 1:
        return high, float(found[0][1].double().sum())
    return high, float(error.rough(change(w, high, spec)).double().sum())


def verified(
    found: dict[str, Found], w: Tensor, spec: TensorSpec, error: OutputError, space: Space
) -> dict[str, Found]:
    """Exact errors instead of a sketch's, of the formats near the best one and of the one that was given.

    Where no clipping is better than what the sketch suggested, it takes its place.
    """
    near = _NEAR * min(loss for _, loss in found.values())
    kept = {name: high for name, (high, loss) in found.items() if loss <= near or name == spec.grid}
    return {name: _checked(w, high, replace(spec, grid=name), error, space) for name, high in kept.items()}


def _checked(w: Tensor, high: Tensor, spec: TensorSpec, error: OutputError, space: Space) -> Found:
    losses = _exact(w, high, spec, error)
    if space.mode != "joint":
        return high, float(losses.double().sum())
    (whole,) = spec.blocks.reduce(w, lambda block: (block.abs().amax(1),))
    unclipped = _exact(w, whole, spec, error)
    if high.shape[1] > 1:  # the errors of the blocks of a row are not known one by one
        losses, unclipped = losses.sum(0, keepdim=True), unclipped.sum(0, keepdim=True)
    better = (losses < unclipped)[:, None]
    return torch.where(better, high, whole), float(torch.minimum(losses, unclipped).double().sum())


def _exact(w: Tensor, high: Tensor, spec: TensorSpec, error: OutputError) -> Tensor:
    """Exact errors [R] of blocks that lie below each other."""
    height = spec.blocks.sides((w.shape[0], w.shape[1]))[0]
    chunks = _chunks(len(w), height, _TALL)
    step = -(-(chunks[0].stop - chunks[0].start) // height)
    losses = [
        error.rows(rows).exact(change(w[rows], part, spec)) for rows, part in zip(chunks, high.split(step), strict=True)
    ]
    return _per_block(torch.cat(losses), height, "sum")


def _stacked(x: Tensor, spec: TensorSpec, error: OutputError, space: Space) -> tuple[Tensor, Tensor]:
    """The largest values [R] of blocks that lie below each other and are as wide as `x` [N, k], and their errors."""
    height = spec.blocks.sides((x.shape[0], x.shape[1]))[0]
    chunks = _chunks(len(x), height, _CACHED // x.shape[1])
    found = [_search(x[rows].float(), spec, error.rows(rows), space, height) for rows in chunks]
    high, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    return high, loss


def _chunks(rows: int, height: int, most: int) -> list[slice]:
    """Slices of rows that cut no block of `height` rows, of at most `most` rows unless one block has more."""
    step = max(1, most // height) * height
    return [slice(start, start + step) for start in range(0, rows, step)]


def _search(x: Tensor, spec: TensorSpec, error: OutputError, space: Space, height: int) -> tuple[Tensor, Tensor]:
    """The same for some of the blocks."""
    peak = _per_block(x.abs().amax(1), height, "amax")
    used = peak.masked_fill(peak == 0, 1)
    best, at = torch.full_like(used, torch.inf), torch.zeros_like(used)

    def attempt(exponent: Tensor) -> None:
        nonlocal best, at
        loss = _per_block(error.rough(_change(x, used * exponent.exp2(), spec, height)), height, "sum")
        at = torch.where(loss < best, exponent, at)
        best = torch.minimum(loss, best)

    for exponent in space.exponents(used, spec.grid):
        attempt(exponent)
    for half in space.finer():
        for exponent in (at - half, at + half):
            attempt(exponent)
    return (used * at.exp2()).masked_fill(peak == 0, 0), best


def change(w: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """W' - W [N, K] float32 for the largest values [R, C] of its blocks, with scales as they will be stored."""
    shape = (w.shape[0], w.shape[1])
    height, width = spec.blocks.sides(shape)
    parts = [
        _change(w[:, start : start + width].float(), high[:, index], spec, height)
        for index, start in enumerate(range(0, shape[1], width))
    ]
    return torch.cat(parts, dim=1)


def _change(x: Tensor, high: Tensor, spec: TensorSpec, height: int) -> Tensor:
    grid = spec.numbers()
    scale = as_stored(scale_from_bounds(-high, high, grid, False), spec.scale_dtype).float()
    rows = scale.repeat_interleave(height)[: len(x), None]
    return round_to(x, rows, None, grid).sub_(x)


def _per_block(rows: Tensor, height: int, how: str) -> Tensor:
    """Join the values [N] of the rows of each block of `height` rows: [R]."""
    if height == 1:
        return rows
    index = torch.arange(len(rows), device=rows.device) // height
    return rows.new_zeros(int(index[-1]) + 1).scatter_reduce_(0, index, rows, how)
