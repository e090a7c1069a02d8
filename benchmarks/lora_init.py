"""How much of what quantizing loses does an adapter win back before any training?

Mean token KL (nats) between the bundled model and its quantized form with a LoRA adapter on every linear layer, in
float32 arithmetic, for three seeds: each has its own part of the held-out text, its own calibration data (64 samples of
256 tokens from the training files), and the first 16 of these as the inputs that EoRA sees. Ratios are of the means
over the seeds, to the same quantized model without an adapter. LoftQ takes the best of 5 iterations where codes are
found from weights alone, and keeps the codes of calibrated methods. Writes results/lora_init.json and .md.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from common import RESULTS, facts
from common.quality import LENGTH, SEEDS, Trial, trials
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hfquant import HfQuantConfig
from hfquant.eval import Reference
from hfquant.lora.init import METHODS, initialize
from tests.models import MODEL_DIR

RANKS = (8, 16, 32)
SEQUENCES, SAMPLES, SEEN = 16, 64, 16  # of held-out text, of calibration data, and of that for EoRA


@dataclass(frozen=True)
class Row:
    """A quantized model; `bars`: the ratio that a method may have at a rank."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    bars: dict[tuple[str, int], float] = field(default_factory=dict)


def rows() -> dict[str, Row]:
    """Every quantized model by its name."""
    three = {"bits": 3, "group_size": 64, "symmetric": False}
    plain = {name: Row(name) for name in ("int4", "int2", "e2m1", "fp8")}
    return {
        "nf4": Row("nf4", bars={("loftq", 16): 0.80}),
        "int3": Row("int3", bars={("loftq", 16): 0.80}),
        **plain,
        "gptq w3": Row("gptq", three, bars={("eora", 32): 0.70}),
        "gptq w3, rotated": Row("gptq", {**three, "transform": {"name": "rotate", "online": True}}),
        "awq w3": Row("awq", three),
    }


def quantized(row: Row, data: list[Tensor]) -> Any:
    """The bundled model in the numbers of a row."""
    config = HfQuantConfig(row.method, **row.options)
    if config.needs_data:
        given = {"data": data, "samples": SAMPLES, "length": LENGTH, "batch_size": 16}
        config = HfQuantConfig(row.method, **row.options, **given)
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, quantization_config=config, dtype=torch.float32)


def measured(row: Row, trial: Trial) -> dict[str, float]:
    """KL by cell: "none", and method and rank."""
    data = [trial.data[0][:SAMPLES]]
    base = quantized(row, data)
    found = {"none": trial.reference.compare(base).kl}
    batches = list(data[0][:SEEN].split(4))
    for method in METHODS:
        for rank in RANKS:
            model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules="all-linear"))
            initialize(model, MODEL_DIR, method, batches=batches if method == "eora" else None)
            found[f"{method} {rank}"] = trial.reference.compare(model).kl
    return found


def shorter(trial: Trial) -> Trial:
    """The same trial on fewer sequences of its text."""
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    text = torch.cat(trial.reference.batches)[:SEQUENCES]
    return replace(trial, reference=Reference(model, text.split(4), cache=True))


def main() -> None:
    """Measure, print, write; exit status 1 if a bar is missed."""
    logging.disable_progress_bar()
    table = rows()
    kl: dict[str, dict[str, list[float]]] = {name: {} for name in table}
    for trial in map(shorter, trials()):
        for name, row in table.items():
            for cell, value in measured(row, trial).items():
                kl[name].setdefault(cell, []).append(value)
                print(f"seed {trial.seed}  {name:18s} {cell:9s} {value:9.5f}", flush=True)
    lines = {name: line(row, kl[name]) for name, row in table.items()}
    amounts = {
        "seeds": SEEDS,
        "tokens": SEQUENCES * (LENGTH - 1),
        "calibration": SAMPLES * LENGTH,
        "eora": SEEN * LENGTH,
    }
    result = {**facts(str(__doc__), __file__), **amounts, "rows": lines}
    (RESULTS / "lora_init.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "lora_init.md").write_text(markdown(result))
    print(markdown(result))
    missed = [
        name for name, found in lines.items() for cell, bar in found["bars"].items() if found["ratio"][cell] > bar
    ]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


def line(row: Row, kl: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the result."""
    none = mean(kl["none"])
    return {
        "method": row.method,
        "options": row.options,
        "kl": {cell: mean(values) for cell, values in kl.items()},
        "kl_by_seed": kl,
        "ratio": {cell: mean(values) / none for cell, values in kl.items() if cell != "none"},
        "bars": {f"{method} {rank}": bar for (method, rank), bar in row.bars.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a result: KL without an adapter, and how much of it is left with one."""
    cells = [f"{method} {rank}" for method in METHODS for rank in RANKS]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    out = ["# Adapters before any training", "", "Made by `benchmarks/lora_init.py`; do not edit.", ""]
    out += [" ".join(str(__doc__).split("\n\n")[1].split()).replace(" Writes results/lora_init.json and .md.", ""), ""]
    out += [f"| model | KL | {' | '.join(f'{cell}, ratio' for cell in cells)} |", f"|---|{'---|' * (len(cells) + 1)}"]
    for name, found in result["rows"].items():
        ratios = " | ".join(f"{found['ratio'][cell]:.3f}" for cell in cells)
        out.append(f"| {name} | {found['kl']['none']:.5f} | {ratios} |")
    machine = result["machine"]
    out += ["", f"{machine['processor']}, {machine['threads']} threads; {versions}.", ""]
    return "\n".join(out)


if __name__ == "__main__":
    main()
