"""The quantization of one block: statistics, codes, and packed modules, one group of its layers after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .blockview import in_float32
from .calibration_state import OUTSIDE, State
from .errors import UnsupportedError
from .findings import LayerFinding
from .hidden import HiddenStates
from .input_ranges import INPUT_RANGES, InputChoice, rounds_of
from .layer import Pieces, find_inputs, quantize_matrix, with_inputs
from .matrices import Enough, Group, Matrix, find_matrices, trace, watch
from .products import NO_PRODUCT, find_products, quantize_products
from .ranges import RANGES
from .reference import quantize_input
from .settled import Settled, find_ends
from .stages import lend_histograms, stages
from .stats import CHANNELS, DRIFT, FISHER, HESSIAN, HISTOGRAM, InputStats, needs_of


class BlockQuantizer:
    """The quantization of one block."""

    def __init__(self, run: State, index: int, name: str, block: nn.Module) -> None:
        self.run, self.index, self.name, self.block = run, index, name, block
        self.wide = False
        self.settled: Settled | None = None
        with find_ends(block) as self.ends:
            self.groups = trace(name, block, run.targets, lambda: self.forward(0))
        inside = run.recipe.attention is not None and index >= 0
        self.products = find_products(name, block, self.groups, lambda: self.forward(0)) if inside else []
        self.notes: list[str] = [NO_PRODUCT] if inside and not self.products else []
        self.twin: Twin | None = None
        self.closing: dict[str, list[Callable[[], None]]] = {}
        self.done: set[str] = set()  # names of modules
        self.pieces: dict[str, dict[str, list[Pieces]]] = {}

    def forward(self, number: int, keep: bool = False) -> Any:
        """Run the block on a batch of the quantized model's hidden states; `keep` the output of what is settled."""
        hidden, call = self.run.quantized[number], self.run.calls[number][self.index]
        if self.wide:
            hidden, call = hidden.float(), call.to(torch.float32)
        if self.settled is None:
            return call.run(self.block, hidden)
        with self.settled.instead(number, hidden, keep):
            return call.run(self.block, hidden)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the block in float32, which transforms work in."""
        self.wide = True
        with in_float32(self.block):
            yield
        self.wide = False

    def numbers(self) -> range:
        """Numbers of the batches."""
        return range(len(self.run.batches))

    def follow_original(self, before: HiddenStates, basis: Tensor | None) -> None:
        """Let a copy of the block run on the original model's hidden states, for `drift`."""
        self.twin = Twin(self, before, basis)

    def gather(
        self, groups: list[Group], what: frozenset[str], as_seen: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Fill the statistics of `groups` from all batches of all processes.

        `as_seen`: what the layers see of their input [T, K]; its drift is then the one to the input itself, unless the
        original model's is asked for.
        """
        fisher = self.run.importance if self.run.importance is not None and FISHER in what else None
        for group in groups:
            group.stats = InputStats(group.features, what, group.name)
            if fisher is not None:
                group.stats.outputs = {matrix.name: fisher.of_outputs(matrix.name) for matrix in group.targets}
        for number in self.numbers():
            originals = {} if self.twin is None or DRIFT not in what else self.twin.inputs(number, groups)

            def seen(group: Group, x: Tensor) -> None:
                assert group.stats is not None
                x = group.basis(x)
                original = originals.get(group.name, x if as_seen else None)  # noqa: B023
                names = [matrix.name for matrix in group.targets]
                weights = None if fisher is None else fisher.of_tokens(names, number)  # noqa: B023
                place = number * processes.world() + processes.rank()  # noqa: B023
                group.stats.add(as_seen(x) if as_seen else x, original, weights, place)

            with suppress(Enough), watch(groups, seen, lambda: self.run.masks[number], stop=True):  # noqa: B023
                self.forward(number, keep=True)
        for group in groups:
            assert group.stats is not None
            processes.merge(group.stats)

    def quantize(self, progress: Callable[[float], None]) -> list[LayerFinding]:
        """Quantize every target of the block, which computes with the quantized weights from now on."""
        groups = [group for group in self.groups if group.targets]
        planned = list(stages(groups, self.run.needs))
        self.settled = self.settle(groups)
        findings = []

        def keep(made: Pieces) -> None:
            owner, leaf = _place(made.matrix)
            self.pieces.setdefault(owner, {}).setdefault(leaf, []).append(made)
            self.closing.setdefault(owner, []).append(made.stand_in())
            self.done.add(owner)
            findings.append(made.finding)

        for done, stage in enumerate(planned):
            progress((done + 0.5) / (len(planned) + 1))
            self._quantize_products(stage)
            self.gather(stage, self.run.needs | {CHANNELS})
            lend_histograms(stage)
            for group in stage:
                for made in self._quantize_group(group):
                    keep(made)
                group.stats = None
            if self.settled is not None:
                self.settled.finish(stage)
                if self.settled.is_known(self.numbers()) and not self.run.runs_packed:
                    self.place(f"{self.name}.{self.settled.name}")  # its full-precision weights are of no use any more
        self._quantize_products(None)
        for made in list(self._never_called(self.done)):
            keep(made)
        return findings

    def _quantize_products(self, upcoming: list[Group] | None) -> None:
        """Quantize the operands of attention that runs before `upcoming`, None for all that is left."""
        for product in list(self.products):
            if upcoming is None or any(id(group) in product.after for group in upcoming):
                self.products.remove(product)
                asked = (self.run.recipe, self.forward, self.run.masks, self.notes, self.run.importance)
                record = quantize_products(product, *asked)
                self.run.config.attention[product.name] = record

    def settle(self, groups: list[Group]) -> Settled | None:
        """What keeps the output of the part that is quantized first."""
        return Settled(self.block, groups, self.ends, self.run.kept)

    def place(self, part: str = "") -> None:
        """Put packed modules in the places of the full-precision ones, which have computed the same so far.

        `part`: only those in the module of that name.
        """
        for owner in [owner for owner in self.pieces if not part or f"{owner}.".startswith(f"{part}.")]:
            for close in self.closing.pop(owner):
                close()
            pieces = self.pieces.pop(owner)
            self.run.swap(owner, pieces)
            for made in (made for parts in pieces.values() for made in parts):
                made.matrix.release()
        if not part and self.settled is not None:
            self.settled.outputs.clear()
            self.settled = None

    def _never_called(self, done: Collection[str]) -> Iterator[Pieces]:
        """Targets that no batch reached: they are rounded to nearest."""
        inside = f"{self.name}." if self.name else ""
        for name in self.run.targets:
            mine = name.startswith(inside) and not (self.name == OUTSIDE and self.run.is_inside(name))
            if mine and name not in done and self.run.targets[name].kind != "embedding":
                module = self.run.model.get_submodule(name)
                for matrix in find_matrices(name, module, self.run.targets):
                    recipe = self.run.recipe
                    inputs = find_inputs(recipe, None, [], [], Group((0, 0, 0), [matrix]))
                    yield quantize_matrix(matrix, recipe, None, self.run.settings.min_tokens, inputs=inputs)

    def _quantize_group(self, group: Group) -> list[Pieces]:
        """Quantize the matrices that read an input, and the input if that is asked for, each for the other in turns."""
        recipe, seen = self.run.recipe, group.stats
        weights = [matrix.values() for matrix in group.targets]
        turns = rounds_of(INPUT_RANGES.get(recipe.input_range.name), recipe.input_range.options)
        inputs = find_inputs(recipe, seen, weights, weights, group)
        made: list[Pieces] = []
        for turn in range(turns if inputs is not None else 1):
            if recipe.scheme.input is not None and HESSIAN in self.run.needs:
                self._gather_as_seen(group, inputs)
            made = [self._quantize_matrix(group, number, inputs, turns == 1) for number in range(len(weights))]
            if turn + 1 == turns:
                break
            found = find_inputs(recipe, seen, weights, [part.qtensor().dequantize() for part in made], group)
            if found is None or found.same(inputs):
                break
            inputs = found
        return made

    def _quantize_matrix(self, group: Group, number: int, inputs: InputChoice | None, once: bool) -> Pieces:
        assert group.stats is not None
        recipe, settings = self.run.recipe, self.run.settings
        ranged = needs_of(RANGES.get(recipe.range.name), recipe.range.options)  # while the codes are looked for
        group.stats.last = once and number + 1 == len(group.targets) and HESSIAN not in ranged
        owner = number % processes.world()
        matrix = group.targets[number]
        return quantize_matrix(matrix, recipe, group.stats, settings.min_tokens, group.rotated, owner, inputs)

    def _gather_as_seen(self, group: Group, inputs: InputChoice | None) -> None:
        """Statistics of an input as the layers see it, quantized, and of its drift to the input itself."""
        given = with_inputs(self.run.recipe, inputs).scheme.input
        params = None if inputs is None else inputs.params
        assert given is not None
        if given.dynamic or params is not None:
            what = (self.run.needs | {CHANNELS, DRIFT}) - {HISTOGRAM}
            self.gather([group], what, lambda x: quantize_input(x.float(), given, None, params))


class OutsideQuantizer(BlockQuantizer):
    """The same for what is not in a block: the model runs, stubs give the last block's output."""

    def __init__(self, run: State, running: list[int]) -> None:
        self.running = running
        super().__init__(run, -1, OUTSIDE, run.model)

    def settle(self, groups: list[Group]) -> Settled | None:
        """Nothing: what is not in a block has no parts."""
        return None

    def forward(self, number: int, keep: bool = False) -> Any:
        """Run the model on a batch."""
        self.running[0] = number
        return self.block(**self.run.batches[number])


class Twin:
    """A copy of a block before it is quantized, run on the original model's hidden states."""

    def __init__(self, work: BlockQuantizer, before: HiddenStates, basis: Tensor | None) -> None:
        self.work, self.before, self.basis = work, before, basis
        self.block = copy.deepcopy(work.block)
        self.groups = {
            group.name: group for group in trace(work.name, self.block, work.run.targets, lambda: self._forward(0))
        }

    def _forward(self, number: int) -> None:
        hidden = self.before[number]
        moved = hidden if self.basis is None else (hidden.float() @ self.basis.to(torch.float32)).to(hidden.dtype)
        self.work.run.calls[number][self.work.index].run(self.block, moved)

    def inputs(self, number: int, groups: list[Group]) -> dict[str, Tensor]:
        """The inputs [T, K] of the copies of `groups`, by their names."""
        found: dict[str, Tensor] = {}

        def seen(group: Group, x: Tensor) -> None:
            found[group.name] = group.basis(x)

        twins = [self.groups[group.name] for group in groups]
        for twin, group in zip(twins, groups, strict=True):
            if twin.matrices[0].expert is not None:
                raise UnsupportedError(
                    f"{group.name}: the original model may send other tokens to an expert, so that the drift of its "
                    "inputs is not defined: set gptaq=0"
                )
            twin.rotated = group.rotated
        with watch(twins, seen, lambda: self.work.run.masks[number], stop=True), suppress(Enough):
            self._forward(number)
        return found


def _place(matrix: Matrix) -> tuple[str, str]:
    """Name of the module that owns a matrix, and of the parameter."""
    return (matrix.name if matrix.expert is None else matrix.name.rpartition(".")[0]), matrix.parameter
