"""Train the small BERT and ViT classifiers that the tests quantize, from scratch, on one CPU core.

    python -m tests.models.train_encoders

writes ``tiny-bert/`` and ``tiny-vit/``, Hugging Face model directories, in a few minutes each.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .tasks import (
    SENTIMENTS,
    SHAPES,
    SIZE,
    TEST_SEED,
    TRAIN_SEED,
    VOCABULARY,
    Batch,
    accuracy,
    image_batch,
    inputs_of,
    text_batch,
)
from .training import MUON_LR, WEIGHT_DECAY, descend, export, muon_and_adamw, set_learning_rates

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: {pipeline}
---

# {name}

A small {architecture} that was really trained, for tests of quantization: {parameters:,} parameters, 4 layers
of hidden size 128, 4 heads, bfloat16 weights.

It {what},
and is no good for anything else.

## Training

| | |
| --- | --- |
| Data | made by `tests/models/tasks.py`, `{draw}(seed, count)`; its first lines state the task |
| Classes | {classes} |
| Training | {steps} steps of {batch} samples, each seen once, {minutes:.1f} min on one CPU core |
| Optimizers | Muon for the matrices in the blocks, AdamW for the rest; warm-up, then linear decay to zero |
| Test accuracy | {percent:.2f} % of {test_count} samples, `{draw}(TEST_SEED, {test_count})` |

The accuracy is that of the stored weights in float32 arithmetic. `training.json` holds the full record. Train a model
like it with

    python -m tests.models.train_encoders --only {name}

in the same versions of Python and PyTorch. The weights come out equal only on the same kind of CPU.
"""

BATCH = 64
"""Samples per optimizer step."""

TEST_COUNT = 2000
LOG_STEPS = 200
ADAM_LR = 0.002

_SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
_NO_DROPOUT = {"initializer_range": 0.08, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build_bert() -> BertForSequenceClassification:
    """Return a freshly initialised sentence classifier."""
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
        type_vocab_size=1,
        id2label=dict(enumerate(SENTIMENTS)),
        label2id={name: label for label, name in enumerate(SENTIMENTS)},
        **_SIZES,
        **_NO_DROPOUT,
    )
    # Eager attention: the backward pass of the fused kernel is the slowest part of a step on a CPU.
    return BertForSequenceClassification._from_config(config, attn_implementation="eager")


def build_vit() -> ViTForImageClassification:
    """Return a freshly initialised image classifier."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: label for label, name in enumerate(SHAPES)},
        **_SIZES,
        **_NO_DROPOUT,
    )
    return ViTForImageClassification._from_config(config, attn_implementation="eager")


@dataclass(frozen=True)
class Task:
    """What a model is trained on and for how long."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[[int, int], Batch]
    steps: int
    pipeline: str
    what: str
    draw: str


TASKS = {
    "tiny-bert": Task(
        build_bert,
        text_batch,
        steps=4500,
        pipeline="text-classification",
        what="judges sentences of a made-up language: what they say, good or bad, about the topic they are asked about",
        draw="text_batch",
    ),
    "tiny-vit": Task(
        build_vit,
        image_batch,
        steps=2200,
        pipeline="image-classification",
        what="names the shape or the texture in images of 32 x 32 pixels",
        draw="image_batch",
    ),
}


def build_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the 2-D weights of the blocks and AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if ".layer" in name and p.ndim == 2]
    return muon_and_adamw(model, matrices, ADAM_LR, betas=(0.9, 0.98))


def train_step(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], batch: Batch) -> float:
    """Do one optimizer step, with bfloat16 matrix products, and return the mean cross-entropy in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(**inputs_of(batch)).logits
    loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
    return descend(model, optimizers, loss)


def train(model: PreTrainedModel, task: Task, steps: int) -> list[dict[str, float]]:
    """Train for so many steps, every one on samples of its own; return the losses on the way."""
    optimizers = build_optimizers(model)
    history: list[dict[str, float]] = []
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        set_learning_rates(optimizers, step, step / steps)
        recent.append(train_step(model, optimizers, task.batch(TRAIN_SEED + step, BATCH)))
        if len(recent) == LOG_STEPS or step + 1 == steps:
            history.append({"step": step + 1, "train_loss": round(sum(recent) / len(recent), 4)})
            print(history[-1], f"{time.monotonic() - started:.0f} s", flush=True)
            recent.clear()
    return history


def write_record(directory: Path, record: dict[str, Any], task: Task, config: Any) -> None:
    """Write ``training.json`` and the model card, ``README.md``."""
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    card = CARD.format(
        **record,
        name=directory.name,
        architecture=config.architectures[0],
        pipeline=task.pipeline,
        what=task.what,
        draw=task.draw,
        classes=", ".join(config.id2label.values()),
        minutes=record["seconds"] / 60,
        percent=100 * record["accuracy"],
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def run(directory: Path, task: Task, steps: int, seed: int) -> None:
    """Train one model and write its directory."""
    torch.manual_seed(seed)
    model = task.build()
    started = time.monotonic()
    history = train(model, task, steps)
    seconds = round(time.monotonic() - started)
    export(directory, model)
    stored = type(model).from_pretrained(directory, dtype=torch.float32).eval()
    record = {
        "accuracy": accuracy(stored, task.batch(TEST_SEED, TEST_COUNT)),
        "test_count": TEST_COUNT,
        "parameters": model.num_parameters(),
        "steps": steps,
        "batch": BATCH,
        "seconds": seconds,
        "learning_rate": {"muon": MUON_LR, "adamw": ADAM_LR},
        "weight_decay": WEIGHT_DECAY,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": history,
    }
    write_record(directory, record, task, stored.config)
    print(directory.name, record["accuracy"], flush=True)


def main(
    output: Annotated[Path, typer.Option(help="Directory to write into.")] = Path(__file__).parent,
    only: Annotated[str | None, typer.Option(help="One of the models: tiny-bert or tiny-vit.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of each model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the models and write their directories."""
    torch.set_num_threads(threads)
    for name in [only] if only else TASKS:
        run(output / name, TASKS[name], steps or TASKS[name].steps, seed)


if __name__ == "__main__":
    typer.run(main)
