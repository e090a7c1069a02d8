"""What the commands print: results on the standard output, progress and errors on the standard error."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from logging import ERROR, getLogger
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

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
    """Whether progress bars are wanted: on a terminal, unless switched off as for the Hub's own bars.

    Of several processes that share a terminal (torchrun) the first one shows them.
    """
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return sys.stderr.isatty() and not off and os.environ.get("RANK", "0") == "0"


def quiet_loading(verbose: bool) -> None:
    """Silence transformers' bars where ours are silent, and notes of libraries to each other unless asked for."""
    from transformers.utils import logging

    if not shows_progress():
        logging.disable_progress_bar()
    if verbose:
        logging.set_verbosity_info()
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    getLogger("bitsandbytes").setLevel(ERROR)


@contextmanager
def progress(label: str, total: int) -> Iterator[Tick]:
    """A bar with the time that is left, over `total` steps; call what it yields after each."""
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with _bar(*columns) as bar:
        task = bar.add_task(label, total=total)

        def tick(now: str = "") -> None:
            bar.update(task, advance=1, description=now or label)

        yield tick


@contextmanager
def share_progress(label: str) -> Iterator[Callable[[str, float], None]]:
    """A bar for work that says what it is at and which share of it is done, 0 to 1: call what it yields with both."""
    left = TimeLeft()
    with _bar(TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), left) as bar:
        task = bar.add_task(label, total=1.0)

        def tick(now: str, share: float) -> None:
            left.note(share)
            bar.update(task, completed=share, description=now)

        yield tick


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """A bar on the standard error, if one is wanted.

    transformers' own bars are off meanwhile: two live bars would overwrite each other.
    """
    from transformers.utils import logging

    shown = (TextColumn("{task.description}"), BarColumn(bar_width=24), *columns)
    with Progress(*shown, console=stderr(), transient=True, disable=not shows_progress()) as bar:
        logging.disable_progress_bar()
        try:
            yield bar
        finally:
            if shows_progress():
                logging.enable_progress_bar()


class TimeLeft(ProgressColumn):
    """The time that is left, from how fast the last steps went.

    Steps may take minutes, of which rich's own column makes nothing; and those that an interrupted run had finished are
    far faster than the others, which the average over all would carry along.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, steps: int = 16) -> None:
        super().__init__()
        self.clock = clock
        self.noted: deque[tuple[float, float]] = deque(maxlen=steps + 1)

    def note(self, share: float) -> None:
        """`share` of the work is done now."""
        self.noted.append((self.clock(), share))

    def seconds(self) -> float | None:
        """Seconds from now to the end, None as long as nothing is known."""
        if len(self.noted) < 2:
            return None
        (begin, low), (end, high) = self.noted[0], self.noted[-1]
        if high <= low:
            return None
        return max(0.0, (1 - high) * (end - begin) / (high - low) - (self.clock() - end))

    def render(self, task: Task) -> Text:
        """The time as hours, minutes and seconds."""
        left = self.seconds()
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


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
