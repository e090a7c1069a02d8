"""A forked process is as fresh as one that was started: nothing of hfquant, and nothing of the one before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fresh

TELLS = """
import atexit, os, sys
atexit.register(print, "the end", flush=True)
print(__name__, sys.argv, os.getcwd(), sys.stdin.read(), os.environ["ASKED"])
print("an error", file=sys.stderr)
"""


def test_a_program_gets_and_says_what_it_would_in_a_started_process(tmp_path: Path) -> None:
    environment = {**os.environ, "ASKED": "value"}
    forked = fresh.run(TELLS, "one", 2, cwd=tmp_path, environment=environment, text="read")
    command = [sys.executable, "-c", TELLS, "one", "2"]
    started = subprocess.run(command, cwd=tmp_path, env=environment, input="read", capture_output=True, text=True)
    assert (forked.returncode, forked.stdout, forked.stderr) == (0, started.stdout, started.stderr)


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_every_end_has_its_exit_code(program: str, code: int, said: str) -> None:
    done = fresh.run(program)
    assert done.returncode == code and done.stderr.endswith(said)


def test_nothing_is_left_of_the_process_before() -> None:
    change = "import hfquant, os, sys; sys.left = os.environ['LEFT'] = 'left'; hfquant.HfQuantConfig('int4')"
    look = "import os, sys; print(hasattr(sys, 'left'), 'LEFT' in os.environ, 'hfquant' in sys.modules)"
    assert fresh.run(change).returncode == 0
    assert fresh.run(look).stdout.split() == ["False"] * 3


def test_processes_that_know_of_each_other_run_side_by_side() -> None:
    program = (
        "import sys, torch, torch.distributed as dist; dist.init_process_group('gloo')\n"
        "x = torch.tensor([float(dist.get_rank() + 1)]); dist.all_reduce(x); print(dist.get_world_size(), x.item())"
    )
    assert [done.stdout for done in fresh.run_ranks(program)] == ["2 3.0\n"] * 2
