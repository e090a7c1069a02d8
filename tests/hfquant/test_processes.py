"""Several processes that calibrate one model together give what one gives, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfquant import processes
from hfquant.journal import JOURNAL_NAME
from hfquant.report import REPORT_NAME
from hfquant.staging import partial_folder
from hfquant.stats import HESSIAN, InputStats
from hfquant.testing.tiny import tiny_model
from tests.fresh import run_ranks

# Starved experts and an output layer included; `stop` kills the whole run in the second block.
RUN = """
import os, signal, sys
from pathlib import Path
import torch
import hfquant
from hfquant.calibration_state import Settings

source, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ids = torch.randint(3, 256, (6, 13), generator=torch.Generator().manual_seed(0))

def tick(what, share):
    if what == stop and share > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

for kind in sys.argv[4:]:
    config = hfquant.HfQuantConfig("gptq", group_size=32, data=ids, batch_size=2, modules_to_not_convert=[])
    hfquant.quantize(source / kind, config, out / kind, tick=tick, settings=Settings(min_tokens=35))
"""

TOOLS = """
import sys, torch
import torch.distributed as dist
from hfquant import processes
from hfquant.stats import HESSIAN, InputStats
from safetensors.torch import save_file

dist.init_process_group("gloo")
rank = processes.rank()
stats = InputStats(3, frozenset({HESSIAN}))
if rank == 1:  # the first process saw nothing
    stats.add(torch.arange(6.0).reshape(2, 3))
processes.merge(stats)
made = processes.from_owner(1, {"a": torch.empty(2, device="meta")}, lambda: {"a": torch.tensor([3.0, 4.0])})
assert processes.world() == 2 and processes.total(rank + 1.5) == 4
assert processes.gather_notes([f"of {rank}", rank]) == ["of 0", 0, "of 1", 1]
assert processes.of_first({"rank": rank}) == {"rank": 0}
assert processes.of_first(None if rank else [1]) == [1]
assert stats.tokens == 2
save_file({"a": made["a"], "gram": stats.gram, "sample": stats.sample, "absmax": stats.absmax}, sys.argv[1] + str(rank))
dist.destroy_process_group()
"""


def start(script: str, *arguments: object, count: int = 2) -> list[int]:
    """Run a script in some processes that know of each other, to the end of the last; returns their exit codes."""
    ends = run_ranks(script, *arguments, count=count)
    print(*(end.stderr for end in ends), sep="\n")  # what pytest shows if the test fails
    return [end.returncode for end in ends]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "1" and "2" with what as many processes give, and "source"."""
    root = tmp_path_factory.mktemp("processes")
    for kind in ("llama", "mixtral"):
        tiny_model(kind, dtype=torch.bfloat16).save_pretrained(root / "source" / kind)
    for count in (1, 2):
        assert start(RUN, root / "source", root / str(count), "", "llama", "mixtral", count=count) == [0] * count
    return root


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_processes_give_the_bytes_that_one_gives(kind: str, results: Path) -> None:
    one, two = results / "1" / kind, results / "2" / kind
    files = sorted(file.name for file in one.iterdir())
    assert files == sorted(file.name for file in two.iterdir()) and len(files) == 7
    for name in files:
        if name != REPORT_NAME:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert any(value.any() for name, value in load_file(one / files[3]).items() if name.endswith("codes"))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_processes_find_what_one_finds(kind: str, results: Path) -> None:
    reports = [json.loads((results / str(count) / kind / REPORT_NAME).read_text()) for count in (1, 2)]
    one, two = ([layer for block in report["blocks"] for layer in block["layers"]] for report in reports)
    assert [(a["name"], a["tokens"], a["notes"]) for a in one] == [(b["name"], b["tokens"], b["notes"]) for b in two]
    assert all(layer["error"] > 0 if layer["tokens"] else layer["error"] is None for layer in two)
    for a, b in zip(reports[0]["blocks"], reports[1]["blocks"], strict=True):
        assert (a["error"] is None) == (a["name"] == "")
        assert a["error"] == (b["error"] and pytest.approx(b["error"], rel=1e-6))
    if kind == "mixtral":
        assert any("rounded to nearest" in note for layer in two for note in layer["notes"])


def test_killed_processes_go_on_together(results: Path, tmp_path: Path) -> None:
    assert -signal.SIGKILL in start(RUN, results / "source", tmp_path, "model.layers.1", "llama")
    lines = (partial_folder(tmp_path / "llama") / JOURNAL_NAME).read_text().splitlines()
    assert [json.loads(line).get("name") for line in lines[1:]] == ["model.layers.0"]
    assert start(RUN, results / "source", tmp_path, "", "llama") == [0, 0]
    for name in ("config.json", *(f"hfquant-0000{number}-of-00003.safetensors" for number in (1, 2, 3))):
        assert (tmp_path / "llama" / name).read_bytes() == (results / "1" / "llama" / name).read_bytes(), name


def test_statistics_notes_and_tensors_are_exchanged(tmp_path: Path) -> None:
    assert start(TOOLS, f"{tmp_path}/") == [0, 0]
    one, two = load_file(tmp_path / "0"), load_file(tmp_path / "1")
    assert all(torch.equal(one[name], two[name]) for name in one)
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(one["sample"], x) and torch.equal(one["absmax"], x[1]) and one["a"].tolist() == [3, 4]
    assert torch.equal(one["gram"], x.double().T @ x.double())


def test_one_process_needs_nobody() -> None:
    stats = InputStats(2, frozenset({HESSIAN}))
    stats.add(torch.ones(3, 2))
    processes.merge(stats)
    processes.barrier()
    assert stats.tokens == 3 and processes.world() == 1 and processes.rank() == 0
    assert processes.total(1.5) == 1.5 and processes.gather_notes(["a"]) == ["a"] and processes.of_first(2) == 2
    assert processes.from_owner(0, {}, lambda: {"a": torch.ones(1)})["a"].tolist() == [1]
