"""Calibrated quantization of a model, block by block: statistics, transforms, ranges, codes, then on with what the
quantized block makes of its inputs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import processes
from .attention import use
from .blockquantizer import BlockQuantizer, OutsideQuantizer
from .blockview import BlockView, in_float32, outside_view
from .calibration_state import OUTSIDE, Batch, InMemory, Settings, State, Store, Tick, head, mask_of, share
from .chain import Call, calls, find_chain, first_call, no_cache, stubs
from .config import HfQuantConfig
from .coverage import Target
from .errors import SpecError, UnsupportedError
from .findings import BlockFinding, LayerFinding
from .fisher import importance
from .hidden import HiddenStates
from .layer import quantize_matrix
from .matrices import Matrix
from .quantize import for_table, needs
from .recipe import Recipe
from .stats import DRIFT, FISHER
from .swap import swap_out
from .transforms import TRANSFORMS


class Calibration:
    """One run over a model. `run` quantizes `targets` in place and returns what it found, block by block."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[Target],
        config: HfQuantConfig,
        batches: Sequence[Batch],
        store: Store | None = None,
        settings: Settings | None = None,
        tick: Tick | None = None,
    ) -> None:
        folder = settings.offload if settings is not None else None
        self.first = head(batches[0])  # the same for all processes, which must not decide differently
        self.state = State(
            model,
            config,
            find_chain(model),
            {target.name: target for target in targets},
            share(batches, config.data.data is None),
            settings or Settings(),
            HiddenStates(folder / "original" if folder else None),
            HiddenStates(folder / "quantized" if folder else None),
            HiddenStates(folder / "kept" if folder else None),
        )
        if config.recipe.attention is not None:
            use(model)
        self.store: Store = store or InMemory()
        self.tick = tick or (lambda what, share: None)
        _check(config.recipe, targets)

    @torch.no_grad()
    def run(self) -> list[BlockFinding]:
        """Quantize everything."""
        modes = {name: module.training for name, module in self.state.model.named_modules()}
        self.state.model.eval()
        try:
            with no_cache(self.state.model):
                return list(self._run())
        finally:
            for name, module in self.state.model.named_modules():  # packed ones have the names of the original ones
                module.training = modes.get(name, False)  # operands of attention are new
            self.state.original.clear()
            self.state.quantized.clear()
            self.state.kept.clear()

    def _run(self) -> Iterator[BlockFinding]:
        names = self.state.chain.names()
        self.store.load(OUTSIDE)
        self._start(names[0])
        if not self.store.keeps:
            self.store.free(OUTSIDE)
        for index, name in enumerate(names):
            self._progress(name, index, 0.0)
            yield self._block(index, name)
        yield self._outside()

    def _progress(self, what: str, index: int, part: float) -> None:
        self.tick(what, (index + part) / (len(self.state.chain.holder) + 1))

    # The way into the first block.

    def _start(self, first: str) -> None:
        """Note how every block is called for every batch, and the hidden states that enter the first one."""
        state = self.state
        self.store.load(first)
        probe = self.first
        call, hidden = first_call(self.state.model, self.state.chain, probe)
        self.state.tupled = isinstance(call.output(self.state.chain.holder[0], hidden), tuple)
        for number, batch in enumerate(self.state.batches):
            found, state.quantized[number] = calls(state.model, state.chain, batch, state.tupled)
            state.calls.append(found)
            if number in state.followed:
                state.original[number] = state.quantized[number]
        self.probe_calls, self.probe = calls(self.state.model, self.state.chain, probe, self.state.tupled)
        self.state.masks = [mask_of(batch) for batch in self.state.batches]
        if FISHER in state.needs:
            weighed = [target.name for target in state.targets.values() if target.kind != "embedding"]
            state.importance = importance(state.model, state.batches, weighed, state.masks)
        self._transform_outside()  # only now: the original hidden states are the original model's
        if state.recipe.transforms:  # they may have changed the embeddings
            for number, batch in enumerate(state.batches):
                state.quantized[number] = calls(state.model, state.chain, batch, state.tupled)[1]

    def _transform_outside(self) -> None:
        self.outside_notes.clear()
        for step in self.state.recipe.transforms:
            outside = TRANSFORMS.get(step.name).outside
            if outside is not None:
                view = outside_view(self.state.model, self.state.chain, self.first, self.state.tupled)
                view.shared = self.state.shared
                outside(view, **step.options)
                self.outside_notes.extend(view.notes)
                if self.state.config.skipped is not None:  # or the checkpoint would promise them quantized
                    self.state.config.skipped |= dict.fromkeys(view.untied, "tied weights")

    @property
    def outside_notes(self) -> list[str]:
        """Remarks of transforms about what is not in a block."""
        return self.state.shared.setdefault("outside notes", [])

    # One block.

    def _block(self, index: int, name: str) -> BlockFinding:
        started = time.perf_counter()
        self.store.load(name)
        block = self.state.chain.holder[index]
        before = HiddenStates(_sibling(self.state.settings.offload)) if DRIFT in self.state.needs else None
        for number in self.state.followed:
            if before is not None:
                before[number] = self.state.original[number]
            self.state.original[number] = self.state.calls[number][index].run(block, self.state.original[number])
        probe = self._probe_after(index, block)
        finding = self.store.finished(name)
        if finding is None:
            finding = self._quantize_block(index, name, block, before)
            finding.seconds = time.perf_counter() - started
            self.store.finish(name, finding)
        else:
            self._replay(index, block)
        if before is not None:
            before.clear()
        self.probe = probe
        self.store.free(name)
        return finding

    def _quantize_block(self, index: int, name: str, block: nn.Module, before: HiddenStates | None) -> BlockFinding:
        work = BlockQuantizer(self.state, index, name, block)
        notes = self._transform(work)
        if before is not None:
            work.follow_original(before, self.state.shared.get("basis"))
        layers = work.quantize(lambda part: self._progress(name, index, part))
        if self.state.runs_packed:
            work.place()
        error = self._advance(work.forward)
        if not self.state.runs_packed:
            work.place()
        return BlockFinding(name, error, 0.0, layers, notes + work.notes)

    def _replay(self, index: int, block: nn.Module) -> None:
        """Go past a block that an earlier run finished, bit for bit as that run did."""
        if not self.state.runs_packed:
            block = copy.deepcopy(block)
            swap_out(block)
        self._advance(lambda number: self.state.calls[number][index].run(block, self.state.quantized[number]))

    def _transform(self, work: BlockQuantizer) -> list[str]:
        """Apply the recipe's transforms to a block, in float32."""
        if not self.state.recipe.transforms:
            return []
        call = self.probe_calls[work.index].to(torch.float32)
        with work.in_float32():
            recipe, shared = self.state.recipe, self.state.shared
            probe = self.probe.float()
            view = BlockView(work.name, work.block, work.groups, recipe, call, probe, work.gather, shared)
            for step in self.state.recipe.transforms:
                TRANSFORMS.get(step.name)(view, **step.options)
        return view.notes

    def _probe_after(self, index: int, block: nn.Module) -> Tensor:
        """What the original block, in float32, makes of the probe, which only transforms look at."""
        if not self.state.recipe.transforms:
            return self.probe
        with in_float32(block):
            return self.probe_calls[index].to(torch.float32).run(block, self.probe.float()).clone()

    def _advance(self, forward: Callable[[int], Tensor]) -> float:
        """Replace the quantized model's hidden states by those after a block; their distance from the original's."""
        error = power = 0.0
        basis = self.state.shared.get("basis")
        for number in range(len(self.state.batches)):
            self.state.quantized[number] = out = forward(number)
            if number not in self.state.followed:
                continue
            exact, seen = self.state.original[number].float(), out.float()
            seen = seen if basis is None else (seen @ basis.T.to(seen))
            keep = self.state.masks[number]
            difference, exact = (seen - exact, exact) if keep is None else ((seen - exact)[keep], exact[keep])
            error += float(difference.square().sum())
            power += float(exact.square().sum())
        return (processes.total(error) / max(processes.total(power), 1e-30)) ** 0.5

    # What is not in a block: an output layer that is quantized too, a pooler.

    def _outside(self) -> BlockFinding:
        started = time.perf_counter()
        finding = self.store.finished(OUTSIDE)
        if finding is None:
            if not self.store.keeps:
                self.store.load(OUTSIDE)
                self._transform_outside()
            finding = self._quantize_outside(started)
            self.store.finish(OUTSIDE, finding)
        self.store.free(OUTSIDE)
        return finding

    def _quantize_outside(self, started: float) -> BlockFinding:
        last = len(self.state.chain.holder) - 1
        running: list[int] = [0]

        def answer(index: int, call: Call, hidden: Tensor) -> Any:
            out = self.state.quantized[running[0]] if index == last else hidden
            return (out,) if self.state.tupled else out

        layers: list[LayerFinding] = []
        rest = [target for target in self.state.targets.values() if not self.state.is_inside(target.name)]
        with stubs(self.state.chain, answer):
            if any(target.kind != "embedding" for target in rest):
                work = OutsideQuantizer(self.state, running)
                layers = work.quantize(lambda part: self._progress("the rest", last + 1, part))
                work.place()
        layers += self._quantize_embeddings([target for target in rest if target.kind == "embedding"])
        return BlockFinding(OUTSIDE, None, time.perf_counter() - started, layers, list(self.outside_notes))

    def _quantize_embeddings(self, targets: list[Target]) -> list[LayerFinding]:
        """Tables are looked up, not multiplied: nothing is known about their inputs, they are rounded to nearest."""
        found = []
        for target in targets:
            matrix = Matrix(target.name, self.state.model.get_submodule(target.name), "weight", True)
            made = quantize_matrix(matrix, for_table(self.state.recipe), None, min_tokens=-1)
            self.state.swap(target.name, {"weight": [made]})
            found.append(made.finding)
        return found


def _check(recipe: Recipe, targets: Sequence[Target]) -> None:
    """Refuse what calibration cannot do."""
    if FISHER in needs(recipe):
        _check_fisher(recipe, targets)
    if any(TRANSFORMS.get(step.name).outside for step in recipe.transforms[1:]):
        names = ", ".join(step.name for step in recipe.transforms)
        raise SpecError(f"a transform of the whole model (a rotation) comes first, got {names}")
    if recipe.attention is not None and processes.world() > 1:
        raise UnsupportedError("the operands of attention are calibrated in one process: start only one")
    if recipe.columns.name != "none" and any(target.kind == "experts" for target in targets):
        raise UnsupportedError("16-bit columns of fused experts are not calibrated: leave the columns step out")


def _check_fisher(recipe: Recipe, targets: Sequence[Target]) -> None:
    """Refuse what a pass back through the whole model cannot tell."""
    if processes.world() > 1:
        raise UnsupportedError('loss="fisher" is calibrated in one process: start only one')
    if any(target.kind == "experts" for target in targets):
        raise UnsupportedError('loss="fisher" is not defined for fused experts: use loss="output"')
    if any(TRANSFORMS.get(step.name).outside for step in recipe.transforms):
        raise SpecError('loss="fisher" knows outputs in their own basis, a rotation changes it: use loss="output"')


def _sibling(folder: Path | None) -> Path | None:
    return None if folder is None else folder / "before"
