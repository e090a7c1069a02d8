"""What the commands print: results on the standard output, progress and errors on the standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..coverage import Coverage
from ..report import strict_json

Tick = Callable[[str], None]
"""Called once for each finished step, with what is done next or nothing."""

STATES = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]broken[/]"}


def stdout() -> Console:
    """Console for results; made anew because tests and pipes swap `sys.stdout`."""
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Console for progress and errors."""
    return Console(stderr=True, highlight=False)


def error(message: str) -> None:
    """Print an error message as it is."""
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def print_json(data: Any) -> None:
    """Print a result for programs; infinite intervals become null, which JSON has."""
    print(strict_json(data))


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table with headings; the columns in `right` are aligned to the right."""
    made = Table(title=title, box=None, pad_edge=False, title_justify="left", header_style="bold", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def shows_progress() -> bool:
    """Whether progress bars are wanted: on a terminal, unless switched off as for the Hub's own bars."""
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return sys.stderr.isatty() and not off


def quiet_loading(verbose: bool) -> None:
    """Silence transformers' bars where ours are silent, and its notes unless they are asked for."""
    from transformers.utils import logging

    if not shows_progress():
        logging.disable_progress_bar()
    if verbose:
        logging.set_verbosity_info()


@contextmanager
def progress(label: str, total: int) -> Iterator[Tick]:
    """A bar with the time that is left, over `total` steps; call what it yields after each.

    transformers' own bars are off meanwhile: two live bars would overwrite each other.
    """
    from transformers.utils import logging

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True, disable=not shows_progress()) as bar:
        task = bar.add_task(label, total=total)

        def tick(now: str = "") -> None:
            bar.update(task, advance=1, description=now or label)

        logging.disable_progress_bar()
        try:
            yield tick
        finally:
            if shows_progress():
                logging.enable_progress_bar()


def method_label(method: str, options: dict[str, Any]) -> str:
    """A method with the options that were given, as `--option` takes them."""
    return " ".join([method, *(f"{key}={json.dumps(value)}" for key, value in options.items())])


def coverage_table(coverage: Coverage) -> Table:
    """What is quantized and what is not, and why, most bytes first."""
    made = table("weights", "MB", "share", "why", right=("MB", "share"))
    made.add_row("quantized", f"{coverage.quantized / 1e6:.2f}", f"{coverage.share:.1%}", "")
    for reason, (size, names) in coverage.by_reason().items():
        what = names[0] if len(names) == 1 else f"{len(names)} modules"
        made.add_row(what, f"{size / 1e6:.2f}", f"{size / max(coverage.total, 1):.1%}", reason)
    return made
