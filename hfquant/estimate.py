"""What a calibrated quantization is going to take, memory and time, before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .blockwork import BlockWork, Reading, block_works
from .calibration_state import FOLLOWED, Settings
from .chain import find_chain
from .config import HfQuantConfig
from .coverage import Target
from .data import SELF, kind_of, stand_in
from .input_ranges import INPUT_RANGES, rounds_of
from .quantize import needs, needs_data
from .report import peak_rss_mb
from .stats import DRIFT, HESSIAN
from .throughput import Throughput, measure
from .transforms import TRANSFORMS

_FORWARD = (40, 6)  # elementwise steps of a block for each hidden feature and each output of a matrix
_STATISTICS = 8  # elementwise steps for each input feature
_PACK = 20  # elementwise steps for each weight: packing, and unpacking to look at the error
_PACKED, _WORKED, _AT_ONCE = 6, 32, 1 << 21  # bytes of a weight for its codes; and of those worked on at once, how many
_SAMPLE = 256  # tokens that the error of an output is looked at with
_TRIALS, _TRIED_ROWS = 40, 512  # rewrites that a transform which reads Gram matrices tries, on so many rows of a weight
_START, _DISK = 1.0, 5e8  # seconds for tokenizer, configuration and files; bytes a second
_GRAM = (1 << 12, 1 << 8)  # tokens and columns that a Gram matrix is made of at once


@dataclass(frozen=True)
class Estimate:
    """`memory`: MB (10^6 bytes) of each thing that is held; `peak_mb`: of all that are held at the worst moment.

    `seconds`: by what they are spent on, `total_seconds` all. `batches`: how many are read, and the samples and tokens
    of each. `threads`: that the machine was timed with.
    """

    memory: dict[str, float]
    peak_mb: float
    seconds: dict[str, float]
    total_seconds: float
    batches: tuple[int, int, int]
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    """A run as far as it is known beforehand. `number` batches of `tokens` tokens each."""

    model: Any
    blocks: list[BlockWork]
    config: HfQuantConfig
    settings: Settings
    number: int
    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def hidden(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.config.recipe)

    @property
    def turns(self) -> float:
        """How often inputs and weights are searched in turns, which mostly ends early; 0 if inputs are exact."""
        recipe, step = self.config.recipe, self.config.recipe.input_range
        return 0.0 if recipe.scheme.input is None else (1 + rounds_of(INPUT_RANGES.get(step.name), step.options)) / 2

    @property
    def transform_needs(self) -> list[frozenset[str]]:
        return [TRANSFORMS.get(step.name).needs for step in self.config.recipe.transforms]


def estimate(
    model: Any, targets: Sequence[Target], config: HfQuantConfig, settings: Settings | None = None
) -> Estimate:
    """Estimate the quantization of `targets` of `model`, which lies on the meta device, on this machine.

    Raises CalibrationError for data that is not there; what the model raises if it cannot be run without values.
    """
    batch, number = _batches(model, config)
    main = next(iter(batch.values()))
    blocks = block_works(model, find_chain(model), [target.name for target in targets], batch)
    run = _Run(model, blocks, config, settings or Settings(), number, *_positions(model, main))
    speed = measure(config.recipe, model.dtype, run.hidden, config.data.batch_size)
    memory, peak = _memory(run, targets, _resident_mb())  # with what the libraries took for the products just timed
    seconds = _seconds(run, speed)
    shape = (number, run.samples, run.length)
    return Estimate(memory, peak, seconds, sum(seconds.values()), shape, torch.get_num_threads())


# ---- data


def _batches(model: Any, config: HfQuantConfig) -> tuple[dict[str, Any], int]:
    """A batch like those that the model is going to be run on, without values, and their number."""
    data = config.data
    if data.data is None and not needs_data(config.recipe):
        return _valueless(stand_in(model.config)[0]), 1
    kind = None if data.data is None else kind_of(data.data)
    if kind == "inputs":
        return _valueless(data.data[0]), len(data.data)
    rows, length = data.samples, data.length
    if kind == "tokens":
        tensors = data.data if isinstance(data.data, list | tuple) else [data.data]
        rows = min(rows, sum(t.shape[0] if t.dim() == 2 else 1 for t in tensors))
        length = max(t.shape[-1] for t in tensors)
    size = (min(data.batch_size, rows), length)
    ids = torch.empty(size, dtype=torch.int64, device="meta")
    return _valueless({"input_ids": ids}), math.ceil(rows / data.batch_size)


def _valueless(batch: Any) -> dict[str, Any]:
    """A batch on the meta device; with a mask, so that models do not look for padding."""
    made = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    if "input_ids" in made and "attention_mask" not in made:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made


def _positions(model: Any, main: torch.Tensor) -> tuple[int, int]:
    """Samples of a batch, and positions of each."""
    if main.dim() <= 2:
        return main.shape[0], main.shape[-1]
    config = model.config
    patch = getattr(config, "patch_size", 16)
    return main.shape[0], main.shape[-1] * main.shape[-2] // patch**2 + 1


# ---- memory


def _memory(run: _Run, targets: Sequence[Target], before: float) -> tuple[dict[str, float], float]:
    largest = max(run.blocks, key=lambda block: block.bytes)
    inside = sum(block.bytes for block in run.blocks)
    total = sum(p.numel() * p.element_size() for p in run.model.parameters())
    dtype = run.model.dtype.itemsize
    held = min(run.number, 1) if run.settings.offload is not None else run.number
    size = largest.bytes * (4 / dtype if run.config.recipe.transforms else 1)
    size *= 2 if DRIFT in run.needs else 1  # the copy that runs on the original model's hidden states
    parts = {
        "process": before * 1e6,
        "hidden states": _sets(run, held) * run.tokens * run.hidden * dtype,
        "block": size,
        "statistics": max(_gathered(run, block) for block in run.blocks),
        "rounding": max(_rounding(run, block) for block in run.blocks),
        "activations": max(_activations(run, block) for block in run.blocks),
        "outside blocks": total - inside,
    }
    if run.config.data.data is not None and kind_of(run.config.data.data) == SELF:
        parts["model that writes the text"] = total
    # Never all of it at once: embeddings with the first block only, and no activations while weights are rounded.
    start = parts["outside blocks"] + largest.bytes + parts["activations"]
    busy = parts["block"] + parts["statistics"] + max(parts["rounding"], parts["activations"])
    outside = parts["outside blocks"] * (2 if _quantizes_outside(run, targets) else 1)
    writing = parts.get("model that writes the text", 0.0)
    peak = parts["process"] + max(parts["hidden states"] + max(start, busy, outside), writing)
    return {name: round(value / 1e6, 3) for name, value in parts.items()}, peak / 1e6


def _sets(run: _Run, held: int) -> int:
    """Batches of hidden states in memory, if `held` of each kind are: of the quantized model, what is kept of a block,
    of the original model, and with its drift those that entered the block too.
    """
    if DRIFT in run.needs:
        return 4 * held
    return 2 * held + min(held, math.ceil(FOLLOWED / run.samples))


def _quantizes_outside(run: _Run, targets: Sequence[Target]) -> bool:
    chain = find_chain(run.model)
    return any(not target.name.startswith(f"{chain.name}.") for target in targets)


def _gathered(run: _Run, block: BlockWork) -> float:
    """Bytes of the statistics that are gathered in one pass, at most."""
    squares = (HESSIAN in run.needs) + (DRIFT in run.needs)
    sizes = [8 * squares * r.copies * r.features**2 for r in block.readings]
    for what in run.transform_needs:
        sizes.append(sum(8 * (HESSIAN in what) * r.copies * r.features**2 for r in block.readings))
    return float(max(sizes, default=0))


def _rounding(run: _Run, block: BlockWork) -> float:
    """Bytes that rounding the weight which needs most takes besides its statistics."""
    sizes = [0.0]
    for reading in block.readings:
        width = reading.features
        # What a Hessian is factorized into takes its place, if no other matrix needs it afterwards.
        factor = 8 * width**2 if HESSIAN in run.needs and len(reading.rows) > 1 else 0
        for rows in reading.rows:
            sizes.append(factor + _PACKED * rows * width + _WORKED * min(rows * width, _AT_ONCE))
    return max(sizes)


def _activations(run: _Run, block: BlockWork) -> float:
    """Bytes of the activations of a batch, and of the tokens that are being counted."""
    dtype = run.model.dtype.itemsize
    features = max((reading.features for reading in block.readings), default=0)
    tokens = min(run.tokens, _GRAM[0])
    return run.tokens * (6 * run.hidden + 3 * block.widest) * dtype + 3 * 4 * tokens * features


def _resident_mb() -> float:
    """What this process takes now, in MB; where the system does not tell, the most it took."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_rss_mb() or 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- time


def _seconds(run: _Run, speed: Throughput) -> dict[str, float]:
    found = {"forward passes": 0.0, "statistics": 0.0, "rounding": 0.0}
    if any(HESSIAN in what for what in run.transform_needs):
        found["searching"] = sum(_searching(r, speed) for block in run.blocks for r in block.readings)
    stored = sum(parameter.numel() for parameter in run.model.parameters()) * run.model.dtype.itemsize
    found["reading and writing"] = _START + 1.5 * stored / _DISK
    if run.config.data.data is not None and kind_of(run.config.data.data) == SELF:
        flops = 2 * run.tokens * sum(parameter.numel() for parameter in run.model.parameters())
        found["writing the text"] = run.number * flops / speed.skinny
    for block in run.blocks:
        found["forward passes"] += _forward(run, block, speed)
        found["statistics"] += sum(_counting(run, r, speed, run.needs) for r in block.readings)
        if HESSIAN in run.needs:  # of inputs as the layers see them
            seen = sum(_counting(run, r, speed, run.needs | {DRIFT}) for r in block.readings)
            found["statistics"] += run.turns * seen
        for what in run.transform_needs:
            found["statistics"] += sum(_counting(run, r, speed, what) for r in block.readings)
        found["rounding"] += sum(_rounding_seconds(run, reading, speed) for reading in block.readings)
    return found


def _forward(run: _Run, block: BlockWork, speed: Throughput) -> float:
    """The original model's pass over a few batches, the quantized one's, and one up to each group of matrices."""
    again, full = block.gathering() - block.settled(), sum(reading.before for reading in block.readings)
    followed = 1 if DRIFT in run.needs else min(1.0, math.ceil(FOLLOWED / run.samples) / run.number)
    extra = full * (DRIFT in run.needs) + again * run.turns * (HESSIAN in run.needs)
    passes = 1 + followed + (again + extra) / max(block.flops, 1)
    outputs = sum(sum(reading.rows) * reading.copies for reading in block.readings)
    elementwise = run.tokens * (_FORWARD[0] * run.hidden + _FORWARD[1] * outputs) / speed.elements
    gathering = sum(bool(what) for what in run.transform_needs) * (block.flops / speed.single + elementwise)
    return run.number * (passes * (block.flops / speed.forward + elementwise) + gathering)


def _counting(run: _Run, reading: Reading, speed: Throughput, what: frozenset[str]) -> float:
    """Adding all tokens to the statistics of an input."""
    width, tokens = reading.features, reading.tokens
    each = _STATISTICS * tokens * width / speed.elements
    if HESSIAN in what:
        parts = math.ceil(width / _GRAM[1])
        area = width**2 * (parts + 1) / (2 * parts)  # blocks on and above the diagonal
        adds = math.ceil(tokens / _GRAM[0])
        each += 2 * tokens * area / speed.single + 4 * adds * width**2 / speed.elements
    if DRIFT in what:
        each += 2 * tokens * width**2 / speed.single
    return run.number * reading.copies * each


def _searching(reading: Reading, speed: Throughput) -> float:
    """What a transform tries on the matrices of an input, judged by the Gram matrix of the input."""
    rows, width = sum(min(count, _TRIED_ROWS) for count in reading.rows), reading.features
    return reading.copies * _TRIALS * rows * width * (2 * width / speed.double + _PACK / speed.elements)


def _rounding_seconds(run: _Run, reading: Reading, speed: Throughput) -> float:
    """The recipe's stages for the matrices of an input, and what grows faster than their size in them."""
    width = reading.features
    spent = 0.0
    for rows in reading.rows:
        spent += max(run.turns, 1) * width * (speed.column + rows * (speed.element + speed.seen))
        spent += _PACK * rows * width / speed.elements + 4 * _SAMPLE * rows * width / speed.single
        if HESSIAN in run.needs:
            spent += 2 * rows * width**2 / speed.double  # feedback of each block of columns to all after it
    if HESSIAN in run.needs:
        spent += width**3 / speed.double  # triangles; copies in another order
    return reading.copies * spent
