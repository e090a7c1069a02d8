"""What calibration found: errors of layers and blocks, remedies it took, and what it left alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerFinding:
    """A quantized matrix: `error` is |x (W - W')^T| / |x W^T| over a sample of its calibration inputs.

    `tokens`: how many reached it. `seconds`: time that its stages took. `notes`: remedies and fallbacks.
    """

    name: str
    error: float
    tokens: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class BlockFinding:
    """A block: `error` is the relative distance of its hidden states from those of the original model.

    What the blocks before it lost is in it too. `seconds`: time it took. `notes`: what transforms did and refused.
    """

    name: str
    error: float
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
