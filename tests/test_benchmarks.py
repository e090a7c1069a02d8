"""Figures quoted in the README are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_quotes_the_measured_load_memory() -> None:
    result = json.loads((ROOT / "benchmarks/results/load_memory.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.search(r"a (\S+) GB checkpoint as `nf4` peaks at (\S+) GB .*?\(bitsandbytes: (\S+) GB;", readme)
    assert quoted is not None
    peaks = [result["median"][method]["peak_bytes"] for method in ("nf4", "bitsandbytes nf4")]
    assert list(quoted.groups()) == [f"{size / 1e9:.2f}" for size in (result["checkpoint_bytes"], *peaks)]
