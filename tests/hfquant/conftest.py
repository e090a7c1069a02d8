"""Hypothesis is deterministic here: the same examples on every machine, and no deadline on busy ones."""

from collections.abc import Callable

import pytest
from hypothesis import settings

from hfquant.cpu import Library

settings.register_profile("hfquant", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("hfquant")


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Of how many products or steps each call of a function of the CPU library is, "jobs" or "steps", from now on."""

    def count(name: str) -> list[int]:
        counts: list[int] = []
        original = getattr(Library, name)
        monkeypatch.setattr(Library, name, lambda self, *rest: (counts.append(rest[1]), original(self, *rest))[1])
        return counts

    return count
