"""What calibration found, for people: the worst layers, the blocks' errors, remedies and fallbacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from ..findings import BlockFinding, worst_first
from .output import table

WORST = 5
UNKNOWN = "-"


def show_findings(out: Console, blocks: Sequence[BlockFinding], worst: int = WORST) -> None:
    """Print the layers whose outputs are worst, the error after each block, and every note."""
    layers = worst_first(layer for block in blocks for layer in block.layers)
    if worst and layers:
        made = table("output error", "worst layers", "tokens", right=("output error", "tokens"))
        for layer in layers[:worst]:
            made.add_row(percent(layer.error), short(layer.name), str(layer.tokens))
        out.print(made)
        out.print()
    if inside := [block for block in blocks if block.name]:
        out.print(f"Error of the hidden states after each of {len(inside)} blocks, what came before included:")
        out.print(Padding("  ".join(percent(block.error) for block in inside), (0, 2)))
        out.print()
    _show_notes(out, notes(blocks))


def notes(blocks: Sequence[BlockFinding]) -> dict[str, list[str]]:
    """Every remark, and the names of the blocks and layers that it is about."""
    found: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        for note in block.notes:
            found[note].append(short(block.name) or "outside the blocks")
        for layer in block.layers:
            for note in layer.notes:
                found[note].append(short(layer.name))
    return dict(found)


def _show_notes(out: Console, found: dict[str, list[str]]) -> None:
    if not found:
        out.print("No layer needed a remedy or a fallback.")
        return
    out.print("[yellow]Notes:[/]")
    for note, names in found.items():
        out.print(Padding(f"{escape(note)} [dim]({escape(', '.join(names))})[/]", (0, 2)))


def percent(error: float | None) -> str:
    """An error for people."""
    return UNKNOWN if error is None else f"{error:.2%}"


def short(name: str) -> str:
    """A name without what all names begin with."""
    return name.removeprefix("model.")


def data_line(calibration: dict[str, Any] | None) -> str | None:
    """What a model was, or is going to be, calibrated on, in a line; None without data."""
    if not calibration or calibration.get("data") is None:
        return None
    parts = [f"{calibration['samples']} samples"]
    if "length" in calibration:
        parts[0] += f" of {calibration['length']} tokens"
    if "tokens" in calibration:
        parts.append(f"{calibration['tokens']} tokens in all")
    for name in ("split", "column", "seed"):
        if name in calibration:
            parts.append(f"{name} {calibration[name]}")
    if calibration.get("packing") is False:
        parts.append("not packed")
    return f"{calibration['data']}: {', '.join(parts)}"
