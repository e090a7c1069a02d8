"""One table per axis: a name, the object it stands for, and the backend that brought it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Generic, TypeVar

from .errors import BackendError, SpecError

T = TypeVar("T")

# Set by `backend.py`: bring in plugins when a name is not known yet, so that no plugin is imported before it is needed.
_discover: list[Callable[[str], None]] = []
_explain: list[Callable[[], str]] = []


def on_missing(*discover: Callable[[str], None], explain: Callable[[], str]) -> None:
    """Set the functions that are told an unknown name, one after the other until one has registered it.

    `explain` then says what else might have had the name: text to add to the error, or "".
    """
    _discover[:] = discover
    _explain[:] = [explain]


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

    def entries(self) -> dict[str, tuple[T, str]]:
        """A copy of all entries, name -> (value, owner), for `restore`."""
        return dict(self._entries)

    def restore(self, entries: dict[str, tuple[T, str]]) -> None:
        """Go back to the entries of an earlier moment."""
        self._entries = dict(entries)

    def get(self, name: str) -> T:
        """Look a name up, loading plugins if it is unknown.

        Raises SpecError listing what there is, BackendError when the plugin of that name is broken.
        """
        if not isinstance(name, str):
            raise SpecError(f"the name of a {self.axis} is a string, got {name!r}")
        for discover in _discover:
            if name in self._entries:
                break
            discover(name)
        if name not in self._entries:
            near = get_close_matches(name, self.names(), 1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.names()) or "none"
            more = "".join(explain() for explain in _explain)
            raise SpecError(
                f"unknown {self.axis} {name!r}.{guess} Installed are {known}. See `hfquant backends`.{more}"
            )
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
