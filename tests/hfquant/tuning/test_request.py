"""What cannot work is told before any weight is read: the model here has no weights at all."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

import hfquant
from hfquant.errors import CalibrationError, SpecError
from hfquant.tuning.request import Request, plan

from .conftest import MODEL


@pytest.fixture
def hollow(tmp_path) -> Path:
    """The bundled model without its weights."""
    folder = tmp_path / "hollow"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        ({"quantize": {"bits": 5}}, {}, "recipe.yaml, line .*int4' has no option 'bits'"),
        ({"lora": {"rank": 0}}, {}, "lora.rank"),
        ({}, {"data": "absent.txt"}, r"no calibration file absent\.txt"),
        ({}, {"data": None}, "names nothing to train on: give --data"),
        ({"train": {"length": 4096}}, {}, "reads at most 512 tokens"),
        ({}, {"eval_data": "absent.txt"}, r"the text to measure on, absent\.txt, is not a file"),
        ({}, {"max_steps": 0}, "max_steps is a whole number from 1"),
        ({"train": None, "lora": {"init": "eora"}}, {"max_steps": 2}, "leave max_steps out"),
        ({"train": None, "lora": {"init": "eora"}}, {"seed": 2}, "leave seed out"),
        ({"train": None, "lora": None}, {"data": None}, "measures, and there is no text"),
        ({"train": None, "lora": None, "evaluate": None, "quantize": {"method": "gptq"}}, {"data": None},
         "needs calibration data"),
        ({"lora": None, "qat": {}, "quantize": {"method": "gptq"}}, {}, "line .*cannot be trained through 'gptq'"),
        ({}, {"device": "cuda:7"}, "the device 'cuda:7' cannot be used"),
        ({}, {"push": "a/b/c"}, "'a/b/c' is no name of a repository"),
        ({"train": {"length": 512, "samples": 8}}, {"data": "few"}, "too short|one is kept back"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_work(recipe, hollow, text, tmp_path, sections, options, message):
    if isinstance(sections.get("quantize"), dict) and "method" in sections["quantize"]:
        sections = {**sections, "quantize": sections["quantize"] | {"group_size": 64}}
    (tmp_path / "few").write_text("Order 1.")
    options = {"data": text, **options}
    if options["data"] == "few":
        options["data"] = tmp_path / "few"
    with pytest.raises((SpecError, CalibrationError), match=message):
        hfquant.finetune(recipe(**sections), hollow, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_only_language_models_are_fine_tuned_on_text(recipe, tmp_path, text):
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    with pytest.raises(
        SpecError, match="cannot be fine-tuned on text: ViTForImageClassification has no language-model"
    ):
        hfquant.finetune(recipe(), tmp_path / "vit", tmp_path / "out", data=text)


def test_a_quantized_model_and_a_full_folder_are_refused(recipe, hollow, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SpecError, match="is not empty"):
        hfquant.finetune(recipe(), hollow, tmp_path / "out", data=text)


def test_what_is_given_takes_the_place_of_what_the_recipe_says(recipe, hollow, tmp_path, text):
    path = recipe(train={"data": "absent.txt", "steps": 9}, evaluate={"data": "gone.txt"})
    found = plan(Request(path, hollow, tmp_path / "out", data=text, eval_data=text, max_steps=2, seed=5))
    assert found.text is not None and found.text.data == text and found.text.seed == 5
    assert found.train is not None and found.train.steps == 2 and found.train.seed == 5
    assert found.evaluate is not None and found.evaluate.data == str(text)
    assert found.changes == {"max_steps": 2, "seed": 5}
    assert found.device == torch.device("cuda" if torch.cuda.is_available() else "cpu") and found.dtype == torch.float32
