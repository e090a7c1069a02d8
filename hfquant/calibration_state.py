"""What the parts of a calibration share: the request, the data, and the hidden states between two blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from . import processes
from .chain import Call, Chain
from .config import HfQuantConfig
from .coverage import Target
from .errors import CalibrationError
from .findings import BlockFinding
from .fisher import Importance
from .hidden import HiddenStates
from .layer import Pieces, hold_pieces
from .quantize import needs
from .recipe import Recipe
from .stats import DRIFT
from .swap import swap_in

Batch = Mapping[str, Any]
Tick = Callable[[str, float], None]
"""Called with what is being done and the share of the work that is finished, 0 to 1."""

OUTSIDE = ""  # stands for everything that is not in a block

FOLLOWED = 4  # samples that the original model runs on too, to compare hidden states
_PROBE = (2, 32)  # samples and tokens of the probe that transforms are verified on


@dataclass(frozen=True)
class Settings:
    """How to calibrate, as opposed to what to quantize into.

    `offload`: folder for the hidden states between blocks, None to keep them in memory. `min_tokens`: a matrix that saw
    fewer is rounded to nearest.
    """

    offload: Path | None = None
    min_tokens: int = 16


class Store(Protocol):
    """Where weights come from and where finished ones go. `OUTSIDE` names what is not in a block.

    `keeps`: weights stay in the model; otherwise they come anew with each `load`.
    """

    keeps: bool

    def load(self, name: str) -> None:
        """Have the full-precision parameters of a block in the model."""

    def finished(self, name: str) -> BlockFinding | None:
        """Put the quantized parameters of a block that an earlier run finished into the model, or None."""

    def finish(self, name: str, finding: BlockFinding) -> None:
        """Take the quantized parameters of a block that the model holds now."""

    def free(self, name: str) -> None:
        """The block is not needed any more."""


class InMemory:
    """The whole model is loaded and stays so: nothing to do."""

    keeps = True

    def load(self, name: str) -> None:
        """It is there."""

    def finished(self, name: str) -> BlockFinding | None:
        """Never."""
        return None

    def finish(self, name: str, finding: BlockFinding) -> None:
        """It stays where it is."""

    def free(self, name: str) -> None:
        """It is the result."""


@dataclass(eq=False)
class State:
    """One run over a model.

    `targets`: modules to quantize by name. `batches`: this process' share of the data; `masks`: which positions [B, L]
    of each are no padding, None for all. `calls`: how each block is called for each batch, [batch][block].
    `original`, `quantized`: hidden states that enter the next block in the original and in the quantized model; the
    original one runs only on the batches `followed`. `kept`: what `Settled` keeps of the running block.
    `shared`: what transforms remember; "basis" [H, H] is the one that the quantized model's hidden states are in.
    `importance`: of the outputs of layers to the answer of the original model, if errors are weighed by it.
    """

    model: PreTrainedModel
    config: HfQuantConfig
    chain: Chain
    targets: dict[str, Target]
    batches: list[Batch]
    settings: Settings
    original: HiddenStates
    quantized: HiddenStates
    kept: HiddenStates = field(default_factory=HiddenStates)
    masks: list[Tensor | None] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    tupled: bool = False
    shared: dict[str, Any] = field(default_factory=dict)
    importance: Importance | None = None

    def __post_init__(self) -> None:
        self.recipe: Recipe = self.config.recipe
        self.needs = needs(self.recipe)
        self.followed = list(range(len(self.batches)))
        if DRIFT not in self.needs:
            # The same ones, whatever the number of processes that share the batches.
            count = math.ceil(FOLLOWED / max(1, _samples(self.batches[0])))
            self.followed = [n for n in self.followed if n * processes.world() + processes.rank() < count]

    @property
    def runs_packed(self) -> bool:
        """Whether hidden states come from packed modules, which quantize their inputs, instead of their weights."""
        return self.recipe.scheme.input is not None

    def is_inside(self, name: str) -> bool:
        """Whether a module lies in one of the blocks."""
        return name.startswith(f"{self.chain.name}.")

    def swap(self, name: str, pieces: dict[str, list[Pieces]]) -> None:
        """Put a packed module in the place of a full-precision one."""
        swap_in(self.model, [self.targets[name]], self.recipe)
        hold_pieces(self.model.get_submodule(name), pieces, self.config, name)


def share(batches: Sequence[Batch], stand_in: bool) -> list[Batch]:
    """This process' batches; a stand-in for data, which nothing depends on, is everybody's."""
    if stand_in:
        return list(batches)
    if len(batches) < processes.world():
        raise CalibrationError(
            f"{processes.world()} processes share {len(batches)} batches of calibration data: start fewer processes, "
            "or give more data or a smaller batch_size"
        )
    return list(batches)[processes.rank() :: processes.world()]


def head(batch: Batch) -> dict[str, Any]:
    """The beginning of a batch: a few samples, a few tokens."""
    samples, length = _PROBE
    lengths = {value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.dim() == 2}

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        long = value.dim() in (2, 3) and value.shape[1] in lengths  # ids, masks, embeddings; not images
        return value[:samples, :length] if long else value[:samples]

    return {name: cut(value) for name, value in batch.items()}


def mask_of(batch: Batch) -> Tensor | None:
    """Which positions [B, L] of a batch are no padding, None if all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def _samples(batch: Batch) -> int:
    """How many samples a batch has."""
    return next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)
