"""Every recipe in the repository loads, quantizes, and reloads."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hfquant import HfQuantConfig
from hfquant.testing.tiny import tiny_inputs, tiny_model

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_quantizes_and_reloads(path: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    config = HfQuantConfig.from_recipe(path)
    quantized = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    quantized.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = quantized(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        # Random weights without redundancy: 4 bits cost a third of the logits here, a wrong decode all of them.
        assert (expected - model(**inputs).logits).norm() < 0.5 * expected.norm()
