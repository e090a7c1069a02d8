"""What is known about a layer besides its weight when it is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Facts about one layer.

    `name`: the layer's name in the model, for messages. `producer_std` [K] float32: standard deviation of the weights
    that produce each input feature, for proxy outliers.
    """

    name: str = "weight"
    producer_std: Tensor | None = None
