"""`hfquant doctor`: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..doctor import examine, is_broken
from .output import STATES, print_json, stdout, table


def doctor_command(json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False) -> None:
    """Check versions, plugins, devices, kernels and disk; exit status 1 if something is broken."""
    checks = examine()
    if json:
        print_json({"broken": is_broken(checks), "checks": [check.to_dict() for check in checks]})
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
