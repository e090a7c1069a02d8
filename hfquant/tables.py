"""One table per axis: a name, the object it stands for, and the backend that brought it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .errors import BackendError, SpecError

T = TypeVar("T")

# Set by `backend.py`: brings in plugins when a name is not known yet, so that no plugin is imported before it is needed.
_discover: list[Callable[[str], None]] = []


def on_missing(discover: Callable[[str], None]) -> None:
    """Set the function that is told an unknown name and may register more entries."""
    _discover[:] = [discover]


class Table(Generic[T]):
    """Names of one axis, such as the grids or the layouts."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self._entries: dict[str, tuple[T, str]] = {}

    def clash(self, name: str, owner: str) -> str | None:
        """Say why `owner` cannot have `name`, or None when it can."""
        if name not in self._entries:
            return None
        return f"{self.axis} {name!r} of {owner} is already provided by {self._entries[name][1]}"

    def add(self, name: str, value: T, owner: str) -> None:
        """Register `value` under `name`. Raises BackendError when the name is taken."""
        if reason := self.clash(name, owner):
            raise BackendError(reason)
        self._entries[name] = (value, owner)

    def drop(self, owner: str) -> None:
        """Forget all entries of one backend."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry[1] != owner}

    def get(self, name: str) -> T:
        """Look a name up, loading plugins if it is unknown. Raises SpecError listing what there is."""
        if name not in self._entries:
            for discover in _discover:
                discover(name)
        if name not in self._entries:
            known = ", ".join(self.names())
            raise SpecError(f"unknown {self.axis} {name!r}: installed are {known}. See `hfquant backends`.")
        return self._entries[name][0]

    def owner(self, name: str) -> str:
        """Name of the backend that provides `name`."""
        self.get(name)
        return self._entries[name][1]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
