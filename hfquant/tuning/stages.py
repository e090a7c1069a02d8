"""How good the model is at each stage of a recipe, always on the same text and against the original model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..eval import Fidelity, Reference


@dataclass(frozen=True)
class Stage:
    """A stage, such as "quantized", "trained" or "merged", measured.

    `loss`: mean negative log-likelihood of a token in nats, `change`: what the stage before it had less, None for the
    first; `fidelity` compares with the original model.
    """

    name: str
    loss: float
    change: float | None
    fidelity: Fidelity

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Stage:
        """Inverse of `to_dict`."""
        found: dict[str, Any] = data["fidelity"]
        measured: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return cls(data["name"], data["loss"], data["change"], Fidelity(**measured))


class Stages:
    """The stages measured so far. Without text to measure on nothing is measured.

    `counted` [B, L-1] bool: which predictions of `batches` count, None for all.
    """

    def __init__(self, batches: list[Tensor], counted: list[Tensor] | None, known: list[Stage]) -> None:
        self.batches, self.counted, self.found = batches, counted, list(known)
        self._reference: Reference | None = None

    def start(self, original: Any) -> None:
        """Run the original model, and measure it if that was not done."""
        if self.batches:
            self._reference = Reference(original, self.batches, counted=self.counted)
            self.measure("original", original)

    def measure(self, name: str, model: Any) -> None:
        """Measure a model as the stage `name`, unless that was done."""
        if self._reference is None or name in [stage.name for stage in self.found]:
            return
        fidelity = self._reference.compare(model)
        loss = math.log(fidelity.ppl)
        before = self.found[-1].loss if self.found else None
        self.found.append(Stage(name, loss, None if before is None else loss - before, fidelity))
