"""FPQ in several processes: all of them end with the same numbers, and these are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.hfquant.test_processes import start

# Each process saves what it ends with. The input range of "odd" differs from process to process, as if they had rounded
# differently.
RUN = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from hfquant import HfQuantConfig, processes
from hfquant.backend import Backend, register
from hfquant.blocks import Blocks
from hfquant.calibrate import Calibration
from hfquant.coverage import survey
from hfquant.input_ranges import InputChoice, input_params
from hfquant.presets import kbit
from hfquant.recipe import Step
from hfquant.spec import InputSpec, TensorSpec
from hfquant.stats import InputStats
from hfquant.streaming import join_processes
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_model

def opinion(seen, given):
    tensor = replace(given.tensor, grid=("e2m1", "e3m0")[processes.rank()])
    high = 0.1 + processes.rank()
    return InputChoice(tensor, input_params(-high, high, tensor))

def odd():
    given = InputSpec(TensorSpec("e2m1", Blocks(-1, -1)), dynamic=False)
    recipe = kbit("int8")
    return replace(recipe, scheme=replace(recipe.scheme, input=given), input_range=Step("opinion"))

register(Backend("odd", presets={"odd": odd}, input_ranges={"opinion": opinion}), "tests")
join_processes()
folder, me = Path(sys.argv[1]), f"{processes.rank()} of {processes.world()}"
ids = torch.randint(3, 256, (12, 40), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": part} for part in ids.split(2)]
for name, (method, options) in json.loads(sys.argv[2]).items():
    model = tiny_model("llama")
    config = HfQuantConfig(method, data=list(ids), **options)
    Calibration(model, survey(model, None, False)[0], config, batches).run()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{name} {me}")
    schemes = {key: module.spec.scheme.to_dict() for key, module in packed_modules(model)}
    (folder / f"{name} {me}.json").write_text(json.dumps(schemes))

stats = InputStats(2)
for number in range(processes.rank(), 7, processes.world()):
    tokens = torch.arange(100.0)[: 50 + 10 * number]  # of some batches more, and of some fewer, than are kept
    stats.add(torch.stack([tokens, torch.full_like(tokens, number)], 1), place=number)
processes.merge(stats)
save_file({"sample": stats.sample, "places": stats.places}, folder / f"sample {me}")
"""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("fpq", {"act_bits": 4, "rounds": 2}),
    "token": ("fpq", {"act_bits": 4, "rounds": 2, "inputs": "token"}),
    "odd": ("odd", {}),
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files "CASE RANK of WORLD" with the tensors of a process, and the same with .json for the numbers of layers."""
    folder = tmp_path_factory.mktemp("processes")
    for count in (1, 2):
        assert start(RUN, folder, json.dumps(CASES), count=count) == [0] * count
    return folder


def ends(results: Path, case: str, who: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(results / f"{case} {who}"), json.loads((results / f"{case} {who}.json").read_text())


def assert_same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> None:
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(other[0][name], value) for name, value in one[0].items())


@each_case
def test_all_processes_end_with_the_same_numbers(case: str, results: Path) -> None:
    assert_same(ends(results, case, "0 of 2"), ends(results, case, "1 of 2"))


@each_case
def test_two_processes_find_what_one_finds(case: str, results: Path) -> None:
    one, two = ends(results, case, "0 of 1"), ends(results, case, "0 of 2")
    assert_same(one, two)
    inputs = {scheme["input"]["tensor"]["grid"] for scheme in one[1].values()}
    assert case != "tensor" or len(inputs) > 1, "formats differ from layer to layer, or this shows little"


def test_the_first_process_chooses_for_all(results: Path) -> None:
    tensors, schemes = ends(results, "odd", "1 of 2")
    assert {scheme["input"]["tensor"]["grid"] for scheme in schemes.values()} == {"e2m1"}
    scales = [value for name, value in tensors.items() if name.endswith("input_scale")]
    assert len(scales) == len(schemes)
    assert all(float(scale) == pytest.approx(0.1 / 6) for scale in scales)


def test_the_sample_of_tokens_is_that_of_one_process(results: Path) -> None:
    one, *two = (load_file(results / f"sample {who}") for who in ("0 of 1", "0 of 2", "1 of 2"))
    assert len(one["sample"]) == 256 and torch.equal(one["sample"][:, 1].long(), one["places"])
    for other in two:
        assert torch.equal(other["sample"], one["sample"]) and torch.equal(other["places"], one["places"])
