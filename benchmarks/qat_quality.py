"""How much of what rounding costs does training through quantization win back?

Mean token KL (nats) between the bundled model and its quantized form, in float32 arithmetic, on three parts of the
held-out text, one a seed. "rounded": to the nearest level, without data. "trained, own text": 32 steps of
self-distillation on 128 samples of 128 tokens that the model wrote itself, no other data: LLM-QAT. "trained, text": the
same on as much of the text that the model was made from; "gptq": on the same tokens as that, without training. AdamW,
4 samples a step, rate 3e-4 falling to 0 as a cosine. Writes results/qat_quality.json and .md.
"""

from __future__ import annotations

import json
import tempfile
from statistics import mean
from typing import Any

import torch
from common import RESULTS
from common.quality import Trial, setting, trials
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, TrainingArguments
from transformers.utils import logging

from hfquant import HfQuantConfig
from hfquant.distill import DistillationTrainer, self_dataset
from hfquant.qat import prepare_qat
from tests.models import MODEL_DIR

SAMPLES, LENGTH, BATCH, RATE = 128, 128, 4, 3e-4
ROWS: dict[str, tuple[int, int]] = {"int3, blocks of 64": (3, 64), "int4, a scale per channel": (4, -1)}
COLUMNS = ("rounded", "trained, own text", "trained, text", "gptq")


def original() -> LlamaForCausalLM:
    """The bundled model in float32."""
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def trained(config: HfQuantConfig, rows: list[Tensor], seed: int) -> LlamaForCausalLM:
    """The model after training; it still computes what its quantized form will."""
    student = prepare_qat(original(), config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE,
            lr_scheduler_type="cosine", seed=seed, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        DistillationTrainer(student, arguments, train_dataset=data, teacher=original()).train()
    return student


def measure(trial: Trial, bits: int, block_size: int, own: list[Tensor]) -> dict[str, float]:
    """KL by column."""
    options = {"group_size": block_size}
    plain, kl = HfQuantConfig(f"int{bits}", **options), {}
    text = [row.clone() for row in trial.data[0][:SAMPLES, :LENGTH]]
    kl["rounded"] = trial.reference.compare(prepare_qat(original(), plain)).kl
    for column, rows in (("trained, own text", own), ("trained, text", text)):
        kl[column] = trial.reference.compare(trained(plain, rows, trial.seed)).kl
    given: dict[str, Any] = {"data": [torch.stack(text)], "samples": SAMPLES, "length": LENGTH, "batch_size": 16}
    config = HfQuantConfig("gptq", bits=bits, **options, **given)
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, quantization_config=config, dtype=torch.float32)
    kl["gptq"] = trial.reference.compare(model).kl
    return kl


def main() -> None:
    """Measure, print, write."""
    logging.disable_progress_bar()
    tokenizer, found = AutoTokenizer.from_pretrained(MODEL_DIR), {name: [] for name in ROWS}
    for trial in trials():
        written = self_dataset(original(), SAMPLES, LENGTH, tokenizer, trial.seed, batch_size=32)
        own = [row["input_ids"] for row in written]
        for name, (bits, block_size) in ROWS.items():
            found[name].append(measure(trial, bits, block_size, own))
            print(trial.seed, name, found[name][-1], flush=True)
    rows = {
        name: {column: {"mean": mean(kl[column] for kl in seeds), "by_seed": [kl[column] for kl in seeds]}
               for column in COLUMNS}
        for name, seeds in found.items()
    }  # fmt: skip
    training = {"samples": SAMPLES, "length": LENGTH, "batch": BATCH, "rate": RATE}
    result = {**setting(str(__doc__), __file__), "calibration": training, "kl": rows}
    (RESULTS / "qat_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "qat_quality.md").write_text(markdown(result))
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The table as text."""
    out = ["# Training through quantization", "", "Made by `benchmarks/qat_quality.py`; do not edit.", ""]
    out += [
        " ".join(str(__doc__).split("\n\n")[1].split()).replace(" Writes results/qat_quality.json and .md.", ""),
        "",
    ]
    out += [f"| KL | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, row in result["kl"].items():
        out.append(f"| {name} | {' | '.join(format(row[column]['mean'], '.4f') for column in COLUMNS)} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    out += ["", f"{result['machine']['processor']}, {result['machine']['threads']} threads; {versions}.", ""]
    return "\n".join(out)


if __name__ == "__main__":
    main()
