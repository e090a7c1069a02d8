"""`hfquant doctor`: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from ..build import Build, BuildError, build_cpu_library
from ..doctor import examine, is_broken
from ..errors import UnsupportedError
from .output import STATES, print_json, stdout, table


def doctor_command(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the CPU kernels first; needs a C++ compiler.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check versions, plugins, devices, kernels and disk; exit status 1 if something is broken."""
    built = _build() if build else None
    if built is not None and not json:
        stdout().print(*map(escape, [*built.lines(), built.warnings]), sep="\n", soft_wrap=True)
    checks = examine()
    if json:
        result = {"broken": is_broken(checks), "checks": [check.to_dict() for check in checks]}
        print_json(result if built is None else {"build": asdict(built), **result})
    else:
        made = table("topic", "what", "state", "detail")
        last = ""
        for check in checks:
            topic = "" if check.topic == last else check.topic
            made.add_row(topic, check.name, STATES[check.state], escape(check.detail))
            last = check.topic
        out = stdout()
        out.print(made)
        out.print("\nSomething is broken." if is_broken(checks) else "\nNothing is broken.")
    if is_broken(checks):
        raise typer.Exit(1)


def _build() -> Build:
    try:
        return build_cpu_library()
    except BuildError as problem:
        raise UnsupportedError(f"the CPU kernels cannot be compiled here: {problem}") from problem
