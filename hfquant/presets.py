"""The methods of the core: k-bit weights on any grid, with blocks, zero points, double quantization and outliers."""

from __future__ import annotations

from functools import partial
from typing import Any

from .blocks import Blocks
from .errors import SpecError
from .recipe import Preset, Recipe, Step
from .spec import Scheme, TensorSpec

DOUBLE_QUANTIZATION = TensorSpec("uint8", Blocks(1, 256), scale="float32")


def step(name_or_dict: str | dict[str, Any]) -> Step:
    """A step from its name, or from a dict with its name and options, as users write them."""
    if isinstance(name_or_dict, str):
        return Step(name_or_dict)
    if not isinstance(name_or_dict, dict) or "name" not in name_or_dict:
        raise SpecError(f'a step is a name or {{"name": ..., options}}, got {name_or_dict!r}')
    return Step.from_dict(name_or_dict)


def group_blocks(block_size: int | None, group_size: int | None, default: int) -> Blocks:
    """Blocks of one row and `block_size` columns, -1 for the whole row; `group_size` is another name for the same."""
    if block_size is not None and group_size is not None and block_size != group_size:
        raise SpecError(f"block_size={block_size} and group_size={group_size} mean the same and differ: give one")
    size = block_size if block_size is not None else group_size if group_size is not None else default
    if not isinstance(size, int) or (size != -1 and size < 2):
        asked = "block_size" if block_size is not None else "group_size"
        raise SpecError(f"{asked} is at least 2, or -1 for one scale per output channel, got {size!r}")
    return Blocks(1, size)


def kbit(
    grid: str,
    *,
    block_size: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    double_quant: bool = False,
    range: str | dict[str, Any] = "absmax",
    outliers: float = 0.0,
    scale_dtype: str | None = None,
    layout: str | None = None,
) -> Recipe:
    """Weights on `grid` with one scale per block; inputs stay in floating point.

    `block_size` (or `group_size`): weights along the input axis that share a scale, 64 by default, and a whole row
    for 8-bit grids. `symmetric=False`: zero points, for integer grids. `double_quant`: 8-bit scales (QLoRA).
    `range`: "absmax", "percentile", "mse" or "kl", or a dict with options. `outliers`: share of input columns kept in
    16 bit, chosen by the spread of the previous layer's weights. `scale_dtype`: bfloat16 for groups, float32 for rows.
    """
    blocks = group_blocks(block_size, group_size, -1 if _is_byte(grid) else 64)
    if not symmetric:
        if not grid.startswith("int"):
            raise SpecError(f"symmetric=False needs an integer method such as int4, {grid!r} has no zero point")
        grid = f"u{grid}"
    if double_quant and scale_dtype is not None:
        raise SpecError("double_quant decides how scales are stored: leave scale_dtype out")
    plain = scale_dtype or ("float32" if blocks.cols == -1 else "bfloat16")
    weight = TensorSpec(grid, blocks, not symmetric, DOUBLE_QUANTIZATION if double_quant else plain)
    if not isinstance(outliers, int | float) or not 0 <= outliers < 1:
        raise SpecError(
            f"outliers is the share of input columns kept in 16 bit, at least 0 and below 1, got {outliers!r}"
        )
    columns = Step("proxy", {"fraction": outliers}) if outliers else Step("none")
    return Recipe(Scheme(weight), step(range), columns=columns, layout=layout)


def _is_byte(grid: str) -> bool:
    """Whether a grid's codes fill a byte."""
    return TensorSpec(grid, Blocks(1, -1)).numbers().bits == 8


def _grids_of_methods() -> dict[str, str]:
    """Method name -> grid name."""
    integers = {f"int{bits}": f"int{bits}" for bits in (2, 3, 4, 5, 6, 7, 8)}
    floats = [f"e{e}m{bits - 1 - e}" for bits in (3, 4, 5, 6, 7, 8) for e in (1, 2, 3, 4, 5, 6, 7) if e < bits]
    quantiles = {f"quantile{bits}": f"quantile{bits}" for bits in (2, 3, 4, 5, 6, 7, 8)}
    dynamic = {f"dynamic{bits}": f"dyn{bits}" for bits in (3, 4, 5, 6, 7, 8)}
    return {**integers, **{name: name for name in floats}, "nf4": "nf4", "fp4": "fp4", **quantiles, **dynamic}


BUILTIN: dict[str, Preset] = {method: partial(kbit, grid) for method, grid in _grids_of_methods().items()}
