"""Every recipe in the repository is carried out, and what it leaves reloads."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import hfquant
from hfquant import CalibrationError, HfQuantConfig
from hfquant.cli import app
from hfquant.recipe_file import read_recipe
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests.models.style import order_book

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "recipes").glob("*.yaml"))
TUNED = [path for path in ALL if read_recipe(path).workflow.lora or read_recipe(path).workflow.qat]
RECIPES = [path for path in ALL if path not in TUNED]
CALIBRATED = [path for path in RECIPES if "data" in read_recipe(path).quantize_keywords()]
REWRITTEN = [path for path in CALIBRATED if path.stem.startswith(("smooth", "rotate"))]
STAGES = ["original", "quantized"]
# In place of the user's data, for a vocabulary of 256.
TOKENS = {"data": torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0)), "batch_size": 2}


def test_there_are_recipes() -> None:
    assert RECIPES and len(TUNED) >= 10


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first block of the bundled model, and a text to learn."""
    folder, source = tmp_path_factory.mktemp("bundled"), ROOT / "tests" / "models" / "tiny-llama"
    LlamaForCausalLM.from_pretrained(source, num_hidden_layers=1).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    (folder / "orders.txt").write_text(order_book(0, 60))
    return folder / "model", folder / "orders.txt"


@pytest.mark.parametrize("path", [*TUNED, *REWRITTEN], ids=lambda path: path.stem)
def test_recipe_is_carried_out_from_the_command_line(path: Path, bundled: tuple[Path, Path], tmp_path: Path) -> None:
    (model, text), work, out = bundled, read_recipe(path).workflow, tmp_path / "out"
    run = ["finetune", path, "--model", model, "--data", text, "--output", out]
    done = CliRunner().invoke(app, [*map(str, run), *(["--max-steps", "1"] if work.train else []), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "finetune_report.json").read_text())
    assert report == json.loads(done.stdout) and report["recipe"] == read_recipe(path).label
    names = [stage["name"] for stage in report["stages"]]
    assert report["quantization"]["coverage"]["quantized_bytes"] > 0 and (not work.evaluate or names[:2] == STAGES)
    assert not work.train or report["losses"][0]["loss"] > 0
    adapters = work.lora is not None and work.exit in ("adapter", None)
    assert adapters == (out / "adapter_model.safetensors").exists()
    ids = torch.arange(3, 40)[None]
    again = LlamaForCausalLM.from_pretrained(out / "base" if adapters else out)
    again = PeftModel.from_pretrained(again, out) if adapters else again
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(model)(ids).logits
        assert (again(ids).logits - expected).norm() < 0.5 * expected.norm()
    assert hfquant.explain(again.get_base_model() if adapters else again)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_quantizes_and_reloads(path: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    config = HfQuantConfig.from_recipe(path, **TOKENS if path in CALIBRATED else {})
    quantized = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    quantized.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = quantized(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        # Random weights without redundancy: 4 bits cost a third of the logits here, a wrong decode all of them.
        assert (expected - model(**inputs).logits).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("path", CALIBRATED, ids=lambda path: path.stem)
def test_calibrated_recipe_gives_the_same_from_folder_to_folder(path: Path, tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    config = HfQuantConfig.from_recipe(path, **TOKENS)
    report = hfquant.quantize(tmp_path / "source", config, tmp_path / "out")
    memory = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tiny_inputs(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, memory(**inputs).logits)
    assert report.calibration is not None and report.calibration["samples"] == 4
    assert sum(len(block.layers) for block in report.blocks) == 14


@pytest.mark.parametrize("path", CALIBRATED, ids=lambda path: path.stem)
def test_the_data_of_a_recipe_is_the_users_to_name(path: Path) -> None:
    assert read_recipe(path).quantize_keywords()["data"] == "calibration.txt"
    with pytest.raises(CalibrationError, match=r"no calibration file calibration\.txt"):
        HfQuantConfig.from_recipe(path)
