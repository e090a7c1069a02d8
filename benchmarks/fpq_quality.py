"""What do 4 and 8 bits for weights and inputs cost, with FPQ and with the methods that LLM-FP4 is compared with?

Mean token KL (nats) between the bundled model and its quantized form, in float32 arithmetic, for three seeds: each has
its own calibration data (128 samples of 256 tokens from the training files) and its own part of the held-out text. The
rows are those of table 1 of Liu et al. 2023, "LLM-FP4"; E/W/A are the bits of embeddings, weights and inputs. "spread"
scales every channel after every norm by 2^-3 to 2^3 without changing the function. Weights have a range for each output
channel, inputs one for all values, found by calibration, or in rows that say so one for each token, at run time.
Writes results/fpq_quality.json and .md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from common import RESULTS
from common.quality import setting, trials
from transformers.utils import logging

from hfquant.backend import Backend, register
from hfquant.blocks import Blocks
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, Scheme, TensorSpec

SETTINGS = ("8/8/8", "4/4/16", "4/4/8", "4/4/4")
SPREAD = ("4/4/8", "4/4/4")  # settings that are measured on the spread model too


def integers(bits: int, act_bits: int, transform: str | None = None, rounder: str = "nearest") -> Recipe:
    """Integer weights with a scale per output channel, integer inputs with a range per token: for SmoothQuant."""
    scheme = Scheme(TensorSpec(f"int{bits}", Blocks(1, -1)), InputSpec(TensorSpec(f"int{act_bits}", Blocks(1, -1))))
    options = {"online": True} if transform == "rotate" else {}
    transforms = () if transform is None else (Step(transform, options),)
    return Recipe(scheme, Step("weighted_mse" if rounder == "gptq" else "absmax"), Step(rounder), transforms=transforms)


@dataclass(frozen=True)
class Row:
    """A method for some bits; `base`: the row that `bar` is a ratio to."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ("plain", "spread")
    base: str | None = None
    bar: float | None = None
    barred: str | None = None  # the variant that the bar is for


def rows() -> dict[str, Row]:
    """Every line of the table by its name."""
    found = {f"{bits} {name}": row for bits in SETTINGS for name, row in table_of(bits)}
    found = {name: row if name.startswith(SPREAD) else replace(row, variants=("plain",)) for name, row in found.items()}
    return found | dict(barred())


def table_of(bits: str) -> Iterator[tuple[str, Row]]:
    """The lines of one setting."""
    embedding, weight, act = map(int, bits.split("/"))
    width = {"bits": weight, "act_bits": act, "embeddings": embedding < 16}
    uniform = {"format": f"e1m{weight - 2}"} | ({"act_format": f"e1m{act - 2}"} if act < 16 else {})
    plain = {**width, "search": "minmax", "preshift": False}
    yield "MinMax INT", Row("fpq", {**plain, **uniform})
    yield "MinMax FP", Row("fpq", plain)
    if act == 16:
        yield "GPTQ, INT", Row("gptq", {"bits": weight, "group_size": -1, "embeddings": True})
    else:
        asked = {"bits": weight, "act_bits": act}
        yield "MinMax INT, token", Row("integers", asked)
        yield "SmoothQuant, INT, token", Row("integers", {**asked, "transform": "smoothquant"})
        yield "rotation + GPTQ, INT, token", Row("integers", {**asked, "transform": "rotate", "rounder": "gptq"})
    yield "FPQ, paper's candidates", Row("fpq", {**width, "search": "paper", "preshift": False})
    yield "FPQ without shift", Row("fpq", {**width, "preshift": False})
    if act < 16:
        yield "FPQ", Row("fpq", width)
        yield "FPQ, token", Row("fpq", {**width, "inputs": "token"})
    yield "FPQ + GPTQ", Row("fpq", {**width, "rounder": "gptq"})


def barred() -> Iterator[tuple[str, Row]]:
    """The lines that have to keep a distance from each other: weights and inputs alone."""
    width = {"bits": 4, "act_bits": 4}
    base = "16/4/4 MinMax FP"
    yield base, Row("fpq", {**width, "search": "minmax", "preshift": False})
    yield "16/4/4 FPQ without shift", Row("fpq", {**width, "preshift": False}, base=base, bar=0.30, barred="plain")
    shifted = Row("fpq", width, base="16/4/4 FPQ without shift", bar=0.80, barred="spread")
    yield "16/4/4 FPQ", shifted


def main() -> None:
    """Measure, print, write; exit status 1 if a bar is missed."""
    logging.disable_progress_bar()
    register(Backend("rows", presets={"integers": integers}), "benchmarks/fpq_quality.py")
    table = rows()
    found: dict[str, dict[str, list[float]]] = {name: {v: [] for v in row.variants} for name, row in table.items()}
    for trial in trials():
        for name, row in table.items():
            for variant in row.variants:
                found[name][variant].append(trial.kl(row.method, row.options, variant))
                print(f"seed {trial.seed}  {name:42s} {variant:7s} {found[name][variant][-1]:9.5f}", flush=True)
    lines = {name: line(name, table, found) for name in table}
    result = {**setting(str(__doc__), __file__), "rows": lines}
    (RESULTS / "fpq_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "fpq_quality.md").write_text(markdown(result))
    print(markdown(result))
    missed = [name for name, row in lines.items() if row["bar"] is not None and row["ratio"] > row["bar"]]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


def line(name: str, table: dict[str, Row], found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """One line of the result."""
    row = table[name]
    ratio = None
    if row.base is not None and row.barred is not None:
        ratio = mean(found[name][row.barred]) / mean(found[row.base][row.barred])
    return {
        "method": row.method,
        "options": row.options,
        "kl": {variant: mean(values) for variant, values in found[name].items()},
        "kl_by_seed": found[name],
        "base": row.base,
        "ratio": ratio,
        "ratio_on": row.barred,
        "bar": row.bar,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table as text."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    out = ["# 4 and 8 bits for weights and inputs", "", "Made by `benchmarks/fpq_quality.py`; do not edit.", ""]
    out += [" ".join(str(__doc__).split("\n\n")[1].split()).replace("Writes results/fpq_quality.json and .md.", ""), ""]
    out += ["| E/W/A | method | KL, plain | KL, spread | ratio | bar |", "|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        bits, _, method = name.partition(" ")
        kl = [f"{row['kl'][variant]:.4f}" if variant in row["kl"] else "" for variant in ("plain", "spread")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} on {row['ratio_on']}"
        bar = "" if row["bar"] is None else f"{row['bar']:.2f}"
        out.append(f"| {bits} | {method} | {kl[0]} | {kl[1]} | {ratio} | {bar} |")
    machine = result["machine"]
    out += ["", f"{machine['processor']}, {machine['threads']} threads; {versions}.", ""]
    return "\n".join(out)


if __name__ == "__main__":
    main()
