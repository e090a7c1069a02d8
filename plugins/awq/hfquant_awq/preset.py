"""The method "awq": few-bit weights, scaled and clipped by calibration data."""

from __future__ import annotations

from typing import Any

from hfquant.errors import SpecError
from hfquant.presets import group_blocks, step
from hfquant.recipe import Recipe, Step
from hfquant.spec import Scheme, TensorSpec


def awq(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    grid: str | None = None,
    duo: bool = True,
    clip: bool = True,
    rounder: str | dict[str, Any] = "nearest",
) -> Recipe:
    """Weights of `bits` bits, 2 to 8, with AWQ's scales and clipping; inputs stay in floating point. Needs data.

    `group_size`: weights along the input axis that share a scale, -1 for a whole row. `symmetric=False` gives each
    group a zero point. `grid`: any other grid instead of integers, such as "nf4". `duo`: also try scales that look at
    the weights. `clip`: search for a smaller range for each group. `rounder`: "nearest", or "gptq" and its options.
    Raises SpecError for options that make no sense.
    """
    for name, value in (("symmetric", symmetric), ("duo", duo), ("clip", clip)):
        if not isinstance(value, bool):
            raise SpecError(f"{name} is True or False, got {value!r}")
    blocks = group_blocks(None, group_size, 128)
    numbers, zero = _numbers(bits, symmetric, grid)
    weight = TensorSpec(numbers, blocks, zero, "float32" if blocks.cols == -1 else "float16")
    found = Step("awq_clip") if clip else Step("absmax")
    return Recipe(Scheme(weight), found, step(rounder), transforms=(Step("awq", {"duo": duo}),))


def _numbers(bits: int, symmetric: bool, grid: str | None) -> tuple[str, bool]:
    """Name of the grid of the weights, and whether they have zero points."""
    if grid is not None:
        if symmetric or bits != 4:
            raise SpecError(f"grid={grid!r} decides what numbers there are: leave out bits and symmetric")
        return grid, False
    if isinstance(bits, bool) or bits not in (2, 3, 4, 5, 6, 7, 8):
        raise SpecError(f"bits is 2 to 8, got {bits!r}")
    return (f"int{bits}", False) if symmetric else (f"uint{bits}", True)
