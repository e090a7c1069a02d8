"""Fresh Python processes without the seconds that importing torch and transformers takes.

A server imports the libraries once and forks: what runs in the copy has no hfquant, no plugin and no model in memory,
as after `python -c`, and is offline. Programs that depend on how a library itself is imported (variables that
`huggingface_hub` reads, what an import loads) or on the memory of a whole process need `subprocess` instead.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

TIMEOUT = 300
_TURN = Lock()

# One line of JSON is a list of jobs that run side by side, the answer their exit codes. A copy leaves the loop and runs
# its program. It ends as Python ends, but for the freeing of all memory; its own alarm kills what takes too long.
_SERVER = """
import atexit, gc, importlib, json, os, signal, sys, threading, traceback
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)

gc.freeze()  # else every copy would look at, and so copy, all of it

def copies():
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                return job
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)
    os._exit(0)

job = copies()
signal.alarm(job["timeout"])
for target, (name, mode) in enumerate(zip(job["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
    os.dup2(os.open(name, mode), target)
sys.stdin = open(0)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["environment"])
sys.argv = ["-c", *job["arguments"]]
assert not [name for name in sys.modules if name.startswith("hfquant")], "a fresh process has no hfquant"
code = 0
try:
    exec(compile(job["program"], "<string>", "exec"), {"__name__": "__main__"})
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
_LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torch.export", "transformers", "safetensors.torch"),
    *("transformers.integrations.accelerate", "transformers.integrations.flash_attention"),
    *("transformers.generation", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"),
    *("transformers.models.auto.tokenization_auto", "transformers.quantizers.auto"),
)


@dataclass(frozen=True)
class Job:
    """A program for `python -c` with its arguments; `environment` None is that of this process."""

    program: str
    arguments: Sequence[object] = ()
    environment: dict[str, str] | None = None
    cwd: Path | None = None
    text: str = ""


def run(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process, with the options of `Job`; what it said, and its exit code."""
    return run_together([Job(program, arguments, **options)])[0]


def run_together(jobs: Sequence[Job]) -> list[subprocess.CompletedProcess[str]]:
    """Run programs at the same time, each in a process of its own, to the end of the last."""
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        files = [[Path(folder, f"{number}.{name}") for name in ("in", "out", "err")] for number in range(len(jobs))]
        for job, (text, *said) in zip(jobs, files, strict=True):
            text.write_text(job.text)
            for file in said:
                file.touch()
        codes = _ask([_request(job, names) for job, names in zip(jobs, files, strict=True)])
        return [
            subprocess.CompletedProcess([sys.executable, "-c", job.program], code, out.read_text(), error.read_text())
            for job, code, (_, out, error) in zip(jobs, codes, files, strict=True)
        ]


def subprocess_run(command: list[str], *, input: str = "", env: dict[str, str], **_: Any) -> Any:
    """What `subprocess.run` does with `python -c program` and text, in a fresh process."""
    return run(command[2], *command[3:], environment=env, text=input)


def run_ranks(
    program: str, *arguments: object, count: int = 2, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in processes that know of each other the way those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = {**os.environ, **world, **environment}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_together([Job(program, arguments, rank) for rank in ranks])


def _request(job: Job, files: list[Path]) -> dict[str, Any]:
    environment = dict(os.environ if job.environment is None else job.environment)
    return {
        "program": job.program,
        "arguments": list(map(str, job.arguments)),
        "environment": environment,
        "cwd": str(job.cwd or Path.cwd()),
        "files": list(map(str, files)),
        "timeout": TIMEOUT,
    }


def _ask(requests: list[dict[str, Any]]) -> list[int]:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with _TURN:
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    assert answer, "the server of fresh processes ended"
    return list(json.loads(answer))


@cache
def _server() -> subprocess.Popen[str]:
    """Starts with the first job; it ends with this process, which closes its input."""
    command = [sys.executable, "-c", _SERVER, json.dumps(_LIBRARIES)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server
