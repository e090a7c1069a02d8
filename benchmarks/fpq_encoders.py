"""What do 4, 6 and 8 bits cost in accuracy on a classifier of sentences and one of images, with FPQ and without?

The bundled BERT and vision transformer on 4000 test samples, each method calibrated on 128 samples of three draws that
differ from the test and training draws; figures are means. Weights, inputs of layers and the operands of attention's
products are quantized, embeddings too. E/W/A are the bits of embeddings, weights and inputs. The rows are those of
tables 2 and 3 of Liu et al. 2023, "LLM-FP4", and the ablation of calibration sizes is that of table 4. "agree" is the
share of samples with the full-precision model's answer, KL (nats) is that of its prediction to the quantized one's.
"spread" scales every channel after every norm by 2^-3 to 2^3 without changing the function.
Writes results/fpq_encoders.json and .md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import RESULTS, facts
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hfquant import HfQuantConfig
from hfquant_fpq.space import formats, usual
from tests.models import BERT_DIR, VIT_DIR, tasks
from tests.models.outliers import spread

SEEDS = (tasks.CALIBRATION_SEED, tasks.CALIBRATION_SEED + 1, tasks.CALIBRATION_SEED + 2)
TEST, SAMPLES, BATCH = 4000, 128, 32
SIZES = (32, 64, 128, 256)
SETTINGS = {"BERT": ("8/8/8", "6/6/6", "4/4/8", "4/4/4"), "ViT": ("6/6/6", "4/4/4"), "ViT, spread": ("6/6/6", "4/4/4")}

Row = tuple[str, str, int, dict[str, Any]]
"""E/W/A, method, calibration samples, options of the method "fpq"."""


def rows(settings: tuple[str, ...], ablation: bool) -> Iterator[Row]:
    """The lines of a table."""
    for bits in settings:
        _, weight, act = map(int, bits.split("/"))
        width = {"bits": weight, "act_bits": act, "embeddings": True, "attention": True}
        plain = {**width, "search": "minmax", "preshift": False}
        for name in formats(weight) if weight == act else (f"e1m{weight - 2}", usual(weight)):
            integer = name.startswith("e1")
            seen = (f"e1m{act - 2}" if integer else usual(act)) if weight != act else name
            label = "MinMax INT" if integer else f"MinMax FP ({name.upper()})"
            yield bits, label, SAMPLES, {**plain, "format": name, "act_format": seen}
        yield bits, "FPQ without shift", SAMPLES, {**width, "preshift": False}
        yield bits, "FPQ", SAMPLES, width
        yield bits, "FPQ, Fisher", SAMPLES, {**width, "loss": "fisher"}
    for bits in ("4/4/4", "6/6/6") if ablation else ():
        width = {"bits": int(bits[0]), "act_bits": int(bits[0]), "embeddings": True, "attention": True}
        for size in SIZES:
            if size != SAMPLES:
                yield bits, "FPQ", size, width


class Task:
    """A model, the samples to judge it on, and those to calibrate on."""

    def __init__(self, auto: Any, source: Path, draw: Callable[[int, int], tasks.Batch]) -> None:
        self.auto, self.source, self.draw = auto, source, draw
        test = draw(tasks.TEST_SEED, TEST)
        self.inputs, self.labels = tasks.inputs_of(test), test["labels"]
        self.exact = self.logits(auto.from_pretrained(source, dtype=torch.float32))

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits [4000, classes] of the test samples."""
        parts = ({name: value[i : i + 200] for name, value in self.inputs.items()} for i in range(0, TEST, 200))
        return torch.cat([model(**part).logits for part in parts])

    def data(self, seed: int, samples: int) -> list[tasks.Batch]:
        """Calibration batches."""
        drawn = tasks.inputs_of(self.draw(seed, samples))
        return [{name: value[i : i + BATCH] for name, value in drawn.items()} for i in range(0, samples, BATCH)]

    def measure(self, options: dict[str, Any], seed: int, samples: int) -> dict[str, float]:
        """Accuracy, agreement and KL of a quantized model."""
        config = HfQuantConfig("fpq", **options, data=self.data(seed, samples))
        model = self.auto.from_pretrained(self.source, quantization_config=config, dtype=torch.float32)
        return self.judge(self.logits(model))

    def judge(self, logits: Tensor) -> dict[str, float]:
        """The same for logits."""
        answer = logits.argmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), self.exact.log_softmax(-1), log_target=True, reduction="batchmean")
        agree = (answer == self.exact.argmax(-1)).float().mean()
        return {"accuracy": float((answer == self.labels).float().mean()), "agree": float(agree), "kl": float(kl)}


def main() -> None:
    """Measure, print, write; the tables that are named, such as "BERT", or all of them."""
    logging.disable_progress_bar()
    named, stored = sys.argv[1:], RESULTS / "fpq_encoders.json"
    result: dict[str, Any] = {**facts(str(__doc__), __file__), "seeds": SEEDS, "test": TEST, "tables": {}}
    if named and stored.exists():
        result["tables"] = json.loads(stored.read_text())["tables"]
    with tempfile.TemporaryDirectory() as folder:
        original = AutoModelForImageClassification.from_pretrained(VIT_DIR, dtype=torch.float32)
        spread(original).save_pretrained(folder)
        sources = {
            "BERT": (AutoModelForSequenceClassification, BERT_DIR, tasks.text_batch),
            "ViT": (AutoModelForImageClassification, VIT_DIR, tasks.image_batch),
            "ViT, spread": (AutoModelForImageClassification, Path(folder), tasks.image_batch),
        }
        for name in named or sources:
            result["tables"][name] = list(measured(name, Task(*sources[name])))
            result["tables"] = {name: result["tables"][name] for name in sources if name in result["tables"]}
            stored.write_text(json.dumps(result, indent=1) + "\n")
            stored.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    missed = [name for name, lines in result["tables"].items() if not holds(lines)]
    sys.exit(f"FPQ is below MinMax on {', '.join(missed)}" if missed else 0)


def measured(name: str, task: Task) -> Iterator[dict[str, Any]]:
    """The lines of a table."""
    yield {"bits": "32/32/32", "method": "full precision", "samples": 0, **task.judge(task.exact)}
    for bits, method, samples, options in rows(SETTINGS[name], ablation=name == "BERT"):
        found = [task.measure(options, seed, samples) for seed in SEEDS]
        means = {key: mean(each[key] for each in found) for key in found[0]}
        spreads = {f"{key}_stdev": stdev(each[key] for each in found) for key in found[0]}
        print(f"{name:12s} {bits} {method:20s} {samples:4d} {means}", flush=True)
        yield {"bits": bits, "method": method, "samples": samples, "options": options, **means, **spreads}


def holds(lines: list[dict[str, Any]]) -> bool:
    """Whether 4/4/4 FPQ, in its best form, is nearer to the full-precision model than every MinMax row."""
    kl = {line["method"]: line["kl"] for line in lines if line["bits"] == "4/4/4" and line["samples"] == SAMPLES}
    searched = [value for name, value in kl.items() if name.startswith("FPQ")]
    return min(searched) < min(value for name, value in kl.items() if name.startswith("MinMax"))


def markdown(result: dict[str, Any]) -> str:
    """The tables as text."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about = " ".join(str(__doc__).split("\n\n")[1].split()).replace(" Writes results/fpq_encoders.json and .md.", "")
    out = ["# 4, 6 and 8 bits for classifiers", "", "Made by `benchmarks/fpq_encoders.py`; do not edit.", "", about]
    for name, lines in result["tables"].items():
        out += [
            "",
            f"## {name}",
            "",
            "| E/W/A | method | samples | accuracy | agree | KL |",
            "|---|---|---|---|---|---|",
        ]
        for line in lines:
            shown = f"{line['accuracy']:.2%} | {line['agree']:.2%} | {line['kl']:.4f}"
            out.append(f"| {line['bits']} | {line['method']} | {line['samples'] or ''} | {shown} |")
    machine = result["machine"]
    return "\n".join([*out, "", f"{machine['processor']}, {machine['threads']} threads; {versions}.", ""])


if __name__ == "__main__":
    main()
