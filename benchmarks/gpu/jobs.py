"""The parts as jobs, each in a process of its own, so that a crash or a hanging kernel costs one part and no more.

First what needs no quiet GPU, side by side: whether results are right, and the compilation of everything that will be
measured, which fills Triton's cache on the disk. Then the measurements, one after the other. The time that is left is
shared out among what is left to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .findings import Findings
from .setting import Setting

MACHINE, TOGETHER, ALONE = range(3)  # phases
COMPILERS = {"layers": 2, "sweep": 6}  # processes that compile for a part
CHECKERS = 4  # processes that compare results of one dtype
GRACE = 15.0  # seconds that a job may take longer than it was told


@dataclass(frozen=True)
class Job:
    """`part` is what `--only` asks for; `seconds` its share of ten minutes. `compiles`: nothing is measured."""

    part: str
    seconds: float
    phase: int
    argument: str = ""
    compiles: bool = False

    @property
    def name(self) -> str:
        """What it is called in the results."""
        return f"{'compile ' if self.compiles else ''}{self.part}{f' {self.argument}' if self.argument else ''}"


JOBS = (
    Job("machine", 25, MACHINE),
    *(
        Job("agreement", 160, TOGETHER, f"{dtype}, {number + 1} of {CHECKERS}")
        for dtype in ("bfloat16", "float16", "float32")
        for number in range(CHECKERS)
    ),
    Job("operators", 160, TOGETHER),
    Job("sanitizer", 160, TOGETHER),
    *(Job(p, 160, TOGETHER, f"{i + 1} of {n}", compiles=True) for p, n in COMPILERS.items() for i in range(n)),
    Job("layers", 130, ALONE),
    Job("decode", 70, ALONE),
    Job("qlora", 50, ALONE),
    Job("quantizing", 50, ALONE),
    Job("sweep", 70, ALONE),
)
PARTS = tuple(dict.fromkeys(job.part for job in JOBS))
TOTAL = 580.0  # seconds of the whole check


def chosen(only: Sequence[str]) -> list[list[Job]]:
    """Jobs that run at the same time, in order: all parts, or those asked for and what they need."""
    jobs = [job for job in JOBS if not only or job.part in only or job.phase == MACHINE]
    together = [job for job in jobs if job.phase == TOGETHER]
    first = [[job] for job in jobs if job.phase == MACHINE]
    return [*first, *([together] if together else []), *([job] for job in jobs if job.phase == ALONE)]


def allowed(groups: Sequence[Sequence[Job]], left: float) -> float:
    """Seconds for the first of the groups that are left to run, of the seconds that are left.

    Where there is more time than usual a group gets more, but not so much that it would never be killed.
    """
    usual = [max(job.seconds for job in group) for group in groups]
    share = usual[0] * left / sum(usual)
    return max(0.0, min(share, 2 * usual[0], left) - GRACE / len(groups))


def share_of(argument: str) -> tuple[int, int]:
    """(i, n) of "i + 1 of n"."""
    number, _, count = argument.partition(" of ")
    return int(number) - 1, int(count)


def run(job: Job, setting: Setting, findings: Findings, folder: Path, script: Path) -> None:
    """Do a job in this process. What it raises is a finding. Imports only what the job needs."""

    def work() -> None:
        part, told = job.part, setting
        if job.compiles:
            told = replace(setting, only_compile=True, share=share_of(job.argument))
        if part == "machine":
            from . import machine

            machine.run(told, findings)
        elif part == "agreement":
            from . import agreement

            dtype, _, share = job.argument.partition(", ")
            agreement.run(replace(told, share=share_of(share)), findings, dtype)
        elif part == "families":
            from . import agreement

            agreement.families(told, findings)
        elif part == "operators":
            from . import operators

            operators.run(told, findings)
        elif part == "sanitizer":
            from . import sanitizer

            sanitizer.run(told, findings, script, max(1.0, told.ends - time.monotonic()), sanitizer.tool())
        elif part == "layers":
            from . import layers

            layers.run(told, findings, ceilings_in(folder))
        elif part == "decode":
            from . import decode

            decode.run(told, findings)
        elif part == "qlora":
            from . import qlora

            qlora.run(told, findings)
        elif part == "quantizing":
            from . import quantizing

            quantizing.run(told, findings)
        elif part == "sweep":
            from . import sweep

            sweep.run(told, findings)
        else:
            raise ValueError(f"there is no part {part!r}")

    findings.guard(work)


def named(name: str) -> Job:
    """A job by its name; "families" is what the sanitizer runs."""
    return next((job for job in JOBS if job.name == name), Job(name, TOTAL, TOGETHER))


def path_of(job: Job, folder: Path) -> Path:
    """Where a job writes what it finds."""
    return folder / f"{job.name.replace(' ', '_')}.json"


def read(path: Path) -> dict[str, Any] | None:
    """What a job has written so far."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def ceilings_in(folder: Path) -> dict[str, float]:
    """What the job "machine" measured, nothing if it did not."""
    found = read(path_of(named("machine"), folder)) or {}
    ceilings: dict[str, float] = found.get("ceilings", {})
    return ceilings
