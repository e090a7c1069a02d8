"""`hfquant demo`: what quantization costs and saves, on a small model that was really trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SpecError
from ..report import strict_json
from .comparison import Row, compare, parse_methods
from .evaluate import interval
from .output import stdout, table

# One of every kind, most bits first.
METHODS = "int8,llm_int8,fp8,nf4,nf4:double_quant=true,int4,int4:symmetric=false,e2m1,int3"
BUNDLED = "tests/models/tiny-llama"
HELDOUT = "tests/models/heldout.txt"


def demo_command(
    model: Annotated[str | None, typer.Option(help="Folder of a model; the bundled one by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text file to measure on; the bundled one by default.")] = None,
    methods: Annotated[str, typer.Option(help="Methods, options after colons: int8,nf4:double_quant=true")] = METHODS,
    sequences: Annotated[int, typer.Option(help="How many sequences to compare.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table as JSON.")] = None,
) -> None:
    """Quantize a small trained model with several methods, reload each, and compare them in one table."""
    configs = parse_methods(methods)
    source = model or str(bundled(BUNDLED))
    text = data or bundled(HELDOUT)
    if not text.is_file():
        raise SpecError(f"--data {text} is not a file: give a text file")
    if json is not None:  # before minutes of measuring
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise SpecError(f"--json {json}: its folder cannot be made ({problem}): name another file") from problem
    rows, facts = compare(source, text, configs, sequences, length)
    _show(rows, facts)
    if json is not None:
        json.write_text(strict_json({**facts, "rows": [row.to_dict() for row in rows]}) + "\n")


def bundled(name: str) -> Path:
    """A file or folder of the repository, which is not installed with the package. Raises SpecError."""
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / name).exists():
            return root / name
    raise SpecError(f"{name} comes with the repository and is not here: run in a clone, or give --model and --data")


def cells(row: Row) -> list[str]:
    """The cells of a row, for people."""
    measured, original = row.fidelity, not row.coverage
    difference = "" if original else interval(measured.dppl_ci, 3, sign=True)
    return [
        row.label,
        f"{row.bits_per_weight:.2f}",
        f"{row.mb:.2f}",
        "" if original else f"{measured.kl:.5f}",
        f"{measured.ppl:.2f}",
        difference,
        "" if original else f"{measured.top1:.1%}",
        "" if original else f"{row.coverage:.0%}",
    ]


HEADINGS = ("method", "bits", "MB", "KL", "ppl", "ppl change", "top-1", "cover")


def _show(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    out = stdout()
    made = table(*HEADINGS, right=HEADINGS[1:])
    for row in rows:
        made.add_row(*cells(row))
    predictions = f"{rows[0].fidelity.tokens} predictions on {facts['data']}"
    out.print(f"\n[bold]{facts['model']}[/], {predictions}: quantized, saved, reloaded, compared\n")
    out.print(made)
    out.print(
        "\nbits: per quantized weight, scales included   MB: the whole model\n"
        "KL: divergence from the original, nats       top-1: same most likely token\n"
        "ppl change: 95 % interval, paired            cover: share of bytes quantized",
        style="dim",
    )
    out.print(f"\n{facts['seconds']:.0f} s. Next, on a model of your own (a folder or a name on the Hub):\n")
    for line in (
        "hfquant quantize MODEL --method nf4 --dry-run",
        "hfquant quantize MODEL --method nf4 --output OUT",
        "hfquant inspect OUT --reference MODEL",
        "hfquant eval OUT --reference MODEL --data TEXT",
    ):
        out.print(f"  {line}")
