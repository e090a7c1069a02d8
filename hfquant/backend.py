"""Backends: what a plugin contributes, and how plugins are found, loaded and kept apart."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .columns import COLUMNS
from .errors import BackendError
from .grids import GRIDS, Grid
from .kernel import KERNELS, Kernel
from .layouts import LAYOUTS, Layout
from .ranges import RANGES
from .recipe import PRESETS, Preset
from .rounders import ROUNDERS
from .tables import Table, on_missing

API_VERSION = 1
GROUP = "hfquant.backends"


@dataclass(frozen=True)
class Backend:
    """Everything a plugin brings, as plain data.

    `api` is the version of this contract that the plugin was written for. Grids, layouts and kernels carry their own
    names; ranges, rounders, columns and presets are named here.
    """

    name: str
    api: int = API_VERSION
    grids: tuple[Grid, ...] = ()
    layouts: tuple[Layout, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    ranges: Mapping[str, Any] = field(default_factory=dict)
    rounders: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def contributions(self) -> list[tuple[Table, str, Any]]:
        """All (table, name, object) this backend adds."""
        named = ((GRIDS, self.grids), (LAYOUTS, self.layouts), (KERNELS, self.kernels))
        found: list[tuple[Table, str, Any]] = [(table, item.name, item) for table, items in named for item in items]
        mapped: tuple[tuple[Table, Mapping[str, Any]], ...] = (
            (RANGES, self.ranges),
            (ROUNDERS, self.rounders),
            (COLUMNS, self.columns),
            (PRESETS, self.presets),
        )
        return found + [(table, name, item) for table, items in mapped for name, item in items.items()]


@dataclass
class Plugin:
    """An installed entry point and what became of it: `error` is a traceback if it is broken."""

    name: str
    distribution: str
    version: str
    target: str
    backend: Backend | None = None
    error: str | None = None

    @property
    def source(self) -> str:
        """Distribution, version and entry point, for messages."""
        return f"{self.distribution} {self.version} ({self.name} = {self.target})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = (
            sorted(name for table, name, _ in self.backend.contributions() if table is PRESETS) if self.backend else []
        )
        state = "broken" if self.error else "ok"
        return {
            "name": self.name,
            "state": state,
            "distribution": self.distribution,
            "version": self.version,
            "entry_point": self.target,
            "methods": found,
            "error": self.error,
        }


def register(backend: Backend, source: str) -> None:
    """Add a backend to all tables, or to none. Raises BackendError on another API version or a name that is taken."""
    if backend.api != API_VERSION:
        raise BackendError(
            f"backend {backend.name!r} of {source} is written for API {backend.api}, this hfquant has API {API_VERSION}: "
            "update the one that is older"
        )
    owner = f"{backend.name} [{source}]"
    clashes = [clash for table, name, _ in backend.contributions() if (clash := table.clash(name, owner))]
    if clashes:
        raise BackendError("; ".join(clashes) + ": uninstall one of them or limit HFQUANT_BACKENDS")
    for table, name, item in backend.contributions():
        table.add(name, item, owner)


_plugins: dict[str, Plugin] = {}
_clashes: list[Plugin] = []
_discovered: list[bool] = []


def _discover() -> dict[str, Plugin]:
    """Read entry-point metadata once, importing nothing."""
    if not _discovered:
        _discovered.append(True)
        only = os.environ.get("HFQUANT_BACKENDS")
        allowed = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
        for point in entry_points(group=GROUP):
            if allowed is None or point.name in allowed:
                _note(point)
    return _plugins


def _note(point: EntryPoint) -> None:
    """Remember an entry point; the same one found twice on the path counts once, two different ones clash."""
    distribution = point.dist.name if point.dist else "unknown"
    version = point.dist.version if point.dist else "?"
    plugin = Plugin(point.name, distribution, version, point.value)
    known = _plugins.get(point.name)
    if known is None:
        _plugins[point.name] = plugin
    elif (known.distribution, known.target) != (plugin.distribution, plugin.target):
        plugin.error = f"entry point {plugin.name!r} of {plugin.source} is already taken by {known.source}"
        _clashes.append(plugin)


def _load(plugin: Plugin) -> None:
    """Import a plugin and register it; a failure is kept with its traceback and hurts nobody else."""
    if plugin.backend is not None or plugin.error is not None:
        return
    try:
        backend = EntryPoint(plugin.name, plugin.target, GROUP).load()
        if not isinstance(backend, Backend):
            raise BackendError(f"{plugin.source} is a {type(backend).__name__}, not a hfquant Backend")
        register(backend, f"{plugin.distribution} {plugin.version}")
        plugin.backend = backend
    except Exception:
        plugin.error = traceback.format_exc()


def _on_missing(name: str) -> None:
    """Load the plugin called `name`, or else all of them. Raises BackendError if that very plugin is broken."""
    plugins = _discover()
    if name in plugins:
        _load(plugins[name])
        if plugins[name].error:
            raise BackendError(f"backend {name!r} of {plugins[name].source} is broken:\n{plugins[name].error}")
    else:
        load_all()


def load_all() -> None:
    """Import every installed plugin."""
    for plugin in _discover().values():
        _load(plugin)


def backends() -> list[Plugin]:
    """Every installed backend plugin: where it comes from, what it brings, and why it is broken if it is."""
    load_all()
    return [*_plugins.values(), *_clashes]


def origin(method: str) -> Plugin | None:
    """The plugin that provides a method, or None for the core's own."""
    PRESETS.get(method)
    loaded: Iterable[Plugin] = (plugin for plugin in _plugins.values() if plugin.backend is not None)
    return next((plugin for plugin in loaded if plugin.backend and method in plugin.backend.presets), None)


on_missing(_on_missing)
