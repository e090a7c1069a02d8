"""Which formats the layers of a model have, counted by type of layer."""

from __future__ import annotations

from collections.abc import Iterable

Counts = dict[str, dict[str, int]]
"""How many layers there are: by type, then by grid."""


def count_formats(layers: Iterable[tuple[str, str | None]]) -> Counts:
    """Count `layers`, names and grids, both axes sorted; those without a grid are left out.

    Experts that are stored together have one name, and count once.
    """
    found: Counts = {}
    for name, grid in layers:
        if grid is not None:
            row = found.setdefault(layer_type(name), {})
            row[grid] = row.get(grid, 0) + 1
    return {kind: dict(sorted(found[kind].items())) for kind in sorted(found)}


def grids_of(counts: Counts) -> list[str]:
    """The grids that occur, sorted; one or none where all layers are alike."""
    return sorted({grid for row in counts.values() for grid in row})


def layer_type(name: str) -> str:
    """What a layer is called inside its block: the last part of its name that is no number, such as "q_proj"."""
    parts = name.split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), name)
