"""What a calibrated quantization is going to take, for people."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape

from .output import table


def show_estimate(out: Console, estimate: dict[str, Any], data: str | None) -> None:
    """Print the memory and the time that are expected, by what they are for, and the data that is going to be read."""
    out.print(f"Will be calibrated on {escape(data)}" if data else "No calibration data is given: name it with --data.")
    out.print()
    made = table("estimate", "MB", "time", right=("MB", "time"))
    for name, size in estimate["memory"].items():
        made.add_row(name, _mb(size), "")
    made.add_row("[bold]largest memory[/]", f"[bold]{_mb(estimate['peak_mb'])}[/]", "")
    for name, seconds in estimate["seconds"].items():
        made.add_row(name, "", duration(seconds))
    made.add_row("[bold]time[/]", "", f"[bold]{duration(estimate['total_seconds'])}[/]")
    out.print(made)
    threads = "1 thread" if estimate["threads"] == 1 else f"{estimate['threads']} threads"
    out.print(
        f"From the speed of small matrix products on this machine ({threads}). Not all is held at once.",
        style="dim",
    )
    out.print()


def _mb(size: float) -> str:
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}"


def duration(seconds: float) -> str:
    """A time as people say it: "8 s", "0:12:30"."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
