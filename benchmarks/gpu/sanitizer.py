"""Does any kernel touch memory that is not its own? compute-sanitizer over one small layer of each family.

Memory is not cached by torch meanwhile, so that each tensor ends where its memory ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .findings import Findings
from .setting import Setting

PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
FOUND = 86  # exit status for an error that the tool found
TAIL = 4000  # characters of the report that are kept
ABSENT = "compute-sanitizer is not installed"


def tool() -> str | None:
    """Path of the program."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def command(program: str, script: Path, seconds: float) -> list[str]:
    """The families under the tool, in a process of their own."""
    options = ["--tool", "memcheck", "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    child = [sys.executable, str(script), "--child", "families", "--seconds", str(int(seconds))]
    return [program, *options, *child]


def refused(text: str) -> str | None:
    """Why the tool does not work on this machine, None if it does."""
    return next((line.strip("= ") for line in text.splitlines() if "evice not supported" in line), None)


def outcome(status: int, text: str) -> dict[str, Any]:
    """What the exit status and the output of a run say."""
    state = "clean" if status == 0 else "errors" if status == FOUND else "failed"
    return {"status": status, "state": state, "report": text[-TAIL:]}


Start = Callable[..., Any]


def run(
    setting: Setting,
    findings: Findings,
    script: Path,
    seconds: float,
    program: str | None,
    start: Start = subprocess.run,
) -> None:
    """Run it, or note that it is not there."""
    if program is None:
        findings.put(absent=ABSENT)
        return
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    call: Sequence[str] = command(program, script, seconds)
    done = start(call, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    text = done.stdout + done.stderr
    if reason := refused(text):
        findings.put(absent=reason)
        return
    with findings.row(tool="memcheck") as line:
        line |= outcome(done.returncode, text)
