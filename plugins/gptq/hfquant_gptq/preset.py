"""The method "gptq": weights of few bits that are rounded with calibration data."""

from __future__ import annotations

from typing import Any

from hfquant.errors import SpecError
from hfquant.presets import group_blocks, step
from hfquant.recipe import Recipe, Step
from hfquant.spec import Scheme, TensorSpec

from .rounder import check_options


def gptq(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    grid: str | None = None,
    range: str | dict[str, Any] = "weighted_mse",
    actorder: str = "group",
    damping: float = 0.01,
    gptaq: float = 0.0,
    sweeps: int = 1,
    transform: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
) -> Recipe:
    """Weights of `bits` bits, 2 to 8, rounded by GPTQ; inputs stay in floating point. Needs calibration data.

    The defaults are what GPTQ is known by: 4 bits, symmetric, groups of 128. `symmetric=False` gives each group a zero
    point and is better, most of all with 3 and 2 bits, for `bits` more bits per group. `group_size`: -1 for one scale
    per output channel. `grid`: any other grid instead of integers, such as "nf4". `range`: "weighted_mse" clips each
    group where that lowers its error, "absmax" does not. `actorder`, `damping`, `gptaq`, `sweeps`: see the rounder.
    `transform`: one or more transforms that run first. Raises SpecError for options that make no sense.
    """
    check_options(actorder, damping, 1, gptaq, sweeps)
    options = {"actorder": actorder, "damping": damping, "gptaq": gptaq, "sweeps": sweeps}
    blocks = group_blocks(None, group_size, 128)
    scale = "float32" if blocks.cols == -1 else "float16"  # as checkpoints of GPTQ have it
    weight = TensorSpec(_grid(bits, symmetric, grid), blocks, not symmetric, scale)
    chosen = transform if isinstance(transform, list) else [] if transform is None else [transform]
    return Recipe(Scheme(weight), step(range), Step("gptq", options), transforms=tuple(step(item) for item in chosen))


def _grid(bits: int, symmetric: bool, grid: str | None) -> str:
    """Name of the grid of the weights."""
    if grid is not None:
        if not symmetric or bits != 4:
            raise SpecError(f"grid={grid!r} decides what numbers there are: leave out bits and symmetric")
        return grid
    if isinstance(bits, bool) or bits not in (2, 3, 4, 5, 6, 7, 8):
        raise SpecError(f"bits is a whole number from 2 to 8, got {bits!r}")
    return f"{'' if symmetric else 'u'}int{bits}"
