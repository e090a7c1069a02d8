"""Backends: what a plugin contributes, and how plugins are found, loaded and kept apart."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import Any

from .columns import COLUMNS
from .errors import BackendError
from .grids import GRIDS, Grid, by_pattern
from .input_ranges import INPUT_RANGES
from .kernel import KERNELS, Kernel, choose
from .layouts import LAYOUTS, Layout
from .ranges import RANGES
from .recipe import PRESETS, Preset
from .rounders import ROUNDERS
from .tables import Table, on_missing
from .transforms import TRANSFORMS, Transform

logger = logging.getLogger(__name__)

API_VERSION = 1
GROUP = "hfquant.backends"


@dataclass(frozen=True)
class Backend:
    """Everything a plugin brings, as plain data.

    `api` is the version of this contract that the plugin was written for. Grids, layouts and kernels carry their own
    names; ranges, input ranges, rounders, columns, transforms and presets are named here.
    """

    name: str
    api: int = API_VERSION
    grids: tuple[Grid, ...] = ()
    layouts: tuple[Layout, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    ranges: Mapping[str, Any] = field(default_factory=dict)
    input_ranges: Mapping[str, Any] = field(default_factory=dict)
    rounders: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def contributions(self) -> list[tuple[Table, str, Any]]:
        """All (table, name, object) this backend adds."""
        named = ((GRIDS, self.grids), (LAYOUTS, self.layouts), (KERNELS, self.kernels))
        found: list[tuple[Table, str, Any]] = [(table, item.name, item) for table, items in named for item in items]
        mapped: tuple[tuple[Table, Mapping[str, Any]], ...] = (
            (RANGES, self.ranges),
            (INPUT_RANGES, self.input_ranges),
            (ROUNDERS, self.rounders),
            (COLUMNS, self.columns),
            (TRANSFORMS, self.transforms),
            (PRESETS, self.presets),
        )
        return found + [(table, name, item) for table, items in mapped for name, item in items.items()]


@dataclass
class Plugin:
    """An installed entry point and what became of it.

    `error`: if it is broken, the traceback, or the text of a clash; `reason`: its last line.
    """

    name: str
    distribution: str
    version: str
    target: str
    backend: Backend | None = None
    error: str | None = None
    reason: str | None = None

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


BACKENDS: Table[Backend] = Table("backend")
TABLES: tuple[Table, ...] = (
    *(BACKENDS, GRIDS, LAYOUTS, KERNELS, RANGES, INPUT_RANGES, ROUNDERS, COLUMNS, TRANSFORMS, PRESETS),
)


def register(backend: Backend, source: str) -> None:
    """Add a backend to all tables, or to none.

    Raises BackendError on another API version, an entry that is not what its table holds, or a name that is taken.
    """
    if backend.api != API_VERSION:
        raise BackendError(
            f"backend {backend.name!r} of {source} is written for API {backend.api!r}, this hfquant has API "
            f"{API_VERSION}: update the one that is older"
        )
    owner = owner_of(backend, source)
    additions = [(BACKENDS, backend.name, backend), *backend.contributions()]
    if problems := [problem for table, name, item in additions if (problem := _problem(table, name, item))]:
        raise BackendError(f"{owner}: " + "; ".join(problems))
    clashes = [clash for table, name, _ in additions if (clash := table.clash(name, owner))]
    twice = [key for key, count in Counter((table.axis, name) for table, name, _ in additions).items() if count > 1]
    clashes += [f"{axis} {name!r} is there twice in {owner}" for axis, name in twice]
    if clashes:
        raise BackendError("; ".join(clashes) + ": uninstall one of them or limit HFQUANT_BACKENDS")
    for table, name, item in additions:
        table.add(name, item, owner)
    choose.cache_clear()  # a new kernel may be better than the ones chosen so far


def unregister(backend: Backend, source: str) -> None:
    """Undo `register`: for tests that try a backend out."""
    for table in TABLES:
        table.drop(owner_of(backend, source))
    choose.cache_clear()


def owner_of(backend: Backend, source: str) -> str:
    """What the tables record as the provider of a backend's entries."""
    return f"{backend.name} [{source}]"


def _problem(table: Table, name: Any, item: Any) -> str | None:
    """Reason why an entry of a backend cannot work, or None."""
    kinds: tuple[type, ...] = (Backend, Grid, Layout, Kernel, Transform)
    tables: tuple[Table, ...] = (BACKENDS, GRIDS, LAYOUTS, KERNELS, TRANSFORMS)
    wanted = next((kind for held, kind in zip(tables, kinds, strict=True) if held is table), None)
    if not isinstance(name, str) or not name:
        return f"{table.axis} {item!r} has the name {name!r}: names are strings that are not empty"
    if wanted is not None and not isinstance(item, wanted):
        return f"{table.axis} {name!r} is a {type(item).__name__}, not a {wanted.__name__}"
    if wanted is None and not callable(item):
        return f"{table.axis} {name!r} is a {type(item).__name__}, which cannot be called"
    if table is GRIDS and (known := by_pattern(name)) is not None:
        return f"grid {name!r} would never be found: the name already means {known!r}"
    return None


_plugins: dict[str, Plugin] = {}
_clashes: list[Plugin] = []
_discovered: list[bool] = []
_loading: list[Plugin] = []
_lock = RLock()


def _discover() -> dict[str, Plugin]:
    """Read entry-point metadata once, importing nothing."""
    with _lock:
        if not _discovered:
            only = os.environ.get("HFQUANT_BACKENDS")
            allowed = None if only is None else {name.strip() for name in only.split(",")}
            found = [_described(point) for point in entry_points(group=GROUP)]
            # The order on disk is arbitrary, and must not decide who is first.
            for plugin in sorted(found, key=lambda plugin: (plugin.name, plugin.distribution, plugin.target)):
                if allowed is None or plugin.name in allowed:
                    _note(plugin)
            _discovered.append(True)
    return _plugins


def _described(point: EntryPoint) -> Plugin:
    """An entry point with the distribution it comes from; damaged metadata must not hide the others."""
    metadata = point.dist.metadata if point.dist else None
    known = {key: metadata[key] for key in ("Name", "Version") if key in metadata} if metadata else {}
    return Plugin(point.name, known.get("Name", "unknown"), known.get("Version", "?"), point.value)


def _note(plugin: Plugin) -> None:
    """Remember a plugin. The same target found twice is one plugin; two targets for one name are refused, both."""
    known = _plugins.setdefault(plugin.name, plugin)
    if known.target != plugin.target:
        _clashes.append(plugin)
        reason = f"entry point {plugin.name!r} is claimed by both {known.source} and {plugin.source}: uninstall one"
        known.error = known.reason = plugin.error = plugin.reason = reason


def _load(plugin: Plugin) -> None:
    """Import a plugin and register it; a failure is kept with its traceback and hurts nobody else."""
    with _lock:
        # A plugin that looks up a name while it is imported comes back here: it must not load itself again.
        if plugin.backend is not None or plugin.error is not None or _loading:
            return
        before = [(table, table.entries()) for table in TABLES]
        _loading.append(plugin)
        try:
            backend = _import(plugin, before)
            register(backend, f"{plugin.distribution} {plugin.version}")
            plugin.backend = backend
        except BaseException as error:
            for table, entries in before:
                table.restore(entries)
            if isinstance(error, KeyboardInterrupt):  # the user's, not the plugin's: it may be tried again
                raise
            plugin.error = traceback.format_exc()
            plugin.reason = f"{type(error).__name__}: {error}"
            if isinstance(error, BackendError):
                logger.warning("backend %s is not used: %s", plugin.source, error)
        finally:
            _loading.clear()


def _import(plugin: Plugin, before: list[tuple[Table, dict]]) -> Backend:
    """The backend behind an entry point. Raises BackendError if it is none, or if importing it had side effects."""
    backend = EntryPoint(plugin.name, plugin.target, GROUP).load()
    if not isinstance(backend, Backend):
        raise BackendError(f"{plugin.source} is a {type(backend).__name__}, not a hfquant Backend")
    if backend.name != plugin.name:
        raise BackendError(f"{plugin.source} holds a backend named {backend.name!r}: give both the same name")
    added = [f"{table.axis} {name!r}" for table, entries in before for name in table.entries().keys() - entries.keys()]
    if added:
        names = ", ".join(sorted(added))
        raise BackendError(f"{plugin.source} registered {names} while it was imported: put it in its Backend instead")
    return backend


def _load_named(name: str) -> None:
    """Load the plugin called `name`, if there is one. Raises BackendError if it is broken."""
    plugin = _discover().get(name)
    if plugin is not None:
        _load(plugin)
        if plugin.error:
            raise BackendError(f"backend {name!r} of {plugin.source} is broken:\n{plugin.error}")


def load_all(name: str = "") -> None:
    """Import every installed plugin, whatever `name` is being looked for."""
    for plugin in _discover().values():
        _load(plugin)


def _explain() -> str:
    """Plugins that might have had a name which nobody has."""
    lines = [f"{plugin.source} is broken: {plugin.reason}" for plugin in _plugins.values() if plugin.reason]
    if (only := os.environ.get("HFQUANT_BACKENDS")) is not None:
        lines.append(f"HFQUANT_BACKENDS={only!r} keeps other backends from being loaded")
    return "".join(f"\n  - {line}" for line in lines)


def backends() -> list[Plugin]:
    """Every installed backend plugin: where it comes from, what it brings, and why it is broken if it is."""
    load_all()
    return sorted([*_plugins.values(), *_clashes], key=lambda plugin: (plugin.name, plugin.distribution))


def provider(table: Table, name: str) -> Plugin | None:
    """The plugin that provides an entry of a table, or None for the core's own."""
    owner = table.owner(name)
    for plugin in _plugins.values():
        if plugin.backend and owner == owner_of(plugin.backend, f"{plugin.distribution} {plugin.version}"):
            return plugin
    return None


def require(name: str, distribution: str | None, version: str | None) -> None:
    """Load the plugin that a checkpoint was made with; nothing is ever installed.

    Raises BackendError with the pip line if it is missing, with its traceback if it is broken.
    """
    if name in _discover():
        _load_named(name)
        return
    only = os.environ.get("HFQUANT_BACKENDS")
    if only is not None and any(point.name == name for point in entry_points(group=GROUP)):
        raise BackendError(
            f"the checkpoint was made with backend {name!r}, which HFQUANT_BACKENDS={only!r} keeps from being loaded"
        )
    made_by = f"{distribution or 'an unknown distribution'} {version or ''}".rstrip()
    raise BackendError(
        f"the checkpoint was made with backend {name!r} of {made_by}, which is not installed. If you trust it:\n"
        f"    pip install {distribution or '<its distribution>'}"
    )


on_missing(_load_named, load_all, explain=_explain)
