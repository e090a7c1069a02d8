"""`hfquant.finetune` on the bundled model: it learns, what it writes loads with stock libraries, nothing is lost."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfquant
from hfquant import processes
from hfquant.errors import SpecError
from hfquant.eval import sequence_nll
from hfquant.staging import partial_folder
from hfquant.testing.tiny import tiny_model
from hfquant.tuning import run
from hfquant.tuning.report import REPORT_NAME
from hfquant.tuning.request import Request, plan
from hfquant.tuning.rows import read_rows
from tests.fresh import run_ranks

from .conftest import MODEL


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loss_of(model, batches) -> float:
    nll, counts = sequence_nll(model, batches)
    return float(nll.sum() / counts.sum())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A recipe with adapters, carried out: the folder, the report, and the batches it was measured on."""
    import yaml

    from .conftest import RECIPE

    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    heard: list[tuple[str, float]] = []
    report = hfquant.finetune(path, MODEL, folder / "out", data=text, tick=lambda *said: heard.append(said))
    measured = read_rows(plan(Request(path, MODEL, folder / "else", data=text))).measure
    return folder / "out", report, measured, heard


def test_the_model_learns_and_every_stage_is_measured(finished):
    _folder, report, measured, _ = finished
    stages = {stage.name: stage for stage in report.stages}
    assert list(stages) == ["original", "quantized", "trained"]
    assert stages["original"].loss == pytest.approx(loss_of(load(MODEL), measured), abs=1e-6)
    assert stages["trained"].loss < stages["original"].loss - 0.2
    assert stages["trained"].change == pytest.approx(stages["trained"].loss - stages["quantized"].loss)
    assert stages["original"].fidelity.kl == 0 < stages["quantized"].fidelity.kl


def test_stock_peft_loads_what_was_written(finished):
    folder, report, measured, _ = finished
    model = PeftModel.from_pretrained(load(folder / "base"), folder)
    assert loss_of(model, measured) == pytest.approx(report.stages[-1].loss, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # follows the path in adapter_config.json
    assert loss_of(model, measured) == pytest.approx(report.stages[-1].loss, abs=1e-6)


def test_the_report_says_what_was_done(finished):
    folder, report, _, _ = finished
    written = json.loads((folder / REPORT_NAME).read_text())
    assert written["recipe"] == report.recipe and len(written["recipe"]["sha256"]) == 64
    assert written["training"]["steps"] == 6 and written["training"]["tokens"] == 6 * 4 * 32
    assert [entry["step"] for entry in written["losses"]] == [1, 2, 3, 4, 5, 6]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert written["adapter"]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert written["quantization"]["method"] == "int4"
    card = (folder / "README.md").read_text()
    assert report.recipe["sha256"] in card and f"| trained | {report.stages[-1].loss:.4f} |" in card
    assert (folder / "tokenizer.json").exists() and not partial_folder(folder).exists()


def test_the_code_in_the_card_runs(finished, monkeypatch):
    folder, report, measured, _ = finished
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {"FOLDER": str(folder)}
    exec(code, names)
    assert loss_of(names["model"].float(), measured) == pytest.approx(report.stages[-1].loss, abs=2e-3)


def test_progress_only_grows(finished):
    *_, heard = finished
    shares = [share for _, share in heard]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert any(what.startswith("training, loss") for what, _ in heard)


class Killed(BaseException):
    """In place of the signal."""


def test_a_killed_run_goes_on_and_ends_with_the_same_adapters(recipe, text, tmp_path, finished):
    path = recipe(train={"save_every": 2})

    def kill(what: str, share: float) -> None:
        if what.startswith("training") and share > 0.65:
            raise Killed

    with pytest.raises(Killed):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text, tick=kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpecError, match="unfinished run with another changes"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text, max_steps=7)
    changed = tmp_path / text.name
    changed.write_text(text.read_text().replace("lamp", "sofa"))
    with pytest.raises(SpecError, match="unfinished run with another training data"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=changed)
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    whole = finished[1]
    assert [entry["loss"] for entry in report.losses] == [entry["loss"] for entry in whole.losses]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", finished[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merging_keeps_most_of_what_was_learned(recipe, text, tmp_path):
    path = recipe(train={"steps": 20, "learning_rate": 0.004}, exit="merge")
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    stages = {stage.name: stage.loss for stage in report.stages}
    gained = stages["quantized"] - stages["trained"]
    print({name: round(loss, 3) for name, loss in stages.items()})
    assert stages["merged"] < stages["quantized"] - 0.8 * gained
    measured = read_rows(plan(Request(path, MODEL, tmp_path / "else", data=text))).measure
    again = load(tmp_path / "out")
    assert loss_of(again, measured) == pytest.approx(stages["merged"], abs=1e-6)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert hfquant.coverage(again).share > 0.8


def test_a_method_with_its_own_rounding_is_run_again_to_merge(recipe, text, tmp_path):
    quantize = {"method": "gptq", "bits": 4, "group_size": 64, "samples": 16}
    path = recipe(quantize=quantize, train={"steps": 12, "learning_rate": 0.004}, exit="merge")
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    stages = {stage.name: stage.loss for stage in report.stages}
    print({name: round(loss, 3) for name, loss in stages.items()})
    assert stages["merged"] < stages["quantized"] - 0.8 * (stages["quantized"] - stages["trained"])
    assert report.quantization is not None and report.quantization["calibration"]["samples"] == 16


def test_adapters_on_a_model_that_is_not_quantized(recipe, text, tmp_path):
    report = hfquant.finetune(recipe(quantize=None, train={"steps": 2}), MODEL, tmp_path / "out", data=text)
    assert [stage.name for stage in report.stages] == ["original", "trained"] and report.quantization is None
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == str(MODEL) and not (tmp_path / "out" / "base").exists()


def test_a_training_that_diverges_is_ended(recipe, text, tmp_path):
    path = recipe(train={"learning_rate": 1e30, "max_grad_norm": 1e30, "dtype": "bfloat16"}, evaluate=None)
    with pytest.raises(hfquant.HfQuantError, match=r"the training diverged|NaN or infinite gradients"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text)


def test_a_warmup_and_checkpointing(recipe, text, tmp_path):
    """The rate of the first step is 0, so that adapters learn nothing in it: no reason for an error."""
    train = {"warmup": 0.5, "steps": 4, "schedule": "cosine", "checkpointing": True}
    report = hfquant.finetune(recipe(train=train, evaluate=None), MODEL, tmp_path / "out", data=text)
    assert len(report.losses) == 4


def test_eight_bit_optimizer_states(recipe, text, tmp_path):
    path = recipe(train={"optimizer": "adamw_8bit", "steps": 2}, evaluate=None)
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    assert report.training is not None and report.training["optimizer"] == "adamw_bnb_8bit"
    assert all(math.isfinite(entry["loss"]) for entry in report.losses)


def test_two_processes_learn_together(recipe, text, tmp_path):
    """Half the samples a step each, the same adapters as one process with whole steps, up to the order of sums."""
    sections = {"lora": {"dropout": 0.0}, "evaluate": None}
    whole = recipe("whole", train={"batch_size": 4, "steps": 3}, **sections)
    half = recipe("half", train={"batch_size": 2, "steps": 3}, **sections)
    program = "import sys; from hfquant.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["finetune", half, "--model", MODEL, "--data", text, "-o", tmp_path / "two", "--json"]
    first, second = run_ranks(program, *command, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    report = json.loads(first.stdout)
    assert not second.stdout  # one of them tells
    assert report["training"]["processes"] == 2 and report["training"]["tokens"] == 3 * 4 * 32
    hfquant.finetune(whole, MODEL, tmp_path / "one", data=text)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0.05, atol=2e-4)


def test_the_output_is_moved_when_nobody_reads_it_and_found_when_all_go_on(recipe, text, tmp_path, monkeypatch):
    """Processes meet before one of them moves the merged model, which the others load, and after that."""
    happened: list[object] = []
    load = run.load_base
    monkeypatch.setattr(run, "load_base", lambda *given: (load(*given), happened.append("loaded"))[0])
    monkeypatch.setattr(processes, "barrier", lambda: happened.append((tmp_path / "out").exists()))
    path = recipe(train={"steps": 1}, evaluate=None, exit="merge")
    hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    assert happened[-3:] == ["loaded", False, True]


def test_the_result_is_pushed(recipe, text, tmp_path):
    from hfquant.testing.fakehub import FakeHub

    path = recipe(train={"steps": 1}, evaluate=None)
    with FakeHub() as hub:
        command = [sys.executable, "-m", "hfquant", "finetune", path, "--model", MODEL, "--data", text]
        command += ["-o", tmp_path / "out", "--push", "me/tuned", "--json"]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=280,
            env=os.environ | hub.environment() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = hub.repos["me/tuned"].files
        assert json.loads(done.stdout)["pushed"].endswith("me/tuned")
    local = {
        str(file.relative_to(tmp_path / "out")): file for file in Path(tmp_path / "out").rglob("*") if file.is_file()
    }
    assert {name for name in files if name != ".gitattributes"} == set(local)
    assert all(files[name] == file.read_bytes() for name, file in local.items())


@pytest.mark.parametrize(("method", "init"), [("nf4", "loftq"), ("gptq", "eora")])
def test_adapters_that_start_with_what_was_lost(recipe, text, tmp_path, method, init):
    """Nearer to the original before any training, and what is saved is what was measured: the codes changed too."""
    quantize = {"method": method, "group_size": 64} | ({"bits": 3} if method == "gptq" else {})
    path = recipe(quantize=quantize, lora={"init": init, "iterations": 2, "rank": 16, "dropout": 0.0}, train=None)
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    stages = {stage.name: stage for stage in report.stages}
    print({name: round(stage.fidelity.kl, 4) for name, stage in stages.items()})
    assert list(stages) == ["original", "quantized", "initialized"]
    assert stages["initialized"].fidelity.kl < 0.8 * stages["quantized"].fidelity.kl
    assert report.initialized and all(layer["after"] <= layer["before"] for layer in report.initialized)
    measured = read_rows(plan(Request(path, MODEL, tmp_path / "else", data=text))).measure
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base"), tmp_path / "out")
    assert loss_of(model, measured) == pytest.approx(stages["initialized"].loss, abs=1e-6)


def test_pooled_adapters_leave_without_a_loss(recipe, text, tmp_path):
    path = recipe(lora={"pooled": True}, train={"steps": 8, "learning_rate": 0.01}, exit="exact")
    report = hfquant.finetune(path, MODEL, tmp_path / "out", data=text)
    stages = {stage.name: stage.loss for stage in report.stages}
    assert stages["trained"] < stages["quantized"] - 0.1
    assert stages["merged"] == pytest.approx(stages["trained"], abs=1e-5)
    assert report.quantization is not None  # with zero points of 32 bits for each group of 64
    assert report.quantization["bits_per_weight"] == pytest.approx(4 + 16 / 64 + 32 / 64, abs=0.01)
    measured = read_rows(plan(Request(path, MODEL, tmp_path / "else", data=text))).measure
    assert loss_of(load(tmp_path / "out"), measured) == pytest.approx(stages["merged"], abs=1e-6)


def test_pooled_adapters_are_refused_before_training_where_there_are_no_zero_points(recipe, text, tmp_path):
    path = recipe(quantize={"method": "nf4"}, lora={"pooled": True}, exit="exact", evaluate=None)
    with pytest.raises(hfquant.UnsupportedError, match="cannot be merged into zero points exactly"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text)


def test_weights_that_are_trained_through_quantization(recipe, text, tmp_path):
    """The model that is saved is the one that was trained: quantizing it afterwards changes nothing."""
    sections = {"quantize": {"method": "int3", "group_size": 64}, "lora": None, "qat": {"distill": True}}
    train = {"data": "self", "samples": 16, "steps": 8, "learning_rate": 0.001, "dtype": "auto", "length": 48}
    path = recipe(**sections, train=train, evaluate={"length": 64})
    report = hfquant.finetune(path, MODEL, tmp_path / "out", eval_data=text)
    stages = {stage.name: stage for stage in report.stages}
    print({name: round(stage.fidelity.kl, 4) for name, stage in stages.items()})
    assert list(stages) == ["original", "quantized", "trained"]
    assert stages["trained"].fidelity.kl < 0.9 * stages["quantized"].fidelity.kl
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hfquant.coverage(model).share > 0.8 and model.dtype == torch.bfloat16
    assert report.quantization is not None and report.quantization["bits_per_weight"] < 3.3
    assert report.adapter is None and report.training is not None and report.training["steps"] == 8


def test_a_name_that_reaches_nothing_is_an_error(recipe, text, tmp_path):
    path = recipe(lora={"targets": ["q_proj", "z_proj"]}, evaluate=None)
    with pytest.raises(SpecError, match="z_proj"):
        hfquant.finetune(path, MODEL, tmp_path / "out", data=text)


def test_experts_learn_what_the_recipe_names(recipe, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "moe")
    tokens = torch.randint(3, 250, (24, 16), generator=torch.Generator().manual_seed(0))
    lora = {"targets": ["q_proj"], "experts": ["experts.gate_up_proj", "experts.down_proj"], "dropout": 0.0}
    sections = {"quantize": {"group_size": 32}, "lora": lora, "train": {"steps": 2, "length": 16}, "evaluate": None}
    hfquant.finetune(recipe(**sections), tmp_path / "moe", tmp_path / "out", data=tokens)
    learned = load_file(tmp_path / "out" / "adapter_model.safetensors")
    experts = {name: tensor for name, tensor in learned.items() if "experts" in name and "lora_B" in name}
    assert len(experts) == 4 and all(bool(tensor.any()) for tensor in experts.values())  # two blocks, two weights each
    model = PeftModel.from_pretrained(load(tmp_path / "out" / "base"), tmp_path / "out")
    assert model(input_ids=tokens[:2]).logits.isfinite().all()
