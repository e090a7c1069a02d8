"""What do the methods cost and save on the small trained model?

Runs `hfquant demo`, writes its table to results/demo.json and shows it in README.md. `--render` only shows what is
committed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT, README = ROOT / "benchmarks" / "results" / "demo.json", ROOT / "README.md"
BEGIN, END = "<!-- demo table: written by benchmarks/demo.py -->", "<!-- end of demo table -->"
PLACEHOLDER = "*Not measured yet: `python benchmarks/demo.py` measures and fills this in.*"
HEADINGS = ("method", "bits per weight", "MB", "KL", "perplexity", "95 % interval of its change", "top-1", "coverage")


def committed() -> dict[str, Any] | None:
    """The committed result, or None before the first."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else None


def render(result: dict[str, Any] | None) -> str:
    """The result as Markdown."""
    if result is None:
        return PLACEHOLDER
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    measured = row["fidelity"]
    size = [row["label"], f"{row['bits_per_weight']:.2f}", f"{row['mb']:.2f}"]
    if not row["coverage"]:  # the original
        return [*size, "", f"{measured['ppl']:.3f}", "", "", ""]
    low, high = measured["dppl_ci"]
    change = f"[{low:+.3f}, {high:+.3f}]"
    shares = [f"{measured['top1']:.1%}", f"{row['coverage']:.0%}"]
    return [*size, f"{measured['kl']:.5f}", f"{measured['ppl']:.3f}", change, *shares]


def section(page: str) -> str:
    """What stands between the marks of a page."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def fill(page: str, table: str) -> str:
    """The page with a new table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    """Measure unless told only to render; returns the exit status."""
    if "--render" not in arguments:
        from hfquant.cli import main as hfquant

        if status := hfquant(["demo", "--json", str(RESULT), *arguments]):
            return status
    README.write_text(fill(README.read_text(), render(committed())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
