"""What calibration found: errors of layers and blocks, remedies it took, and what it left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerFinding:
    """A quantized matrix: `error` is |x (W - W')^T| / |x W^T| over a sample of its calibration inputs.

    It is None where there was no input to look at, as for a layer that no token reached.
    `tokens`: how many reached it. `seconds`: time that its stages took. `notes`: remedies and fallbacks. `grid`,
    `input_grid`: numbers of the weight, and of its input if that is quantized.
    """

    name: str
    error: float | None
    tokens: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    grid: str | None = None
    input_grid: str | None = None


def worst_first(layers: Iterable[LayerFinding]) -> list[LayerFinding]:
    """Layers by their error; those without one come last."""
    return sorted(layers, key=lambda layer: -1.0 if layer.error is None else layer.error, reverse=True)


@dataclass
class BlockFinding:
    """A block: `error` is the relative distance of its hidden states from those of the original model.

    What the blocks before it lost is in it too; it is None for what is not in a block. `seconds`: time it took.
    `notes`: what transforms did and refused.
    """

    name: str
    error: float | None
    seconds: float
    layers: list[LayerFinding]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockFinding:
        """Inverse of `to_dict`."""
        return cls(**{**data, "layers": [LayerFinding(**layer) for layer in data["layers"]]})
