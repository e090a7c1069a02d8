"""Every recipe in the repository loads, quantizes, and reloads."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import hfquant
from hfquant import CalibrationError, HfQuantConfig
from hfquant.recipe_file import read_recipe
from hfquant.testing.tiny import tiny_inputs, tiny_model

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
CALIBRATED = [path for path in RECIPES if "data" in read_recipe(path).quantize_keywords()]
# In place of the user's data, for a vocabulary of 256.
TOKENS = {"data": torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0)), "batch_size": 2}


def test_there_are_recipes() -> None:
    assert RECIPES


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
