"""What every part of the check is told: the device, the sizes, and when its time is up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from .findings import Findings

T = TypeVar("T")


@dataclass(frozen=True)
class Llama:
    """Shape of the model: `hidden`, `inner` and `heads` are those of each layer, `prompts` lengths in tokens."""

    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000
    prompts: tuple[int, ...] = (128, 512, 2048)
    tokens: int = 32
    train: int = 1024


@dataclass(frozen=True)
class Sizes:
    """`shapes` [N, K]: of layers that are timed, `rows` of their inputs; `ragged`: rows, N and K of those checked.

    `distinct`: bytes of different weights that are gone through, so that no cache holds them. `rounds`: of medians.
    `quantized` [N, K]: weights whose quantization is timed, on so many `calibration` tokens.
    """

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 4096)
    ragged: tuple[tuple[int, int, int], ...] = ((1, 256, 512), (5, 77, 336), (70, 203, 1064))
    distinct: float = 0.6e9
    rounds: int = 15
    copied: float = 2.0e9
    square: int = 8192
    llama: Llama = field(default_factory=Llama)
    steps: int = 5
    quantized: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096), (4096, 11008))
    calibration: int = 8192


FULL = Sizes()
QUICK = replace(
    FULL,
    shapes=FULL.shapes[:1],
    rows=(1, 16, 64, 512, 4096),
    ragged=FULL.ragged[:2],
    rounds=7,
    llama=replace(FULL.llama, layers=4, prompts=(128, 512), tokens=16),
    steps=3,
    quantized=FULL.quantized[:1],
    calibration=2048,
)
# For tests on a CPU: everything runs once, and nothing says anything about speed.
TINY = Sizes(
    shapes=((64, 128),),
    rows=(1, 16),
    ragged=((1, 32, 128), (5, 19, 48)),
    distinct=1,
    rounds=2,
    copied=1e4,
    square=32,
    llama=Llama(64, 128, 4, 2, 128, (8,), 3, 8),
    steps=1,
    quantized=((32, 128),),
    calibration=64,
)
SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}


@dataclass(frozen=True)
class Setting:
    """`ends`: on the clock of `time.monotonic`. `only_compile`: fill the cache of compiled kernels, measure nothing.

    `share` (i, n): do only the i-th of every n things.
    """

    device: torch.device
    sizes: Sizes
    ends: float
    only_compile: bool = False
    share: tuple[int, int] = (0, 1)

    @property
    def is_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def share_of(self, things: Iterable[T]) -> list[T]:
        """What is left to do of these things."""
        first, step = self.share
        return list(things)[first::step]

    def while_time(self, findings: Findings, what: str, things: Iterable[T]) -> Iterator[T]:
        """The things one after the other; once time is up the rest is only counted, as left out."""
        waiting: Sequence[T] = list(things)
        for number, thing in enumerate(waiting):
            if time.monotonic() >= self.ends:
                findings.put(left_out={**findings.data.get("left_out", {}), what: len(waiting) - number})
                return
            yield thing
