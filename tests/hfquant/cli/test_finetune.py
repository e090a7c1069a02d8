"""`hfquant finetune`: what is typed, what is shown."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

RECIPE = """quantize:
  method: int4
  group_size: 32
lora:
  rank: 4
train:
  length: 32
  samples: 40
  steps: 5
  batch_size: 4
exit: merge
evaluate:
  sequences: 4
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(RECIPE)
    return path


def test_looking_first_writes_nothing(hfquant, recipe, source, text, tmp_path):
    run = ("finetune", recipe, "--model", source, "--data", text, "--dry-run")
    shown = hfquant(*run, "--max-steps", 3).stdout
    assert "quantize: int4, 4.5" in shown and "train: 3 steps with adamw_torch on 40 samples" in shown
    assert "exit: merge" in shown and "nothing was written" in shown
    found = json.loads(hfquant(*run, "--json").stdout)
    assert found["steps"] == 5 and found["recipe"]["file"] == "short.yaml"
    assert [path.name for path in tmp_path.iterdir()] == ["short.yaml"]


def test_it_tells_every_stage_and_leaves_a_model(hfquant, recipe, source, text, tmp_path):
    run = ("finetune", recipe, "--model", source, "--data", text, "-o", tmp_path / "out", "--max-steps", 2)
    forecast = json.loads(hfquant(*run, "--dry-run", "--json").stdout)
    shown = hfquant(*run).stdout
    for stage in ("original", "quantized", "trained", "merged"):
        assert f"\n{stage} " in shown
    assert "2 steps with adamw_torch" in shown and f"adapters with {forecast['adapter']:,} parameters" in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert "is not empty" in hfquant(*run, status=2).stderr
    report = json.loads(hfquant(*run, "--overwrite", "--json").stdout)
    assert report["changes"] == {"max_steps": 2} and [stage["name"] for stage in report["stages"]][-1] == "merged"


def test_mistakes_are_told_with_their_line(hfquant, recipe, source, text, tmp_path):
    recipe.write_text(RECIPE.replace("rank: 4", "rnk: 4"))
    run = ("finetune", recipe, "--model", source, "--data", text)
    assert "line 5: lora.rnk: there is no such entry" in hfquant(*run, "-o", tmp_path / "out", status=2).stderr
    recipe.write_text(RECIPE)
    assert "name it with --push" in hfquant(*run, "--public", status=2).stderr
    assert "name the folder to write with --output" in hfquant(*run, status=2).stderr
