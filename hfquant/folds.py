"""Folds: scale the input columns of weights, and undo it where the input is made, so that the model stays the same.

Found by probing (`probing.py`) and verified by running the block, so no architecture is named anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blockview import TOLERANCE, BlockView
from .matrices import Group, Matrix
from .probing import UNTOUCHED, Probing, Producer, is_inner

_BY_DESIGN = "no norm makes them"


@dataclass(frozen=True, eq=False)
class Fold:
    """A way to scale the input of `groups`, which all read one tensor: divide channels of `producer`, multiply columns.

    `columns` [K] int64: the channel of the producer that makes each column, -1 for columns that stay as they are.
    Several columns may share a channel (grouped-query attention). `rows`: the matrix whose rows are the channels, None
    for a norm. `offset`: the norm's gain is 1 + weight.
    """

    producer: Producer
    columns: Tensor
    groups: tuple[Group, ...]
    rows: Matrix | None = None
    offset: bool = False

    @property
    def name(self) -> str:
        """What scales what, for notes."""
        made_by = self.producer.name if self.rows is None else self.rows.name
        return f"{made_by} -> {', '.join(m.name.rpartition('.')[2] for g in self.groups[:2] for m in g.matrices)}"

    @property
    def is_norm(self) -> bool:
        """Whether the producer is a norm."""
        return self.rows is None

    def matrices(self) -> list[Matrix]:
        """All weights that read the input, those that are not going to be quantized included."""
        return [matrix for group in self.groups for matrix in group.matrices]

    def by_channel(self, values: Tensor, how: str) -> Tensor:
        """One value for each channel of the producer, [C] float32, from one for each column, `values` [K].

        `how`: "amax" or "mean" over the columns that share a channel; 0 for channels without a column.
        """
        mapped = self.columns != UNTOUCHED
        index, chosen = self.columns[mapped].to(values.device), values[mapped.to(values.device)].float()
        out = torch.zeros(self.producer.size, device=values.device)
        return out.scatter_reduce(0, index, chosen, how, include_self=False)

    def by_column(self, scale: Tensor) -> Tensor:
        """The factor of each column [K] for a scale of each channel [C]; 1 where the column stays as it is."""
        index = self.columns.to(scale.device)
        return torch.where(index == UNTOUCHED, 1.0, scale[index.clamp_min(0)])

    def tensors(self) -> list[Tensor]:
        """Everything that `rescale` changes, itself."""
        return [*self._made(), *(matrix.values() for matrix in self.matrices())]

    def rescale(self, scale: Tensor) -> None:
        """Divide the producer's channels by `scale` [C], positive, and multiply the readers' columns; in place.

        A channel that makes no column stays as it is, whatever its scale.
        """
        used = torch.zeros(self.producer.size, dtype=torch.bool)
        used[self.columns[self.columns != UNTOUCHED]] = True
        divisor = scale.where(used.to(scale.device), 1)
        for index, tensor in enumerate(self._made()):
            shift = 1 if self.offset and index == 0 else 0
            per_channel = divisor.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1))
            tensor.add_(shift).div_(per_channel).sub_(shift)
        by_column = self.by_column(scale)
        for matrix in self.matrices():
            matrix.values().mul_(by_column.to(matrix.values()))

    def _made(self) -> list[Tensor]:
        """Weight and bias of the producer: [C] or [C, K]."""
        if self.rows is not None:
            bias = self.rows.bias()
            return [self.rows.values()] if bias is None else [self.rows.values(), bias]
        own = (self.producer.module._parameters.get(name) for name in ("weight", "bias"))
        return [parameter.data for parameter in own if parameter is not None]


@torch.no_grad()
def find_folds(view: BlockView, norms_only: bool = False) -> list[Fold]:
    """All ways to scale inputs inside a block, in the order of calls; a note says why an input has none.

    Only inputs of weights that are going to be quantized, in the basis that they have in the model. Experts have a fold
    each for their second projections. `norms_only`: those that a norm makes, without a note on others that something
    else makes. What is found has been tried: with powers of two as scales the block computed the same.
    """
    probing = Probing(view)
    found: list[Fold] = []
    banks: set[int] = set()
    for leader in probing.leaders:
        group = tuple(view.readers(leader))
        module = id(leader.matrices[0].module)
        if is_inner(leader):
            if module in banks:
                continue
            banks.add(module)
            group = tuple(g for g in view.groups if is_inner(g) and id(g.matrices[0].module) == module)
        if any(g.targets for g in group):
            outcome = _fold(view, probing, leader, group, norms_only)
            if outcome == _BY_DESIGN:
                continue
            if isinstance(outcome, str):
                view.notes.append(f"{leader.name.rpartition('[')[0] or leader.name}: inputs not scaled, {outcome}")
            else:
                found.extend(outcome)
    return found


def _fold(
    view: BlockView, probing: Probing, leader: Group, groups: tuple[Group, ...], norms_only: bool
) -> list[Fold] | str:
    """The folds of groups that read one tensor (or of all experts' second projections), or why there are none."""
    if any(group.rotated for group in groups):
        return "its weights are quantized in another basis"
    if is_inner(leader):  # all experts are alike: what holds for the one with the most tokens holds for all
        seen = [group for group in groups if group in probing.inputs]
        if not seen:
            return "no expert is reached by the probe"
        leader = max(seen, key=lambda group: len(probing.inputs[group]))
    if leader not in probing.inputs:
        return "the block did not read it"
    producers = [producer for producer in probing.producers(leader) if not (norms_only and producer.matrices)]
    reason = ""
    for producer in producers:
        columns = probing.columns(producer, leader)
        if columns is None:
            continue
        for folds in _forms(producer, columns, groups):
            moved = _tried(view, folds)
            if moved <= TOLERANCE:
                return folds
        reason = f"{producer.name} feeds something else too: scaling it moves the block's output by {moved:.1g}"
    if reason:
        return reason
    if not producers:
        return "no norm before them in the block" if norms_only else "nothing in the block makes them"
    names = ", ".join(producer.name.rpartition(".")[2] for producer in producers)
    return _BY_DESIGN if norms_only else f"they are not proportional to what {names} gives"


def _forms(producer: Producer, columns: Tensor, groups: tuple[Group, ...]) -> list[list[Fold]]:
    """The ways in which the parameters of a producer may scale its channels, the likeliest first."""
    if not producer.matrices:
        return [[Fold(producer, columns, groups, offset=offset)] for offset in (False, True)]
    if not producer.is_bank:
        return [[Fold(producer, columns, groups, producer.matrices[0])]]
    own = {matrix.expert: matrix for matrix in producer.matrices}
    return [[Fold(producer, columns, (group,), own[group.matrices[0].expert]) for group in groups]]


def _tried(view: BlockView, folds: Sequence[Fold]) -> float:
    """Relative change of the block's output when folds scale by powers of two; they are taken back."""
    generator = torch.Generator().manual_seed(0)
    tensors = [tensor for fold in folds for tensor in fold.tensors()]
    before = [tensor.clone() for tensor in tensors]
    try:
        for fold in folds:
            scale = torch.exp2(torch.randint(-2, 3, (fold.producer.size,), generator=generator).float())
            fold.rescale(scale.to(view.probe.device))
        return view.moved()
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)


@torch.no_grad()
def apply_folds(view: BlockView, scales: Sequence[tuple[Fold, Tensor]], what: str) -> bool:
    """Scale by each fold and its `scale` [C]; all are taken back, and noted, if the block's output moves.

    `what`: the transform, for notes. Returns whether they were kept. Raises ValueError for scales that are not positive
    and finite.
    """
    for fold, scale in scales:
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{what}: scales of {fold.name} must be positive and finite")
    tensors = [tensor for fold, _ in scales for tensor in fold.tensors()]
    with view.attempt(what, tensors) as trial:
        for fold, scale in scales:
            fold.rescale(scale)
    if not trial.held:
        view.notes.append(f"{what}: {scales[0][0].name} taken back, the block's output moved by {trial.error:.1g}")
    return trial.held
