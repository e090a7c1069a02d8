"""One matrix of a block: from its weight and the statistics of its inputs to packed tensors in a module."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .blocks import row_chunks
from .columns import COLUMNS
from .config import HfQuantConfig
from .errors import CalibrationError
from .experts import QExperts
from .findings import LayerFinding
from .hadamard import hadamard, inverse_hadamard
from .input_ranges import INPUT_RANGES
from .layouts import unpack, unpack_inputs
from .matrices import Matrix
from .nn import PackedModule
from .qtensor import InputParams, QTensor
from .quantize import pack, pack_empty, quantize_linear
from .ranges import RANGES
from .recipe import Recipe, Step
from .reference import quantize_input
from .rounders import ROUNDERS
from .spec import PackedSpec
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
) -> Pieces:
    """Quantize a matrix by a recipe and what calibration saw of its input; process `owner` does the work.

    A matrix that saw fewer than `min_tokens` tokens is rounded to nearest, which is noted.
    """
    started = time.perf_counter()
    w = matrix.values()
    notes: list[Any] = []
    count = 0 if stats is None else stats.tokens
    sample = None if stats is None else stats.sample
    seen = stats  # a static input has its range from whatever was seen
    if stats is None or count < min_tokens:
        changed = data_free(recipe)
        if changed != recipe and processes.rank() == owner:
            notes.append(f"{count} tokens reached it, {min_tokens} are needed: rounded to nearest")
        recipe, stats = changed, None

    def make() -> dict[str, Tensor]:
        log: list[str] = []
        q = quantize_linear(w.contiguous(), recipe, Stats(matrix.name, inputs=stats, log=log), rotated=rotated)
        notes.extend(log)
        return pack(q, recipe, static_inputs(recipe, seen, matrix.name))[0]

    empty, spec = pack_empty((w.shape[0], w.shape[1]), recipe, w.dtype, rotated=rotated)
    packed = processes.from_owner(owner, empty, make)
    if stats is not None and stats.last:
        stats.memo.clear()  # large, and of no use any more
    if tuple(packed) != spec.names:
        kept = packed["outlier_index"].numel() if "outlier_index" in packed else 0
        spec = replace(spec, names=tuple(packed), outliers=kept)
    found = LayerFinding(matrix.name, None, count, processes.gather_notes(notes))
    made = Pieces(matrix, packed, spec, found)
    if sample is not None and len(sample):
        found.error = _output_error(w, made.qtensor(), sample)
    found.seconds = time.perf_counter() - started
    return made


def static_inputs(recipe: Recipe, stats: InputStats | None, name: str) -> InputParams | None:
    """The range of a static input that calibration found, None where a recipe has none.

    Raises CalibrationError for a layer that no token reached: there is nothing to fall back to.
    """
    given = recipe.scheme.input
    if given is None or given.dynamic:
        return None
    if stats is None or stats.histogram is None or not stats.histogram.total:
        raise CalibrationError(
            f"{name} was reached by no token of the calibration data, so that its static input has no range: give more "
            "data, leave the layer alone (modules_to_not_convert), or use dynamic ranges"
        )
    step = recipe.input_range
    return INPUT_RANGES.get(step.name)(stats.histogram, given.tensor, name, **step.options)


def data_free(recipe: Recipe) -> Recipe:
    """The recipe with nearest rounding and plain ranges in the place of stages that need calibration."""
    changed = recipe
    if needs_of(ROUNDERS.get(recipe.rounder.name), recipe.rounder.options):
        changed = replace(changed, rounder=Step("nearest"))
    if needs_of(RANGES.get(recipe.range.name), recipe.range.options):
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
        label = name
        if isinstance(module, QExperts):
            label = f"{name}.{leaf}"
            stacked = {key: torch.stack([part.packed[key] for part in parts]) for key in spec.names}
            module.hold(leaf, stacked, spec)
        else:
            assert isinstance(module, PackedModule) and len(parts) == 1
            module.hold(parts[0].packed, spec)
        if spec.outliers:
            config.outlier_columns[label] = spec.outliers
        if spec.rotated and label not in config.rotated:
            config.rotated.append(label)
