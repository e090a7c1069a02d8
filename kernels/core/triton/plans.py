"""What a layer launches for a number of rows: found out once, so that a call while decoding looks it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """A launch for one number of rows: everything but what depends on the call.

    `grid`: tiles of the result; `splits` of the columns; `words`: codes may be read four bytes at once; `finish`: the
    arguments of the launch that adds the parts.
    """

    grid: tuple[int, ...]
    splits: int
    words: bool
    arguments: dict[str, Any]
    finish: dict[str, Any]


MOST_PLANS = 64  # of a layer: a batch that decodes has few sizes, and what is long can be planned each time


class Plans:
    """The plans of a layer, each made when it is first needed. They hold none of the layer's tensors."""

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._known: dict[tuple[Any, ...], Plan] = {}

    def get(self, *key: Any) -> Plan:
        """The plan for what `make` takes."""
        plan = self._known.get(key)
        if plan is None:
            if len(self._known) >= MOST_PLANS:
                self._known.clear()
            plan = self._known[key] = self._make(*key)
        return plan
