"""What the parts of a calibration share: the request, the data, and the hidden states between two blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from .chain import Call, Chain
from .config import HfQuantConfig
from .coverage import Target
from .findings import BlockFinding
from .hidden import HiddenStates
from .layer import Pieces, hold_pieces
from .quantize import needs
from .recipe import Recipe
from .swap import swap_in

Batch = Mapping[str, Any]
Tick = Callable[[str, float], None]
"""Called with what is being done and the share of the work that is finished, 0 to 1."""

OUTSIDE = ""  # stands for everything that is not in a block


@dataclass(frozen=True)
class Settings:
    """How to calibrate, as opposed to what to quantize into.

    `sequential`: layers of a block see what the quantized layers before them make of their input (one pass over the
    data for each group of layers); False gathers all statistics of a block at once. `offload`: folder for the hidden
    states between blocks, None to keep them in memory. `min_tokens`: a matrix that saw fewer is rounded to nearest.
    """

    sequential: bool = True
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
    `original`, `quantized`: hidden states that enter the next block in the original and in the quantized model.
    `shared`: what transforms remember; "basis" [H, H] is the one that the quantized model's hidden states are in.
    """

    model: PreTrainedModel
    config: HfQuantConfig
    chain: Chain
    targets: dict[str, Target]
    batches: list[Batch]
    settings: Settings
    original: HiddenStates
    quantized: HiddenStates
    masks: list[Tensor | None] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    tupled: bool = False
    shared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe: Recipe = self.config.recipe
        self.needs = needs(self.recipe)

    def is_inside(self, name: str) -> bool:
        """Whether a module lies in one of the blocks."""
        return name.startswith(f"{self.chain.name}.")

    def swap(self, name: str, pieces: dict[str, list[Pieces]]) -> None:
        """Put a packed module in the place of a full-precision one."""
        swap_in(self.model, [self.targets[name]], self.recipe, {}, wait=False)
        hold_pieces(self.model.get_submodule(name), pieces, self.config, name)
