"""Figures quoted in the README are those of the committed results."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[1]


def test_readme_quotes_the_measured_load_memory() -> None:
    result = json.loads((ROOT / "benchmarks/results/load_memory.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.search(r"a (\S+) GB checkpoint as `nf4` peaks at (\S+) GB .*?\(bitsandbytes: (\S+) GB;", readme)
    assert quoted is not None
    peaks = [result["median"][method]["peak_bytes"] for method in ("nf4", "bitsandbytes nf4")]
    assert list(quoted.groups()) == [f"{size / 1e9:.2f}" for size in (result["checkpoint_bytes"], *peaks)]


def peers() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/peers.json").read_text())


def test_the_table_of_other_packages_is_that_of_the_result() -> None:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks/peers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    assert module.markdown(peers()) == (ROOT / "benchmarks/results/peers.md").read_text()


def test_what_the_documentation_says_about_other_packages_is_what_was_measured() -> None:
    for rows in peers()["rows"].values():
        kl = {run: mean(mean(values) for values in row["kl"].values()) for run, row in rows.items()}
        seconds = {run: median(row["seconds"]) for run, row in rows.items()}
        calibrated = [run for run in rows if "nearest" not in run and not run.startswith("hfquant")]
        assert all(kl["hfquant gptq"] < kl[run] and seconds["hfquant gptq"] < seconds[run] for run in calibrated)
        if "llmcompressor awq" in rows:
            assert kl["hfquant awq"] < kl["llmcompressor awq"] and seconds["hfquant awq"] < seconds["llmcompressor awq"]
