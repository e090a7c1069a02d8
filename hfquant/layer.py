"""One matrix of a block: from its weight and the statistics of its inputs to packed tensors in a module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .blocks import row_chunks
from .columns import COLUMNS
from .config import HfQuantConfig
from .errors import CalibrationError, UnsupportedError
from .experts import QExperts
from .findings import LayerFinding
from .hadamard import hadamard, inverse_hadamard
from .input_ranges import INPUT_RANGES, InputChoice, SeenInput, searches_dynamic
from .layouts import unpack, unpack_inputs
from .matrices import Group, Matrix
from .nn import PackedModule
from .qtensor import InputParams, QTensor
from .quantize import for_table, needs, pack, pack_empty, quantize_linear
from .ranges import RANGES
from .recipe import Recipe, Step
from .reference import quantize_input
from .rounders import ROUNDERS
from .spec import PackedSpec, Scheme, TensorSpec
from .stats import InputStats, Stats, needs_of


@dataclass
class Pieces:
    """The packed tensors of one matrix, what they mean, and what was found."""

    matrix: Matrix
    packed: dict[str, Tensor]
    spec: PackedSpec
    finding: LayerFinding

    def qtensor(self) -> QTensor:
        """The quantized matrix."""
        return unpack([self.packed[name] for name in self.spec.names], self.spec)

    def stand_in(self) -> Callable[[], None]:
        """Let the full-precision module compute what the packed one will; returns what takes that back from its input.

        The layers after it then see quantized inputs while the rest of the block is still in full precision.
        """
        q = self.qtensor()
        values = self.matrix.values()
        values.copy_(q.dequantize(values.dtype))
        given = self.spec.scheme.input
        inputs = unpack_inputs([self.packed[name] for name in self.spec.names], self.spec)
        if given is None or self.matrix.expert is not None:
            return lambda: None

        def hook(module: nn.Module, args: tuple) -> tuple:
            x = args[0]
            rows = x.reshape(-1, x.shape[-1]).float()
            seen = quantize_input(hadamard(rows) if q.rotated else rows, given, q.outliers, inputs)
            seen = inverse_hadamard(seen) if q.rotated else seen
            return (seen.reshape(x.shape).to(x.dtype), *args[1:])

        return self.matrix.module.register_forward_pre_hook(hook).remove


def quantize_matrix(
    matrix: Matrix,
    recipe: Recipe,
    stats: InputStats | None,
    min_tokens: int,
    rotated: bool = False,
    owner: int = 0,
    inputs: InputChoice | None = None,
) -> Pieces:
    """Quantize a matrix by a recipe and what calibration saw of its input; process `owner` does the work.

    A matrix that saw fewer than `min_tokens` tokens is rounded to nearest, which is noted; -1 for a table, which
    sees no tokens. `inputs`: what was found for the input, if it is quantized.
    """
    started = time.perf_counter()
    w = matrix.values()
    notes: list[Any] = []
    count = 0 if stats is None else stats.tokens
    sample = None if stats is None else stats.sample
    recipe = with_inputs(recipe, inputs)
    if stats is None or count < min_tokens:
        if min_tokens >= 0 and needs(for_table(recipe)) and processes.rank() == owner:  # of the weight alone
            notes.append(f"{count} tokens reached it, {min_tokens} are needed: rounded to nearest")
        recipe, stats = data_free(recipe), None
    schemes: list[Scheme] = []

    def make() -> dict[str, Tensor]:
        log: list[str] = []
        facts = Stats(matrix.name, inputs=stats, log=log, grid_is_given=matrix.expert is not None)
        q = quantize_linear(w.contiguous(), recipe, facts, rotated=rotated)
        notes.extend(log)
        packed, spec = pack(q, recipe, None if inputs is None else inputs.params)
        schemes.append(spec.scheme)
        return packed

    empty, spec = pack_empty((w.shape[0], w.shape[1]), recipe, w.dtype, rotated=rotated)
    packed = processes.from_owner(owner, empty, make)
    scheme = processes.of(owner, schemes[0].to_dict() if schemes else None)
    if stats is not None and stats.last:
        stats.memo.clear()  # large, and of no use any more
    kept = packed["outlier_index"].numel() if "outlier_index" in packed else 0
    spec = replace(spec, names=tuple(packed), outliers=kept, scheme=Scheme.from_dict(scheme))
    found = LayerFinding(matrix.name, None, count, processes.gather_notes(notes), grid=spec.scheme.weight.grid)
    if spec.scheme.input is not None:
        found.input_grid = spec.scheme.input.tensor.grid
    made = Pieces(matrix, packed, spec, found)
    if sample is not None and len(sample):
        found.error = _output_error(w, made.qtensor(), sample)
    found.seconds = time.perf_counter() - started
    return made


def with_inputs(recipe: Recipe, inputs: InputChoice | None) -> Recipe:
    """The recipe with the numbers that were chosen for a layer's input."""
    given = recipe.scheme.input
    if given is None or inputs is None:
        return recipe
    return replace(recipe, scheme=replace(recipe.scheme, input=replace(given, tensor=inputs.tensor)))


def find_inputs(
    recipe: Recipe, stats: InputStats | None, weights: Sequence[Tensor], quantized: Sequence[Tensor], group: Group
) -> InputChoice | None:
    """What calibration found for the input of some layers, None where nothing has to be found.

    `weights`: [N, K] of the layers that read it; `quantized`: what they are quantized to so far. Raises
    CalibrationError for a static input that no token reached: there is nothing to fall back to.
    """
    given, step = recipe.scheme.input, recipe.input_range
    find = INPUT_RANGES.get(step.name)
    if given is None or (given.dynamic and not searches_dynamic(find)):
        return None
    unseen = stats is None or (not stats.tokens and (stats.histogram is None or not stats.histogram.total))
    if not given.dynamic and unseen:
        raise CalibrationError(
            f"{group.name} was reached by no token of the calibration data, so that its static input has no range: "
            "give more data, leave the layer alone (modules_to_not_convert), or use dynamic ranges"
        )
    if stats is None or unseen:
        return None
    peak = float(stats.absmax.max()) if stats.tokens else 0.0
    if stats.histogram is not None:
        peak = max(peak, stats.histogram.absmax)
    experts = group.matrices[0].expert is not None
    seen = SeenInput(
        *(group.name, stats.histogram, stats.sample, peak, tuple(weights), tuple(quantized), experts),
        stats.importance(matrix.name for matrix in group.targets),
    )
    return _of_first(find(seen, given, **step.options))


def _of_first(choice: InputChoice) -> InputChoice:
    """What the first process chose: another may round differently, and must not go on with another choice."""
    given = choice.params
    numbers = [] if given is None else [None if x is None else x.tolist() for x in (given.scale, given.zero)]
    tensor, found = processes.of_first([choice.tensor.to_dict(), numbers])
    spec = TensorSpec.from_dict(tensor)
    if given is None:
        return InputChoice(spec)
    zero = None if given.zero is None else given.zero.new_tensor(found[1])
    return InputChoice(spec, InputParams(given.scale.new_tensor(found[0]), zero))


def data_free(recipe: Recipe) -> Recipe:
    """The recipe with nearest rounding and plain ranges in the place of stages that need calibration.

    A range that is marked with `works_without_data` stays.
    """
    changed = recipe
    if needs_of(ROUNDERS.get(recipe.rounder.name), recipe.rounder.options):
        changed = replace(changed, rounder=Step("nearest"))
    ranged = RANGES.get(recipe.range.name)
    if needs_of(ranged, recipe.range.options) and not getattr(ranged, "works_without_data", False):
        changed = replace(changed, range=Step("absmax"))
    if needs_of(COLUMNS.get(recipe.columns.name), recipe.columns.options):
        changed = replace(changed, columns=Step("none"))
    return changed


def _output_error(w: Tensor, q: QTensor, x: Tensor) -> float:
    """|x (W - W')^T| / |x W^T| for some inputs `x` [S, K] float32, in the basis that the weight is quantized in."""
    x = inverse_hadamard(x) if q.rotated else x
    error, power = [], []
    values = q.dequantize()
    for rows in row_chunks((w.shape[0], w.shape[1])):
        exact = w[rows].float()
        power.append((x @ exact.T).norm())
        error.append((x @ (exact - values[rows]).T).norm())
    return float(torch.stack(error).norm() / torch.stack(power).norm().clamp_min(1e-30))


def hold_pieces(module: Any, pieces: dict[str, list[Pieces]], config: HfQuantConfig, name: str) -> None:
    """Give a packed module the tensors of its matrices; `config` notes what a checkpoint has to record of them."""
    for leaf, parts in pieces.items():
        spec = parts[0].spec
        if other := next((part for part in parts if part.spec != spec), None):
            raise UnsupportedError(
                f"{other.matrix.name} has other numbers than {parts[0].matrix.name}, with which it is stored: a range "
                "has to keep the grid where `grid_is_given`"
            )
        label = name
        if isinstance(module, QExperts):
            label = f"{name}.{leaf}"
            stacked = {key: torch.stack([part.packed[key] for part in parts]) for key in spec.names}
            module.hold(leaf, stacked, spec)
        else:
            assert isinstance(module, PackedModule) and len(parts) == 1
            module.hold(parts[0].packed, spec)
        config.note(label, spec)
