"""`hfquant backends`: what is installed, from where, and what is broken."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..backend import backends
from ..recipe import PRESETS
from .output import STATES, print_json, stdout, table


def backends_command(json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the backends that are installed, their methods, and what is broken and why."""
    plugins = backends()
    methods = {name: list(inspect.signature(PRESETS.get(name)).parameters) for name in PRESETS.names()}
    if json:
        owners = {name: _owner(name) for name in methods}
        listed = [{"name": name, "backend": owners[name], "options": options} for name, options in methods.items()]
        print_json({"backends": [plugin.to_dict() for plugin in plugins], "methods": listed})
        return
    out = stdout()
    made = table("backend", "state", "from", "methods")
    core = [name for name in methods if _owner(name) == "core"]
    made.add_row("core", STATES["ok"], "hfquant", f"{len(core)}, below")
    for plugin in plugins:
        data = plugin.to_dict()
        source = f"{data['distribution']} {data['version']}"
        made.add_row(plugin.name, STATES[data["state"]], source, ", ".join(data["methods"]) or "-")
    out.print(made)
    out.print()
    out.print(_methods_table(methods))
    for plugin in plugins:
        if plugin.error:
            out.print(f"\n[bold red]{escape(plugin.name)} is broken:[/]")
            out.print(escape(plugin.error.rstrip()), soft_wrap=True)


def _methods_table(methods: dict[str, list[str]]) -> Any:
    """Methods grouped by what they take."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, options in methods.items():
        groups.setdefault((_owner(name), *options), []).append(name)
    made = table("methods", "options")
    for (_, *options), names in groups.items():
        made.add_row(" ".join(names), ", ".join(options) or "none")
        made.add_row()
    return made


def _owner(method: str) -> str:
    """Name of the backend that provides a method."""
    return PRESETS.owner(method).partition(" ")[0]
