"""The original weights of a model that was rewritten before it was quantized, rewritten in the same way.

Rotations follow from their seed and are done again. Scales that were searched for with data (AWQ, SmoothQuant, shifts
of FPQ) are read off the quantized model: exactly from norms, which are not quantized, and between two matrices as the
factor that brings the original rows and columns nearest to the quantized ones. Such a factor need not be the very one
that was used: it divides the rows of one matrix and multiplies the columns of the other, so that the rewritten model
computes what the original one does, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..blockview import BlockView, outside_view
from ..calibration_state import OUTSIDE, Batch, head
from ..chain import calls, find_chain, first_call
from ..coverage import survey
from ..data import stand_in
from ..errors import UnsupportedError
from ..experts import QExperts
from ..folds import Fold, apply_folds, find_folds
from ..matrices import Group, Matrix, trace
from ..nn import PackedModule
from ..recipe import Recipe
from ..transforms import TRANSFORMS
from .original import Original

_TURNS = 2  # passes over the scales between matrices: a matrix may have rows of one and columns of another


class Rewritten(Original):
    """An `Original` whose weights went through the recipe's transforms; one block is in memory at a time.

    `batch`: any input of the model, None for random tokens: transforms are checked on it. Weights are read in the order
    of blocks fastest.
    """

    def __init__(
        self, source: str | Path, model: Any, recipe: Recipe, batch: Batch | None = None, revision: str | None = None
    ) -> None:
        super().__init__(source, model, revision)
        self.model, self.recipe = model, recipe
        self.batch = head(stand_in(model.config)[0] if batch is None else batch)
        self.chain = find_chain(self.skeleton)
        targets, _ = survey(self.skeleton, [], False)
        self.targets = [target.name for target in targets]
        self._scales: dict[str, Tensor] = {}  # a second look must not find others: layers may have new codes by then
        self._at: str | None = None
        self._steps = self._blocks()

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The weight [N, K] float32 of the layer `name`, rewritten. Raises UnsupportedError where it cannot be."""
        block = next((b for b in self.chain.names() if name.startswith(f"{b}.")), OUTSIDE)
        if self._at is None or (block != OUTSIDE and self._at != block):
            self._go_to(block)
        return self._loaded(name, shape)

    def _go_to(self, block: str) -> None:
        """Let a block be in the skeleton, from the first one on if it came earlier; any is good for `OUTSIDE`."""
        for _ in range(2):
            for at in self._steps:
                self._at = at
                if block in (at, OUTSIDE):
                    return
            self._steps = self._blocks()

    @torch.no_grad()
    def _blocks(self) -> Iterator[str]:
        """Rewrite what is not in a block, and then each block; it is in the skeleton while it is named."""
        model, chain, names = self.skeleton, self.chain, self.chain.names()

        def of(block: str) -> Any:
            if block == OUTSIDE:
                return lambda parameter: not any(parameter.startswith(f"{name}.") for name in names)
            return lambda parameter: parameter.startswith(f"{block}.")

        self.weights.free(lambda parameter: True)
        self.weights.load(of(OUTSIDE))
        self.weights.load(of(names[0]))
        call, hidden = first_call(model, chain, self.batch)
        tupled = isinstance(call.output(chain.holder[0], hidden), tuple)
        how, probe = calls(model, chain, self.batch, tupled)
        shared: dict[str, Any] = {}
        for step in self.recipe.transforms:
            if (outside := TRANSFORMS.get(step.name).outside) is not None:
                view = outside_view(model, chain, self.batch, tupled)
                view.shared = shared
                outside(view, **step.options)
        yield OUTSIDE
        for index, name in enumerate(names):
            if index:
                self.weights.load(of(name))
            block, run = chain.holder[index], how[index]
            after = run.run(block, probe).clone()
            groups = trace(name, block, self.targets, lambda: run.run(block, probe))  # noqa: B023
            self._rewrite(BlockView(name, block, groups, self.recipe, run, probe, _nothing_seen, shared))
            yield name
            self.weights.free(of(name))
            probe = after

    def _rewrite(self, view: BlockView) -> None:
        """Do again what transforms did to a block: those without data first, as rotations come first."""
        data = [step for step in self.recipe.transforms if TRANSFORMS.get(step.name).needs]
        for step in self.recipe.transforms:
            if step not in data:
                TRANSFORMS.get(step.name)(view, **step.options)
        if not data:
            return
        folds = find_folds(view, norms_only=all(step.options.get("layers") == "norm" for step in data))
        between = [fold for fold in folds if not fold.is_norm]
        for turn, fold in [*((0, fold) for fold in folds if fold.is_norm), *product(range(_TURNS), between)]:
            scale = self._scales.setdefault(f"{fold.name}, {turn}", self._scale(fold))
            if not apply_folds(view, [(fold, scale)], "the scales of the quantized model"):
                raise UnsupportedError(
                    f"{fold.name}: the scales of the quantized model do not leave the original block as it is "
                    f"({view.notes[-1]}): attach the adapter to a model that is quantized without transforms"
                )

    def _scale(self, fold: Fold) -> Tensor:
        """The scale [C] that brings the weights of a fold to those that the model holds; 1 where nothing tells it.

        What is not quantized tells it exactly. Otherwise rows say 1 / s and columns s, both a little too small, as
        quantized weights are shorter than the original ones: their ratio is s squared.
        """
        if fold.is_norm:
            shift = 1.0 if fold.offset else 0.0
            name = f"{fold.producer.name}.weight"
            return _usable(
                (self.skeleton.get_parameter(name) + shift) / (self.model.get_parameter(name).float() + shift)
            )
        assert fold.rows is not None
        w, (held, exact) = fold.rows.values(), self._held(fold.rows.name, fold.rows)
        shrunk = (held * w).sum(1) / w.square().sum(1)
        if exact:
            return _usable(1 / shrunk)
        readers = [(matrix.values(), *self._held(matrix.name, matrix)) for matrix in fold.matrices()]
        exact = any(whole for *_, whole in readers)
        products = [((held * w).sum(0), w.square().sum(0)) for w, held, whole in readers if whole or not exact]
        cross, power = (fold.by_channel(torch.stack(parts).sum(0), "sum") for parts in zip(*products, strict=True))
        return _usable(cross / power if exact else (cross / power / shrunk).sqrt())

    def _held(self, name: str, matrix: Matrix | None = None) -> tuple[Tensor, bool]:
        """What the quantized model has for a layer or a `matrix` [N, K] float32, and whether that is not quantized."""
        owner = name if matrix is None or matrix.expert is None else name.rpartition(".")[0]
        module: Any = self.model.get_submodule(owner)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, PackedModule):
            return module.qtensor().dequantize().cpu(), False
        if isinstance(module, QExperts):
            assert matrix is not None and matrix.expert is not None
            return module.qtensor(matrix.parameter, matrix.expert).dequantize().cpu(), False
        assert matrix is not None
        return replace(matrix, module=module).values().float().cpu(), True


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def _nothing_seen(groups: list[Group], needs: frozenset[str]) -> None:
    raise AssertionError("transforms that read data are not run again")
