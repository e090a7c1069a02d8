"""The bundled classifiers must load like any other, be small, and be as good as they say on samples they never saw."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from . import BERT_DIR, VIT_DIR
from .tasks import (
    CALIBRATION_SEED,
    NEGATIONS,
    SENTIMENTS,
    SHAPES,
    SIZE,
    TEST_SEED,
    TEXT_LENGTH,
    TRAIN_SEED,
    VOCABULARY,
    Batch,
    accuracy,
    encode,
    image_batch,
    inside,
    sentiment,
    text_batch,
)
from .train_encoders import TASKS, build_optimizers, train_step
from .training import set_learning_rates

BUNDLED = {
    BERT_DIR: (AutoModelForSequenceClassification, text_batch),
    VIT_DIR: (AutoModelForImageClassification, image_batch),
}
Draw = Callable[[int, int], Batch]
each_draw = pytest.mark.parametrize("draw", [text_batch, image_batch])
each_model = pytest.mark.parametrize("directory", BUNDLED, ids=lambda path: path.name)


def record_of(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "training.json").read_text())
    return loaded


def load(directory: Path) -> PreTrainedModel:
    return BUNDLED[directory][0].from_pretrained(directory, dtype=torch.float32).eval()


def samples(batch: Batch) -> set[bytes]:
    main = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]
    return {row.numpy().tobytes() for row in main}


# ---- data


@each_draw
def test_a_draw_is_a_function_of_its_seed(draw: Draw) -> None:
    first, again = draw(5, 40), draw(5, 40)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@each_draw
def test_draws_share_no_sample(draw: Draw) -> None:
    seeds = (TEST_SEED, CALIBRATION_SEED, TRAIN_SEED, TRAIN_SEED + 1)
    drawn = [samples(draw(seed, 500)) for seed in seeds]
    assert [len(each) for each in drawn] == [500] * len(seeds)  # nor is one repeated
    assert len(set().union(*drawn)) == 500 * len(seeds)


@pytest.mark.parametrize(("draw", "classes"), [(text_batch, len(SENTIMENTS)), (image_batch, len(SHAPES))])
def test_classes_occur_equally_often_in_any_order(draw: Draw, classes: int) -> None:
    labels = draw(3, 10 * classes + 1)["labels"]
    assert sorted(labels.bincount(minlength=classes).tolist()) == [10] * (classes - 1) + [11]
    assert not torch.equal(labels, draw(4, 10 * classes + 1)["labels"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("food? food+1 room-1 word3", "good"),
        ("room? food+1 room-1 word3", "bad"),
        ("staff? food+1 room-1 word3", "neutral"),
        ("food? not0 food+1", "bad"),
        ("food? not0 not1 food+1", "good"),
        ("food? very0 food-1", "bad"),
        ("food? very0 food-1 food-2", "very bad"),
        ("food? not0 very0 food-1 food+2", "very good"),
        ("food? very0 not0 food-1 food+2", "very good"),
        ("food? food+1 food+2 not0", "good"),
        ("food? food+1 food-2", "neutral"),
        # A modifier is spent on the word after it, whatever that word is.
        ("food? not0 word1 food+1", "good"),
        ("food? not0 room+1 food+1", "good"),
        ("food? very0 food+1 food+2", "very good"),
        ("food? food+1 very0 food+2", "very good"),
    ],
)
def test_the_label_of_a_sentence_is_the_sum_of_what_it_says_about_the_topic(text: str, expected: str) -> None:
    question, *words = text.split()
    assert SENTIMENTS[sentiment(question, words)] == expected


def judged_by_pattern(question: str, words: list[str]) -> str:
    """The label by another way: each counted word with the modifiers before it, found by a regular expression."""
    found = re.findall(rf"((?:(?:not|very)\d )*){question[:-1]}([+-])\d", " ".join(words))
    values = [int(f"{sign}1") * (-1) ** before.count("not") * 2 ** before.count("very") for before, sign in found]
    total = sum(values)
    return SENTIMENTS[(total >= -2) + (total >= 0) + (total >= 1) + (total >= 3)]


def test_drawn_sentences_carry_the_label_of_the_rule() -> None:
    batch = text_batch(6, 300)
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (TEXT_LENGTH - length)
        cls, question, sep, *words, end = [VOCABULARY[place] for place in ids[:length].tolist()]
        assert (cls, sep, end) == ("[CLS]", "[SEP]", "[SEP]")
        assert encode(question, words) == ids[:length].tolist()
        assert judged_by_pattern(question, words) == SENTIMENTS[label]
        assert {VOCABULARY[place] for place in ids[length:].tolist()} <= {"[PAD]"}


def test_images_are_bytes_in_the_range_that_the_model_reads() -> None:
    pixels = image_batch(7, 50)["pixel_values"]
    assert pixels.shape == (50, 3, SIZE, SIZE)
    levels = (pixels.double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert levels.min() >= 0 and levels.max() <= 255.0001


def test_shapes_are_those_of_their_names() -> None:
    grid = torch.linspace(-1.2, 1.2, 481)
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    filled = dict(zip(SHAPES, inside(u, v) > 0, strict=True))
    area = {name: float(mask.sum()) * 0.005**2 for name, mask in filled.items()}

    def at(name: str, x: float, y: float) -> bool:
        return bool(inside(torch.tensor(x), torch.tensor(y))[SHAPES.index(name)] > 0)

    expected = {
        "disc": math.pi * 0.9**2,
        "ring": math.pi * (0.95**2 - 0.55**2),
        "square": 1.6**2,
        "frame": 1.7**2 - 0.9**2,
        "triangle": 3 * math.sqrt(3) * 0.5**2,
        "cross": 2 * 0.6 * 2 - 0.6**2,
        "star": math.pi * (0.7**2 + 0.3**2 / 2),
    }
    for name, value in expected.items():
        assert area[name] == pytest.approx(value, rel=0.02), name
    assert at("crescent", -0.5, 0.0) and not at("crescent", 0.5, 0.0)
    assert at("stripes", 0.2, 0.7) and at("stripes", 0.2, -0.7) and not at("stripes", -0.2, 0.7)
    assert at("checks", 0.2, 0.2) and at("checks", -0.2, -0.2) and not at("checks", -0.2, 0.2)


# ---- models


@each_model
def test_stored_weights_are_bfloat16_and_small(directory: Path) -> None:
    model = BUNDLED[directory][0].from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (directory / "model.safetensors").stat().st_size <= 2.5e6
    assert model.num_parameters() == record_of(directory)["parameters"]
    assert all(p.isfinite().all() and p.std() > 0 for p in model.parameters() if p.numel() > 1)


@each_model
def test_accuracy_is_the_recorded_one(directory: Path) -> None:
    """Within two samples: another CPU may round the closest calls the other way."""
    record = record_of(directory)
    found = accuracy(load(directory), BUNDLED[directory][1](TEST_SEED, record["test_count"]))
    assert found == pytest.approx(record["accuracy"], abs=2.5 / record["test_count"])
    assert 0.88 <= record["accuracy"] <= 0.975  # good, and with errors left to see more of


@each_model
def test_the_card_says_what_the_record_says(directory: Path) -> None:
    record, card = record_of(directory), (directory / "README.md").read_text()
    assert f"{100 * record['accuracy']:.2f} % of {record['test_count']} samples" in card
    assert f"{record['steps']} steps of {record['batch']} samples" in card
    assert f"{record['parameters']:,} parameters" in card


@each_model
def test_training_got_better(directory: Path) -> None:
    losses = [entry["train_loss"] for entry in record_of(directory)["history"]]
    assert losses[-1] < 0.4 * losses[0]


def test_what_is_padded_makes_no_difference() -> None:
    model, batch = load(BERT_DIR), text_batch(8, 20)
    hidden = batch["attention_mask"] == 0
    other = torch.where(hidden, torch.full_like(batch["input_ids"], len(VOCABULARY) - 1), batch["input_ids"])
    assert hidden.any()
    with torch.inference_mode():
        expected: Tensor = model(batch["input_ids"], batch["attention_mask"]).logits
        found: Tensor = model(other, batch["attention_mask"]).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_text_model_reads_negations() -> None:
    """With its negations taken for intensifiers a sentence means something else, and the model says so."""
    model, batch = load(BERT_DIR), text_batch(9, 500)
    first = VOCABULARY.index(NEGATIONS[0])
    ids = batch["input_ids"]
    negation = (ids >= first) & (ids < first + len(NEGATIONS))
    blind = {**batch, "input_ids": torch.where(negation, ids + len(NEGATIONS), ids)}
    assert accuracy(model, blind) < accuracy(model, batch) - 0.2


@pytest.mark.parametrize("name", TASKS)
def test_training_learns(name: str) -> None:
    torch.manual_seed(0)
    task = TASKS[name]
    model = task.build()
    optimizers = build_optimizers(model)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    assert len(optimizers[0].param_groups[0]["params"]) == 6 * model.config.num_hidden_layers
    batch = task.batch(TRAIN_SEED, 16)
    losses = []
    for step in range(20):
        set_learning_rates(optimizers, step, 0.0)
        losses.append(train_step(model, optimizers, batch))
    assert losses[-1] < losses[0] - 0.3
