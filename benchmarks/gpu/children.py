"""Starts the processes of jobs, collects what they write while they run, and ends those whose time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .findings import FAILED, RUNNING
from .jobs import GRACE, Job, allowed, path_of, read

Command = Callable[[Job, float], list[str]]
"""What to run for a job that has so many seconds."""
Tell = Callable[[str, dict[str, Any]], None]
"""Is told what a job has found, each time that there is more."""
POLL, TAIL = 0.2, 3000  # seconds between two looks; characters of output that are kept of a crash
OUT_OF_TIME = "out of time"


@dataclass
class Child:
    """One running job; `log` has its output, `ends` is when it is killed."""

    job: Job
    process: subprocess.Popen[bytes]
    folder: Path
    ends: float
    seen: float = 0.0

    @property
    def log(self) -> Path:
        """Everything that it printed."""
        return path_of(self.job, self.folder).with_suffix(".log")

    def changed(self) -> dict[str, Any] | None:
        """What it has written since the last look, None for nothing new."""
        path = path_of(self.job, self.folder)
        when = path.stat().st_mtime_ns if path.exists() else 0
        if when == self.seen:
            return None
        self.seen = when
        return read(path)

    def verdict(self) -> dict[str, Any]:
        """What it found in the end; a process that died leaves the end of its output."""
        found = read(path_of(self.job, self.folder)) or {"rows": []}
        if found.get("state", RUNNING) == RUNNING:
            found["state"] = FAILED
            found["error"] = f"exit status {self.process.returncode}\n{self.log.read_text(errors='replace')[-TAIL:]}"
        return found


def start(job: Job, command: list[str], folder: Path, ends: float) -> Child:
    """A process for a job, in which a layer that only the reference kernel can run is an error."""
    environment = {**os.environ, "HFQUANT_STRICT": "1"}
    with path_of(job, folder).with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Child(job, process, folder, ends)


def end(child: Child) -> None:
    """End a process, if it has not ended, and everything that it has left behind: the sanitizer has a child."""
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()


def watch(children: Sequence[Child], tell: Tell) -> None:
    """Until all have ended, or have been ended."""
    running = list(children)
    try:
        while running:
            for child in list(running):
                ended, late = child.process.poll() is not None, time.monotonic() > child.ends
                if ended or late:
                    end(child)
                    running.remove(child)
                    tell(child.job.name, child.verdict() | ({"state": OUT_OF_TIME} if not ended else {}))
                elif (found := child.changed()) is not None:
                    tell(child.job.name, found)
            time.sleep(POLL if running else 0)
    finally:
        for child in running:
            end(child)


def run_all(groups: Sequence[Sequence[Job]], command: Command, folder: Path, seconds: float, tell: Tell) -> None:
    """All groups within so many seconds."""
    ends = time.monotonic() + seconds
    for number, group in enumerate(groups):
        told = allowed(groups[number:], ends - time.monotonic())
        if told <= 0:
            for job in group:
                tell(job.name, {"state": OUT_OF_TIME, "rows": [], "seconds": 0.0})
            continue
        limit = min(time.monotonic() + told + GRACE, ends)
        watch([start(job, command(job, told), folder, limit) for job in group], tell)
