"""The only place where the stages of a recipe meet: a weight in, codes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .blocks import row_chunks
from .codebooks import FittedGrid
from .columns import COLUMNS, take_outliers
from .errors import SpecError, WeightError
from .grids import FloatGrid
from .hadamard import hadamard
from .input_ranges import INPUT_RANGES, try_out
from .layouts import LAYOUTS, default_layout, empty_inputs, empty_qtensor, pack_inputs, packed_spec
from .qtensor import InputParams, QTensor
from .ranges import RANGES
from .recipe import Recipe, Step
from .rounders import ROUNDERS
from .spec import InputSpec, PackedSpec, TensorSpec
from .stats import HISTOGRAM, Stats, needs_of
from .tables import Table
from .transforms import TRANSFORMS, Transform

_REFERENCE_POSITIONAL = {"range": 3, "input range": 2, "rounder": 4, "columns": 3, "transform": 1}


def check_recipe(recipe: Recipe) -> Recipe:
    """Look up every name and option of a recipe, before long work starts. Raises SpecError."""
    spec = recipe.scheme.weight
    if not (spec.zero or isinstance(spec.numbers(), FittedGrid) or spec.numbers().signed):
        raise SpecError(f"weights need a signed grid or a zero point: {spec.grid!r} has neither")
    _check_scale(spec)
    if recipe.scheme.input is not None:
        recipe.scheme.input.tensor.numbers()
    _check_step(INPUT_RANGES, recipe.input_range)
    if recipe.scheme.input is not None and not recipe.scheme.input.dynamic:
        try_out(recipe.input_range.name, recipe.scheme.input, recipe.input_range.options)
    if recipe.attention is not None:
        check_operands(recipe.attention)
        if not recipe.attention.dynamic:
            try_out(recipe.input_range.name, recipe.attention, recipe.input_range.options)
    _check_step(RANGES, recipe.range)
    _check_step(ROUNDERS, recipe.rounder)
    _check_step(COLUMNS, recipe.columns)
    for transform in recipe.transforms:
        _check_step(TRANSFORMS, transform)
    if reason := LAYOUTS.get(layout_of(recipe)).why_not(spec):
        raise SpecError(f"layout {layout_of(recipe)!r} cannot store {spec.grid}: {reason}")
    return recipe


def check_operands(spec: InputSpec, searched: bool = False) -> InputSpec:
    """The same. Raises SpecError for numbers that the operands of attention's products cannot have.

    `searched`: they were chosen for an operand, which may have no negative values and then a float format without sign.
    """
    numbers = spec.tensor.numbers()
    fits = numbers.signed or (searched and isinstance(numbers, FloatGrid))
    if spec.tensor.zero or spec.split is not None or not fits:
        raise SpecError("operands of attention have a signed grid, without zero points or columns in floating point")
    return spec


def _check_scale(spec: TensorSpec) -> None:
    """Refuse quantized scales on a grid that is unknown or would have to be fitted to them."""
    if isinstance(spec.scale, TensorSpec):
        if isinstance(spec.scale.numbers(), FittedGrid):
            raise SpecError(f"scales cannot be quantized on {spec.scale.grid!r}, which is fitted to data: use 'uint8'")
        _check_scale(spec.scale)


def _check_step(table: Table, step: Step) -> None:
    """Refuse options that the function does not take, and values that are no numbers where it takes numbers."""
    found = table.get(step.name)
    parameters = inspect.signature(found.block if isinstance(found, Transform) else found).parameters
    names = list(parameters)[_REFERENCE_POSITIONAL[table.axis] :]
    for option, value in step.options.items():
        if option not in names:
            known = ", ".join(names) or "none"
            raise SpecError(f"{table.axis} {step.name!r} has no option {option!r}: its options are {known}")
        default = parameters[option].default
        if type(default) in (int, float) and not isinstance(value, int | float):
            raise SpecError(f"{table.axis} {step.name!r}: option {option!r} is a number like {default}, got {value!r}")


def needs(recipe: Recipe) -> frozenset[str]:
    """The calibration statistics that a recipe's stages read; none for a recipe that works on weights alone."""
    steps = ((RANGES, recipe.range), (ROUNDERS, recipe.rounder), (COLUMNS, recipe.columns))
    found = frozenset().union(*(needs_of(table.get(step.name), step.options) for table, step in steps))
    static = any(given is not None and not given.dynamic for given in (recipe.scheme.input, recipe.attention))
    return found | {HISTOGRAM} if static else found


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe has to see what the model's inputs look like."""
    return bool(needs(recipe) or any(TRANSFORMS.get(step.name).needs for step in recipe.transforms))


def works_on_blocks(recipe: Recipe) -> bool:
    """Whether a recipe has to see the model run, block by block, instead of one weight at a time."""
    return bool(recipe.transforms or recipe.attention or needs(recipe))


def for_table(recipe: Recipe) -> Recipe:
    """The recipe for an embedding table, which is looked up and has no input to quantize."""
    return replace(recipe, scheme=replace(recipe.scheme, input=None))


def layout_of(recipe: Recipe) -> str:
    """Name of the layout that a recipe's weights are stored in."""
    return recipe.layout or default_layout(recipe.scheme.weight)


def choose_columns(w: Tensor, recipe: Recipe, stats: Stats) -> Tensor:
    """Input columns [k] int64, sorted, that a recipe keeps in 16 bit of a weight [N, K]."""
    return COLUMNS.get(recipe.columns.name)(w, recipe.scheme.weight, stats, **recipe.columns.options)


def quantize_linear(
    w: Tensor, recipe: Recipe, stats: Stats | None = None, columns: Tensor | None = None, rotated: bool = False
) -> QTensor:
    """Quantize a weight [N, K] of a floating dtype by a recipe; a pure function.

    `columns` [k] int64: the 16-bit columns, None to choose them by the recipe. `rotated`: quantize it in the Hadamard
    basis of its input, in which `stats` and `columns` are meant too.
    Raises WeightError when the weight holds NaN or infinite values, naming the layer in `stats`.
    """
    stats = stats or Stats()
    check_finite(w, stats.name)
    spec, kept_in = recipe.scheme.weight, w.dtype
    w = hadamard(w) if rotated else w
    columns = choose_columns(w, recipe, stats) if columns is None else columns
    body, outliers = take_outliers(w, columns, kept_in)
    find: Callable = partial(RANGES.get(recipe.range.name), **recipe.range.options)
    rounder = ROUNDERS.get(recipe.rounder.name)
    q = rounder(body, spec, find, stats, **recipe.rounder.options)
    return replace(q, outliers=outliers, rotated=rotated)


def check_finite(w: Tensor, name: str) -> None:
    """Raise WeightError if `w` [N, K] holds NaN or infinite values."""
    if w.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(w)):  # NaN is passed on; a single pass
        bad = sum(int((~torch.isfinite(w[rows])).sum()) for rows in row_chunks((w.shape[0], w.shape[1])))
        raise WeightError(
            f"{name} holds {bad} NaN or infinite values out of {w.numel()}: the checkpoint is damaged or was trained "
            "into overflow; it cannot be quantized"
        )


def pack(q: QTensor, recipe: Recipe, inputs: InputParams | None = None) -> tuple[dict[str, Tensor], PackedSpec]:
    """Stored tensors of a quantized weight, and their description for kernels; `inputs`: range of a static input.

    The weight may be on another grid than the recipe names, of as many bits: a range may have chosen it.
    """
    layout, scheme = layout_of(recipe), replace(recipe.scheme, weight=q.spec)
    packed = LAYOUTS.get(layout).pack(q) | pack_inputs(inputs, scheme)
    return packed, packed_spec(packed, layout, q.shape, scheme, q.rotated)


def pack_empty(
    shape: tuple[int, int], recipe: Recipe, dtype: torch.dtype, outliers: int = 0, rotated: bool = False
) -> tuple[dict[str, Tensor], PackedSpec]:
    """What `pack` will give for a weight of `shape` [N, K]: tensors on the meta device, and their description."""
    empty = replace(empty_qtensor(shape, recipe.scheme.weight, dtype, outliers), rotated=rotated)
    return pack(empty, recipe, empty_inputs(recipe.scheme))


def bits_per_weight(packed: dict[str, Tensor], shape: tuple[int, int]) -> float:
    """Bits per weight of the stored tensors, all overhead included."""
    stored = sum(value.numel() * value.element_size() for value in packed.values())
    return 8 * stored / (shape[0] * shape[1])
