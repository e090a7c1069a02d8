"""The tasks of the small encoders: sentences to judge, and images of shapes. Every draw is a function of its seed.

Text: a sentence asks about one topic and then says good and bad things about several. Only words of the asked topic
count; "not" turns the next word around, "very" doubles it. The label is the sum, in five steps.

Images: one of ten shapes or textures, of any place, size, angle and colour, on a noisy background with a gradient.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

TEST_SEED, CALIBRATION_SEED = 0, 1
TRAIN_SEED = 1000
"""Seed of the first training step; every step draws from the next seed."""

# ---- text

TOPICS = ("food", "room", "staff")
PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
NEGATIONS = tuple(f"not{n}" for n in range(3))
INTENSIFIERS = tuple(f"very{n}" for n in range(3))
FILLERS = tuple(f"word{n}" for n in range(172))
OPINIONS = {(topic, sign): tuple(f"{topic}{sign}{n}" for n in range(12)) for topic in TOPICS for sign in "+-"}
VOCABULARY = (
    *(PAD, CLS, SEP),
    *(f"{topic}?" for topic in TOPICS),
    *NEGATIONS,
    *INTENSIFIERS,
    *(word for words in OPINIONS.values() for word in words),
    *FILLERS,
)
"""All words; a token id is a place in it."""

SENTIMENTS = ("very bad", "bad", "neutral", "good", "very good")
BOUNDS = (-2, 0, 1, 3)  # smallest scores of the second class and those after it
SHORTEST, LONGEST = 3, 14  # words after the question
TEXT_LENGTH = LONGEST + 4  # with [CLS], question, [SEP] and the last [SEP]

_IDS = {word: place for place, word in enumerate(VOCABULARY)}


def score(question: str, words: Sequence[str]) -> int:
    """What the words say about the topic of the question: +1 or -1 each, times -1 or 2 for the modifiers before it."""
    topic, total, factor = question.removesuffix("?"), 0, 1
    for word in words:
        if word in NEGATIONS:
            factor *= -1
        elif word in INTENSIFIERS:
            factor *= 2
        else:
            if word in OPINIONS[topic, "+"]:
                total += factor
            elif word in OPINIONS[topic, "-"]:
                total -= factor
            factor = 1
    return total


def sentiment(question: str, words: Sequence[str]) -> int:
    """The label, 0 to 4 (`SENTIMENTS`), of a sentence."""
    return bisect(BOUNDS, score(question, words))


def encode(question: str, words: Sequence[str]) -> list[int]:
    """The token ids of a sentence."""
    return [_IDS[word] for word in (CLS, question, SEP, *words, SEP)]


def text_batch(seed: int, count: int) -> Batch:
    """`input_ids` and `attention_mask` [count, 18] int64 and `labels` [count] int64, as many of every label."""
    # Only random() itself is promised to stay the same between versions of Python.
    uniform = random.Random(seed).random
    labels = _labels(seed, count, len(SENTIMENTS))
    rows = [encode(*_sentence(label, uniform)) for label in labels.tolist()]
    ids = torch.tensor([row + [_IDS[PAD]] * (TEXT_LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (TEXT_LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _sentence(label: int, uniform: Callable[[], float]) -> tuple[str, list[str]]:
    """Draw sentences until one has the label; `uniform()` gives random numbers in [0, 1)."""

    def pick(options: Sequence[str]) -> str:
        return options[int(uniform() * len(options))]

    while True:
        topic, length, mood = pick(TOPICS), SHORTEST + int(uniform() * (LONGEST - SHORTEST + 1)), uniform()
        words: list[str] = []
        while len(words) < length:
            kind = uniform()
            if kind < 0.1:
                words.append(pick(NEGATIONS))
            elif kind < 0.2:
                words.append(pick(INTENSIFIERS))
            elif kind < 0.25:
                words.append(pick(FILLERS))
            else:
                about = topic if uniform() < 0.6 else pick(TOPICS)
                words.append(pick(OPINIONS[about, "+" if uniform() < mood else "-"]))
        if sentiment(f"{topic}?", words) == label:
            return f"{topic}?", words


# ---- images

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "stripes", "checks")
SIZE = 32  # pixels


def inside(u: Tensor, v: Tensor) -> Tensor:
    """Positive inside and negative outside of each of `SHAPES`, at the points (u, v) [...] : [shapes, ...].

    The shapes have about radius 1; near an edge the value is about the distance to it.
    """
    r, box = torch.hypot(u, v), torch.maximum(u.abs(), v.abs())
    sides = [u * math.cos(angle) + v * math.sin(angle) for angle in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
    bar, other = (torch.minimum(0.3 - a.abs(), 1 - b.abs()) for a, b in ((u, v), (v, u)))
    waves = [torch.sin(2.5 * math.pi * x) for x in (u, v)]
    shapes = {
        "disc": 0.9 - r,
        "ring": 0.2 - (r - 0.75).abs(),
        "square": 0.8 - box,
        "frame": 0.2 - (box - 0.65).abs(),
        "triangle": 0.5 - torch.stack(sides).amax(0),
        "cross": torch.maximum(bar, other),
        "star": 0.7 + 0.3 * torch.cos(5 * torch.atan2(v, u)) - r,
        "crescent": torch.minimum(0.95 - r, torch.hypot(u - 0.5, v) - 0.65),
        "stripes": torch.minimum(0.85 - box, waves[0] / 5),
        "checks": torch.minimum(0.85 - box, waves[0] * waves[1] / 5),
    }
    return torch.stack([shapes[name] for name in SHAPES])


def image_batch(seed: int, count: int) -> Batch:
    """`pixel_values` [count, 3, 32, 32] float32 in -1..1 and `labels` [count] int64, as many of every label."""
    generator = torch.Generator().manual_seed(seed)
    labels = _labels(seed, count, len(SHAPES))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    radius, angle = uniform(0.4, 0.75, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    x = axis[None, None, :] - uniform(-0.25, 0.25, 1, 1)
    y = axis[None, :, None] - uniform(-0.25, 0.25, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / radius
    v = (y * angle.cos() - x * angle.sin()) / radius
    edge = inside(u, v)[labels, torch.arange(count)] * radius * SIZE / 2
    cover = (edge + 0.5).clamp(0, 1)[:, None]

    tilt = uniform(0, 2 * math.pi, 1, 1)
    slope = (axis[None, None, :] * tilt.cos() + axis[None, :, None] * tilt.sin())[:, None]
    ground = uniform(0.1, 0.5, 3, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1) * slope
    paint = uniform(0.2, 0.6, 1, 1, 1) * uniform(0.3, 1, 3, 1, 1)
    noise = uniform(0.0, 0.2, 1, 1, 1) * uniform(-1, 1, 3, SIZE, SIZE)
    levels = ((ground + paint * cover + noise).clamp(0, 1) * 255).round()  # like the bytes of an image file
    return {"pixel_values": levels / 127.5 - 1, "labels": labels}


# ---- both


def _labels(seed: int, count: int, classes: int) -> Tensor:
    """Labels [count] in random order, as many of every one, or one more."""
    return (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % classes).long()


def inputs_of(batch: Batch) -> Batch:
    """What the model reads: the batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.inference_mode()
def accuracy(model: Any, batch: Batch, batch_size: int = 100) -> float:
    """The share of a batch that a classifier gets right, on its device and in its dtype."""
    right = 0
    for start in range(0, len(batch["labels"]), batch_size):
        part = {name: value[start : start + batch_size].to(model.device) for name, value in batch.items()}
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(part).items()}
        right += int((model(**inputs).logits.argmax(-1) == part["labels"]).sum())
    return right / len(batch["labels"])
