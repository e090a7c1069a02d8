"""`hfquant finetune`: what is typed, what is shown."""

import json
import shutil

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


def test_it_tells_who_trains_and_what_of_conversations_is_learned(hfquant, recipe, source, tmp_path):
    talker = shutil.copytree(source, tmp_path / "talker")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (talker / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant:{% endif %}")
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Some."}]
    data = tmp_path / "chats.jsonl"
    data.write_text(f"{json.dumps({'prompt': 'x', 'messages': chat})}\n" * 60)
    run = ("finetune", recipe, "--model", talker, "--data", data, "--max-steps", 1)
    shown = hfquant(*run, "--dry-run").stdout
    assert "samples, on what the assistant says" in shown and "trainer: trl.SFTTrainer 1." in shown
    shown = " ".join(hfquant(*run, "-o", tmp_path / "out").stdout.split())
    assert "1 steps with adamw_torch in trl.SFTTrainer 1." in shown
    learned, tokens = len("Some.;"), len("user:How many?;assistant:Some.;")
    report = json.loads((tmp_path / "out" / "finetune_report.json").read_text())["training"]
    assert f", {report['loss_tokens']} of them the assistant's; the loss went" in shown
    assert report["loss_tokens"] / report["tokens"] == pytest.approx(learned / tokens, rel=0.1)
    recipe.write_text(
        RECIPE.replace("  length: 32", "  assistant_only_loss: false\n  trainer: transformers\n  length: 32")
    )
    shown = hfquant(*run, "--dry-run").stdout
    assert "the assistant says" not in shown and "trainer: transformers.Trainer 5." in shown


def test_mistakes_are_told_with_their_line(hfquant, recipe, source, text, tmp_path):
    recipe.write_text(RECIPE.replace("rank: 4", "rnk: 4"))
    run = ("finetune", recipe, "--model", source, "--data", text)
    assert "line 5: lora.rnk: there is no such entry" in hfquant(*run, "-o", tmp_path / "out", status=2).stderr
    recipe.write_text(RECIPE)
    assert "name it with --push" in hfquant(*run, "--public", status=2).stderr
    assert "name the folder to write with --output" in hfquant(*run, status=2).stderr
