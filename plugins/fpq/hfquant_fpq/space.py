"""What is searched: the floating-point formats of a width, and the largest value that each of them is scaled to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfquant.errors import SpecError
from hfquant.grids import FloatGrid, by_pattern

MODES = ("joint", "paper", "minmax")
_MOST_EXPONENT_BITS = 5
_LADDER = 8  # candidates per octave that are tried wherever the best one may be
_GAMMA = (0.01, 1.2, 100)  # the grid of the paper: first, end (not reached), count
_USUAL = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e3m2", 7: "e3m3", 8: "e4m3"}


def formats(bits: int) -> tuple[str, ...]:
    """Names of the formats of `bits` bits, from evenly spaced numbers to the widest range: "e1m2", "e2m1", "e3m0"."""
    return tuple(f"e{e}m{bits - 1 - e}" for e in range(1, min(_MOST_EXPONENT_BITS, bits - 1) + 1))


def unsigned_formats(bits: int) -> tuple[str, ...]:
    """The same without a sign, for what is never negative: "ue1m3", "ue2m2", "ue3m1", "ue4m0"."""
    return tuple(f"ue{e}m{bits - e}" for e in range(1, min(_MOST_EXPONENT_BITS, bits) + 1))


def usual(bits: int) -> str:
    """The format of `bits` bits that is used where none is searched for. Raises SpecError for other widths."""
    if isinstance(bits, bool) or bits not in _USUAL:
        raise SpecError(f"floating-point formats have 3 to 8 bits, got {bits!r}")
    return _USUAL[bits]


@dataclass(frozen=True)
class Space:
    """Formats, and for each the candidates of the largest value.

    `mode` "joint": powers of two times the largest magnitude, exponents from `lowest` to `highest` in `steps` steps per
    octave, 0 (no clipping) first; of more than 8 steps only those beside the best one so far. "paper": the biases
    gamma * b of LLM-FP4, gamma from 0.01 to 1.2, where b is the real-valued exponent bias without clipping (equation
    7). "minmax": no clipping.
    """

    names: tuple[str, ...]
    mode: str = "joint"
    lowest: float = -3.0
    highest: float = 0.5
    steps: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecError(f"search is one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise SpecError(f"steps is a whole number of candidates per octave, at least 1, got {self.steps!r}")
        if not self.lowest <= 0 <= self.highest:
            raise SpecError(
                f"candidates include no clipping: lowest <= 0 <= highest, got {self.lowest}, {self.highest}"
            )
        if not self.names:
            raise SpecError("formats is a list of at least one format, such as ['e2m1', 'e3m0']")
        for name in self.names:
            float_grid(name)

    @classmethod
    def of(cls, grid: str, given: bool, names: list[str] | None, mode: str, *ladder: Any) -> Space:
        """The candidates for numbers of as many bits as `grid` has, in any format of `names`, None for all.

        `given`: that format has to be `grid`. `ladder`: `lowest`, `highest` and `steps`.
        """
        return cls((grid,) if given else tuple(names or formats(float_grid(grid).bits)), mode, *ladder)

    def exponents(self, peak: Tensor, name: str) -> Iterator[Tensor]:
        """Candidates for log2 of the largest value over `peak` (positive, any shape), each of its shape."""
        if self.mode == "paper":
            unclipped = bias(peak, float_grid(name))
            first, end, count = _GAMMA
            for index in range(count):
                yield unclipped * (1 - (first + index * (end - first) / count))
            return
        yield torch.zeros_like(peak)
        if self.mode == "minmax":
            return
        steps = self._coarse()
        ladder = range(math.ceil(self.lowest * steps), math.floor(self.highest * steps) + 1)
        for step in sorted(ladder, key=abs)[1:]:
            yield torch.full_like(peak, step / steps)

    def finer(self) -> Iterator[float]:
        """How far to go from the best exponent so far, up and down, to look for a better one: halves, in turns."""
        steps = 2 * self._coarse()
        while self.mode == "joint" and steps <= self.steps:
            yield 1 / steps
            steps *= 2

    def _coarse(self) -> int:
        """Steps per octave that are all tried."""
        steps = self.steps
        while steps > _LADDER and steps % 2 == 0:
            steps //= 2
        return steps


def searches_nothing(options: dict[str, Any]) -> bool:
    """Whether a range with these options has one candidate: one format, without clipping."""
    return options.get("search") == "minmax" and len(options.get("names") or ()) == 1


def float_grid(name: str) -> FloatGrid:
    """The format of a name. Raises SpecError for anything else than a plain floating-point format."""
    found = by_pattern(name)
    if not isinstance(found, FloatGrid) or found.specials != "none" or found.bias is not None:
        raise SpecError(f"formats are named like 'e2m1', without suffix, got {name!r}")
    return found


def bias(peak: Tensor, grid: FloatGrid) -> Tensor:
    """The real-valued exponent bias [any shape] whose largest number is `peak`: LLM-FP4, equation 7."""
    return 2**grid.e - peak.log2() + math.log2(2 - 2.0**-grid.m) - 1
