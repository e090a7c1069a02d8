"""Weights spread over processes (FSDP2) compute and learn what whole ones do; what cannot work is refused."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import HfQuantConfig, UnsupportedError
from hfquant.errors import SpecError
from hfquant.eval import sequence_nll
from hfquant.experts import QExperts
from hfquant.lora.check import check_gradients
from hfquant.nn import PackedModule
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant.tuning import sharded
from hfquant.tuning.request import Request, plan
from hfquant.tuning.rows import read_rows
from tests.fresh import run_ranks

from .conftest import MODEL

SEEN = torch.randint(3, 256, (8, 16), generator=torch.Generator().manual_seed(1))  # what calibrated methods see
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # by `accelerate launch --use_fsdp --fsdp_version 2`
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Every kind of packed tensor: codes of whole and of part bytes, zero points, scales of scales, levels, columns in 16
# bit, ranges of static inputs and of operands of attention, tables of embeddings that the head shares, another basis,
# stacks of experts.
CONFIGS = {
    "nf4": HfQuantConfig("nf4", double_quant=True),
    "int3": HfQuantConfig("int3", group_size=32, embeddings=True),
    "quantile4": HfQuantConfig("quantile4", group_size=32),
    "llm_int8": HfQuantConfig("llm_int8"),
    "fp8": HfQuantConfig("fp8"),
    "gptq": HfQuantConfig("gptq", bits=4, group_size=32, transform="rotate", data=SEEN),
    "w8a8": HfQuantConfig("w8a8", dynamic=False, data=SEEN),
    "fpq": HfQuantConfig("fpq", act_bits=8, attention=True, rounds=1, data=SEEN),
    "experts": HfQuantConfig("int4", group_size=32),
    "tied": HfQuantConfig("int4", group_size=32, embeddings=True),
}
# Codes, scales of scales, scales of 16 bits, levels, and those of experts, in another dtype than theirs.
CAST = {"fp8": torch.bfloat16, "nf4": torch.bfloat16, "int3": torch.float16, "quantile4": torch.bfloat16}
CAST["experts"] = torch.float16
SOURCES = {"experts": "mixtral", "tied": "gpt2"}


def adapted(folder: Path, name: str) -> PeftModel:
    """The quantized model with adapters that do something, one of them DoRA, which reads the packed weight."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16 if name == "fp8" else None)
    torch.manual_seed(0)
    named = {"target_modules": ["c_attn"] if name == "tied" else ["q_proj", "o_proj", "down_proj"]}
    if name == "experts":
        named = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, use_dora=name == "int3", **named))


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Of every adapter, whole."""
    inputs = tiny_inputs(model)
    model.zero_grad()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    check_gradients(model, 1)
    return {name: sharded.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def shard(model: PeftModel) -> None:
    """As accelerate does it before a training."""
    sharded.begin(torch.device("cpu"))
    fsdp2_prepare_model(Accelerator(cpu=True), model)


def read(module: QExperts | PackedModule) -> object:
    return module.dequantize("down_proj", torch.float32) if isinstance(module, QExperts) else module.weight


def refusal(task: Callable[[], object]) -> str:
    try:
        task()
    except UnsupportedError as error:
        return str(error)
    return "went through"


def compare(folder: Path) -> dict[str, dict]:
    """In one of several processes: every model whole, sharded, and sharded with a cast."""
    PartialState(cpu=True)
    found = {}
    with sharded.settled():
        for name in CONFIGS:
            model = adapted(folder, name)
            before, expected = logits(model), gradients(model)
            shard(model)
            first, got = logits(model), gradients(model)
            held = sharded.megabytes(model)
            blocks = [module for name, module in packed_modules(model) if ".layers." in name or ".h." in name]
            found[name] = {
                "logits": [torch.equal(again, before) for again in (first, logits(model))],
                "gradients": {n: torch.equal(got[n], gradient) for n, gradient in expected.items()},
                "held": held,
                "read": [refusal(partial(read, module)) for module in blocks],
            }
            if name in CAST:
                cast = adapted(folder, name)
                fully_shard(cast, mp_policy=MixedPrecisionPolicy(CAST[name]))
                found[name]["cast"] = refusal(partial(logits, cast))
    return found


def save_quantized(folder: Path) -> None:
    for kind in ("llama", "mixtral", "gpt2"):
        tiny_model(kind).save_pretrained(folder / "source" / kind)
    for name, config in CONFIGS.items():
        source = folder / "source" / SOURCES.get(name, "llama")
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config.copy()).save_pretrained(folder / name)


class Killed(BaseException):
    """In place of the signal."""


def carry_out(jobs: list) -> list[dict | None]:
    """In one of several processes: recipes, each with its own variables of the environment, some killed in a step."""
    reports: list[dict | None] = []
    for variables, arguments, last in jobs:
        os.environ.update(variables)
        steps: list[float] = []

        def tick(what: str, share: float, steps=steps, last=last) -> None:
            if what.startswith("training"):
                steps.append(share)
                if len(steps) == last:
                    raise Killed

        try:
            reports.append(hfquant.finetune(**arguments, tick=tick).to_dict() | {"ticks": len(steps)})
        except Killed:
            reports.append(None)
        assert os.environ["FSDP_STATE_DICT_TYPE"] == variables["FSDP_STATE_DICT_TYPE"]  # what was settled is undone
    return reports


# What accelerate's own defaults and old configurations of it say, and what is settled otherwise.
SAID = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
SHORT = {"length": 16, "samples": 32, "steps": 4, "batch_size": 2, "learning_rate": 0.002, "save_every": 2}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, text):
    """What each of two processes found in `compare`; the folder and reports of `carry_out`.

    One training with copies, sharded, and sharded with a break; one that merges; the first in one process.
    """
    folder = tmp_path_factory.mktemp("runs")
    save_quantized(folder)
    kept = {
        "quantize": {"method": "int4", "group_size": 64},
        "lora": {"rank": 3, "targets": TARGETS},
        "train": SHORT | {"dtype": "float32", "optimizer": "auto"},
        "evaluate": {"sequences": 2},
    }
    merged = {"quantize": {"method": "nf4"}, "lora": {"rank": 3}, "exit": "merge"}
    merged["train"] = SHORT | {"steps": 2, "checkpointing": True, "dtype": "bfloat16"}
    whole = kept | {"train": kept["train"] | {"batch_size": 4}}
    for name, recipe in {"kept": kept, "merging": merged, "whole": whole}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))

    def given(recipe: str, out: str) -> dict[str, str]:
        return {"recipe": f"{folder / recipe}.yaml", "model": str(MODEL), "out": str(folder / out), "data": str(text)}

    asked = LAUNCHED | SAID
    jobs: list = [
        (SAID | {"ACCELERATE_USE_FSDP": "false"}, given("kept", "copies"), 0),
        (asked, given("kept", "sharded"), 0),
        (asked, given("kept", "resumed"), 3),
        (asked, given("kept", "resumed"), 0),
        (asked, given("merging", "merged"), 0),
        (SAID | {"ACCELERATE_USE_FSDP": "false"}, given("merging", "merged copies"), 0),
    ]
    program = f"import runpy; runpy.run_module({__name__!r}, run_name='__main__')"
    ends = run_ranks(program, folder, json.dumps(jobs), **LAUNCHED, **ALONE)
    assert all(end.returncode == 0 for end in ends), ends[0].stderr[-3000:] + ends[1].stderr[-3000:]
    told = [json.loads(end.stdout) for end in ends]
    names = [Path(arguments["out"]).name for _, arguments, _ in jobs]
    one = hfquant.finetune(**given("whole", "one"))
    reports = dict(zip(names, told[0]["reports"], strict=True)) | {"one": one.to_dict()}
    return [rank["compared"] for rank in told], folder, reports


@pytest.fixture(scope="module")
def compared(ended) -> list[dict]:
    return ended[0]


@pytest.fixture(scope="module")
def runs(ended) -> tuple[Path, dict[str, dict]]:
    return ended[1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_weights_compute_what_whole_ones_do_to_the_bit(compared, name):
    """The oracle is the same model before it was sharded; both processes see one batch, whose mean is itself."""
    for rank in compared:
        assert rank[name]["logits"] == [True, True]
        assert rank[name]["gradients"] and all(rank[name]["gradients"].values())
        held = rank[name]["held"]
        assert 0.5 <= held["held_mb"] / held["whole_mb"] < 0.53  # what has one row is not cut


@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_of_a_weight_is_not_taken_for_a_weight(compared, name):
    for rank in compared:
        assert rank[name]["read"] and all("spread over processes (FSDP)" in said for said in rank[name]["read"])


@pytest.mark.parametrize("name", CAST)
def test_packed_tensors_that_were_cast_on_the_way_are_refused(compared, name):
    assert all("mixed precision casts what it gathers" in rank[name]["cast"] for rank in compared)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_sharded_training_learns_what_copies_learn(runs):
    """Also the embeddings that PEFT saves with adapters on them. Sums over processes are in another order, no more."""
    folder, reports = runs
    worst = {"copies": 0.0, "one": 0.0}
    for oracle, exact in (("copies", 1e-4), ("one", 1e-3)):  # the mean of two batches is the one of both
        expected, got = adapter(folder / oracle), adapter(folder / "sharded")
        assert got.keys() == expected.keys() and len(got) == 2 * (2 * 4 + 2) + 2
        for name, tensor in expected.items():
            worst[oracle] = max(worst[oracle], float((got[name] - tensor).norm() / tensor.norm()))
        assert worst[oracle] < exact, worst
        for mine, theirs in zip(reports["sharded"]["losses"], reports[oracle]["losses"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert all(bool(tensor.any()) for tensor in adapter(folder / "sharded").values())  # B is 0 where nothing learns
    stages = [{stage["name"]: stage["loss"] for stage in reports[name]["stages"]} for name in ("sharded", "copies")]
    assert list(stages[0]) == ["original", "quantized", "trained"] and stages[0] == pytest.approx(stages[1], rel=1e-5)


def test_the_report_says_what_each_process_holds(runs):
    _, reports = runs
    training = reports["sharded"]["training"]
    assert training["optimizer"] == "adamw_torch" and training["processes"] == 2
    held = training["sharded"]
    assert 0.5 <= held["held_mb"] / held["whole_mb"] < 0.51
    assert reports["copies"]["training"]["sharded"] is None


def test_what_was_saved_is_what_was_measured(runs, text):
    """One process loads the whole adapter, with stock libraries."""
    folder, reports = runs
    recipe = folder / "kept.yaml"
    measured = read_rows(plan(Request(recipe, MODEL, folder / "else", data=text))).measure
    base = AutoModelForCausalLM.from_pretrained(folder / "sharded" / "base", dtype=torch.float32)
    nll, counts = sequence_nll(PeftModel.from_pretrained(base, folder / "sharded"), measured)
    assert float(nll.sum() / counts.sum()) == pytest.approx(reports["sharded"]["stages"][-1]["loss"], abs=1e-6)


def test_a_sharded_run_that_was_killed_goes_on_where_it_stopped(runs):
    folder, reports = runs
    assert reports["sharded"]["ticks"] == 4 and reports["resumed"]["ticks"] == 2
    one, other = adapter(folder / "sharded"), adapter(folder / "resumed")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert reports["resumed"]["losses"] == reports["sharded"]["losses"]


def test_adapters_that_were_trained_sharded_merge(runs):
    folder, reports = runs
    assert reports["merged"]["exit"] == "merge" and not (folder / "merged" / "adapter_config.json").exists()
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("merged", "merged copies")]
    codes, expected = (torch.cat([m.packed()[0].flatten() for _, m in packed_modules(model)]) for model in models)
    assert float((codes == expected).float().mean()) > 0.999  # sums in another order move a few numbers over an edge


def test_a_gpu_that_is_there_and_not_used_is_no_place_to_shard(recipe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "is_sharded", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SpecError, match="leave --device cpu out"):
        hfquant.finetune(recipe(), MODEL, tmp_path / "out", data=text, device="cpu")


def test_an_unfinished_run_is_not_gone_on_with_in_another_way(recipe, text, tmp_path, monkeypatch):
    path = recipe(train={"steps": 2}, evaluate=None)

    def kill(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text, tick=kill)
    monkeypatch.setattr(sharded, "is_sharded", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SpecError, match="unfinished run with another sharding"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text)


REFUSED = {
    "version 1": ({"FSDP_VERSION": "1"}, {}, "--fsdp_version 2"),
    "no version": ({"FSDP_VERSION": None}, {}, "--fsdp_version 2"),
    "offload": ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "--fsdp_offload_params false"),
    "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "checkpointing: true"),
    "mixed precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "--mixed_precision no"),
    "ignored modules": ({"FSDP_IGNORED_MODULES": ".*q_proj"}, {}, "leave the option out"),
    "compiled": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--dynamo_backend no"),
    "parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "leave --use_parallelism_config out"),
    "qat": ({}, {"lora": None, "qat": {"distill": False}}, "training through quantization .*line"),
    "pooled": ({}, {"lora": {"pooled": True}, "exit": "exact"}, "pooled adapters .*line"),
    "8-bit states": ({}, {"train": {"optimizer": "adamw_8bit"}}, "optimizer: adamw"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_sharded_is_refused_before_anything_is_read(recipe, text, tmp_path, monkeypatch, case):
    variables, sections, remedy = case
    path = recipe(**sections)
    monkeypatch.setattr(sharded, "is_sharded", lambda: True)
    for name, value in (LAUNCHED | variables).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=f"FSDP was asked for .*{remedy}"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(sharded, "is_sharded", lambda: False)  # one process, say: there is nothing to refuse
    assert plan(Request(path, MODEL, tmp_path / "out", data=text)).train is not None


if __name__ == "__main__":
    print(json.dumps({"compared": compare(Path(sys.argv[1])), "reports": carry_out(json.loads(sys.argv[2]))}))
