"""How much of what 16-bit LoRA learns does each recipe with adapters learn?

The bundled model, which knows Python source, learns the order book of a shop (tests/models/style.py): 64 steps of 8
samples of 128 tokens, AdamW at a constant rate of 1e-3, rank 16 on all linear layers, in float32 arithmetic, the same
for all rows; recipes decide the rest. Measured is the loss (nats per token) on orders of another book. "learned" is
the share of 16-bit LoRA's gain, from the original model on; "exit" the same for what the recipe leaves in the end:
adapters that were merged, where it merges. Three seeds, each with its own books. Writes results/finetune_quality.json
and .md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from common import RESULTS, ROOT, facts
from transformers.utils import logging

import hfquant
from tests.models import MODEL_DIR
from tests.models.style import order_book

SEEDS = (0, 1, 2)
TRAIN = {
    "length": 128, "samples": 512, "steps": 64, "batch_size": 8, "learning_rate": 1e-3, "schedule": "constant",
    "dtype": "float32",
}  # fmt: skip
EVALUATE = {"sequences": 32, "length": 128}
PLAIN = "16-bit LoRA"
ROWS = (
    "qlora-nf4", "gptq-w4-lora", "awq-w4-lora", "fp8-lora", "llm_int8-lora", "fpq-w4a8-lora", "loftq-nf4", "qa-lora-w4",
)  # fmt: skip
BAR = 0.9


def losses(row: str, seed: int, folder: Path) -> dict[str, float]:
    """Held-out loss by stage."""
    sections: dict[str, Any] = {"lora": {"rank": 16}, "exit": "adapter"}
    if row != PLAIN:
        sections = yaml.safe_load((ROOT / "recipes" / f"{row}.yaml").read_text())
    path = folder / f"{row}.yaml"
    path.write_text(yaml.safe_dump(sections | {"train": TRAIN | {"seed": seed}, "evaluate": EVALUATE}))
    data, other = folder / "orders.txt", folder / "other.txt"
    data.write_text(order_book(seed))
    other.write_text(order_book(1000 + seed, 300))
    report = hfquant.finetune(path, MODEL_DIR, folder / row, data=data, eval_data=other)
    return {stage.name: stage.loss for stage in report.stages}


def shares(found: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """Shares of what 16-bit LoRA gained."""
    gained = plain["original"] - plain["trained"]
    last = found.get("merged", found["trained"])
    return {"learned": (plain["original"] - found["trained"]) / gained, "exit": (plain["original"] - last) / gained}


def main() -> None:
    """Measure, print, write."""
    logging.disable_progress_bar()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            plain = losses(PLAIN, seed, Path(name))
            rows.setdefault(PLAIN, []).append({**plain, "learned": 1.0, "exit": 1.0})
            for row in ROWS:
                found = losses(row, seed, Path(name))
                rows.setdefault(row, []).append({**found, **shares(found, plain)})
                print(seed, row, rows[row][-1], flush=True)
    result = {**facts(str(__doc__), __file__), "seeds": SEEDS, "bar": BAR, "training": TRAIN, "rows": rows}
    (RESULTS / "finetune_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "finetune_quality.md").write_text(markdown(result))
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The table as text."""
    out = ["# What recipes learn", "", "Made by `benchmarks/finetune_quality.py`; do not edit.", ""]
    text = " ".join(str(__doc__).split("\n\n")[1].split())
    out += [text.replace(" Writes results/finetune_quality.json and .md.", ""), ""]
    out += ["| recipe | quantized | trained | learned | least | exit |", "|---|--:|--:|--:|--:|--:|"]
    for name, seeds in result["rows"].items():
        learned = [found["learned"] for found in seeds]
        cells = [_mean(seeds, "quantized"), _mean(seeds, "trained"), f"{mean(learned):.1%}", f"{min(learned):.1%}"]
        out.append(f"| {name} | {' | '.join([*cells, format(mean(found['exit'] for found in seeds), '.1%')])} |")
    original = mean(found["original"] for found in result["rows"][PLAIN])
    out += ["", f"The original model's loss is {original:.4f}. The bar is {result['bar']:.0%} on every seed."]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    out += ["", f"{result['machine']['processor']}, {result['machine']['threads']} threads; {versions}.", ""]
    return "\n".join(out)


def _mean(seeds: list[dict[str, float]], stage: str) -> str:
    return f"{mean(found[stage] for found in seeds):.4f}" if stage in seeds[0] else ""


if __name__ == "__main__":
    main()
