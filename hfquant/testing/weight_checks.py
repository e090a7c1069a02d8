"""Checks of a recipe on single weights: what must hold for every method, whatever its numbers are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import WeightError
from ..input_ranges import input_params
from ..layouts import LAYOUTS, unpack
from ..nn import QLinear
from ..qtensor import QTensor
from ..quantize import check_recipe, needs, pack, pack_empty, quantize_linear
from ..recipe import Recipe
from ..spec import PackedSpec
from ..stats import InputStats, Stats
from .report import Report, require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((48, 176), (7, 33), (1, 1))  # 176 ends in a short group of 32 and 64; 33 in a byte that is not full
LAYER = "layers.7.mlp"


def sample(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Normal weights [N, K] float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> Iterator[tuple[str, Tensor]]:
    """Weights of every kind that a model may hold, with what they are."""
    for dtype in DTYPES:
        named = str(dtype).removeprefix("torch.")
        for shape in SHAPES:
            yield f"random {list(shape)} {named}", sample(shape).to(dtype)
        base = sample(SHAPES[0])
        small = 6e-8 if dtype == torch.float16 else 1e-38
        large = 1e4 if dtype == torch.float16 else 1e30
        yield f"all-zero {named}", torch.zeros(SHAPES[0], dtype=dtype)
        yield f"all-positive {named}", (base.abs() + 1).to(dtype)
        yield f"all-negative {named}", (-base.abs() - 1).to(dtype)
        yield f"tiny {named}", (base * small).to(dtype)
        yield f"huge {named}", (base * large).to(dtype)
        yield (
            f"one huge value {named}",
            base.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(3e4)).to(dtype),
        )


def stats_for(w: Tensor, recipe: Recipe) -> Stats:
    """What a recipe may want to know about a layer; with calibration, of fewer tokens than the layer has inputs."""
    what = needs(recipe)
    inputs = InputStats(w.shape[1], what, LAYER) if what else None
    if inputs is not None:
        x = sample((32, w.shape[1]), seed=3)
        inputs.add(x + x.roll(1, 1), 1.1 * (x + x.roll(1, 1)))
    return Stats(LAYER, torch.linspace(0.5, 1.5, w.shape[1]), inputs)


def quantized(w: Tensor, recipe: Recipe) -> QTensor:
    """A copy of `w` [N, K], quantized."""
    return quantize_linear(w.clone(), recipe, stats_for(w, recipe))


def pack_sample(q: QTensor, recipe: Recipe) -> tuple[dict[str, Tensor], PackedSpec]:
    """Pack a weight; a static input gets a range that clips the tails of normal values."""
    given = recipe.scheme.input
    if given is None or given.dynamic:
        return pack(q, recipe)
    return pack(q, recipe, input_params(-3.0, 3.0, given.tensor))


def check_weights(report: Report, subject: str, recipe: Recipe) -> bool:
    """Run all checks of a recipe; whether every one passed."""
    before = len(report.failed)
    for name, check in CHECKS.items():
        report.run(subject, name, partial(check, recipe))
    return len(report.failed) == before


def recipe_round_trip(recipe: Recipe) -> None:
    """A recipe is written to config.json and read again, unchanged."""
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    require(again == recipe, f"the recipe comes back from JSON as {again}")
    check_recipe(again)


def values_are_finite(recipe: Recipe) -> None:
    """No weight becomes NaN or infinite; zeros stay zero."""
    for what, w in weights():
        values = quantized(w, recipe).dequantize()
        require(values.shape == w.shape, f"a weight {list(w.shape)} came back as {list(values.shape)}")
        bad = int((~torch.isfinite(values)).sum())
        require(not bad, f"{bad} of {w.numel()} values are NaN or infinite for a weight that is {what}")
        require(w.any() or not values.any(), f"a weight that is {what} does not stay zero")


def values_are_near(recipe: Recipe) -> None:
    """The error is smaller than that of a weight replaced by zeros."""
    for shape in SHAPES[:2]:
        w = sample(shape)
        error = float((quantized(w, recipe).dequantize() - w).norm() / w.norm())
        require(error < 1, f"relative error {error:.3g} on normal weights {list(shape)}: zeros would be as good")


def input_is_left_alone(recipe: Recipe) -> None:
    """Quantizing must not write into the weight."""
    w = sample(SHAPES[0])
    before = w.clone()
    quantize_linear(w, recipe, stats_for(w, recipe))
    require(torch.equal(w, before), "quantizing changed the weight that it was given")


def same_result_twice(recipe: Recipe) -> None:
    """The result depends on the weight alone: not on random numbers, not on what was quantized before."""
    for what, w in weights():
        torch.manual_seed(0)
        first, _ = pack_sample(quantized(w, recipe), recipe)
        torch.manual_seed(1)
        second, _ = pack_sample(quantized(w, recipe), recipe)
        require(_same(first, second), f"two runs differ for a weight that is {what}")


def unpack_inverts_pack(recipe: Recipe) -> None:
    """Codes, scales and zero points are stored and read exactly, and stored again as the same bytes."""
    for what, w in weights():
        q = quantized(w, recipe)
        packed, spec = pack_sample(q, recipe)
        back = unpack(list(packed.values()), spec)
        for part in different(q, back):
            require(False, f"{part} changed in pack and unpack for a weight that is {what}")
        again, _ = pack_sample(back, recipe)
        require(_same(packed, again), f"packing twice gives other bytes for a weight that is {what}")


def shapes_are_known_in_advance(recipe: Recipe) -> None:
    """A reload prepares empty tensors: they must have the shapes and dtypes of the real ones.

    A range may choose another grid of as many bits, which a checkpoint records.
    """
    for what, w in weights():
        real, spec = pack_sample(quantized(w, recipe), recipe)
        chosen, asked = spec.scheme.weight, recipe.scheme.weight
        fits = replace(chosen, grid=asked.grid) == asked and chosen.numbers().bits == asked.numbers().bits
        require(fits, f"the recipe says {asked} and got {chosen} for a weight that is {what}")
        empty, planned = pack_empty((w.shape[0], w.shape[1]), recipe, w.dtype, spec.outliers)
        planned = replace(planned, scheme=replace(planned.scheme, weight=chosen))
        require(planned == spec, f"planned {planned} and got {spec} for a weight that is {what}")
        expected = {name: (tuple(value.shape), value.dtype) for name, value in empty.items()}
        found = {name: (tuple(value.shape), value.dtype) for name, value in real.items()}
        require(expected == found, f"planned {expected} and got {found} for a weight that is {what}")


def rows_are_rows(recipe: Recipe) -> None:
    """Reading some rows (an embedding) gives what reading all gives."""
    for w in (sample(SHAPES[0]), sample(SHAPES[1])):
        packed, spec = pack_sample(quantized(w, recipe), recipe)
        index = torch.tensor([3, 0, 3, 6])
        rows = LAYOUTS.get(spec.layout).rows(packed, index, spec.shape, spec.scheme.weight)
        expected = unpack(list(packed.values()), spec).dequantize()[index]
        require(torch.equal(rows, expected), f"Layout.rows differs from the rows of the whole matrix {list(w.shape)}")


def bytes_are_levels(recipe: Recipe) -> None:
    """A layout that says what its bytes stand for, which kernels believe, means the numbers that it unpacks."""
    w = sample(SHAPES[0])
    packed, spec = pack_sample(quantized(w, recipe), recipe)
    if "levels" in packed or (table := LAYOUTS.get(spec.layout).levels_of_bytes(spec.scheme.weight.numbers())) is None:
        return
    stored = packed["codes"]
    require(stored.shape == w.shape and stored.element_size() == 1, f"codes are {list(stored.shape)} {stored.dtype}")
    expected = spec.scheme.weight.numbers().decode(unpack(list(packed.values()), spec).codes)
    found = table[stored.view(torch.uint8).int()]
    require(torch.equal(found, expected), "Layout.levels_of_bytes gives other numbers than Layout.unpack")


def damage_is_refused(recipe: Recipe) -> None:
    """NaN and infinite weights raise, naming the layer."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = sample(SHAPES[0])
        w[3, 5] = bad
        try:
            quantized(w, recipe)
        except WeightError as error:
            require(LAYER in str(error), f"the error for a weight with {bad} does not name the layer: {error}")
        else:
            require(False, f"a weight with {bad} was quantized without an error")


def input_gradient(recipe: Recipe) -> None:
    """The gradient of the input is grad @ W with the weight as quantized: adapters train on it."""
    for shape in SHAPES[:2]:
        q = quantized(sample(shape), recipe)
        layer = QLinear(shape[1], shape[0], None, torch.float32)
        layer.hold(*pack_sample(q, recipe))
        x = sample((5, shape[1]), seed=1).requires_grad_()
        grad = sample((5, shape[0]), seed=2)
        layer(x).backward(grad)
        expected = grad.double() @ q.dequantize().double()
        bound = shape[0] * torch.finfo(torch.float32).eps * (grad.abs() @ q.dequantize().abs()) + 1e-30
        require(x.grad is not None, "the input of a quantized layer gets no gradient")
        assert x.grad is not None
        excess = float(((x.grad - expected).abs() / bound).max())
        require(excess <= 1, f"the gradient of the input is wrong: {excess:.3g} times the rounding error of float32")


def different(a: QTensor, b: QTensor) -> list[str]:
    """Names of the parts in which two quantized matrices differ."""
    found = []
    for part in (field.name for field in fields(QTensor)):
        one, two = getattr(a, part), getattr(b, part)
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            same = one.dtype == two.dtype and torch.equal(one, two)
        elif isinstance(one, QTensor) and isinstance(two, QTensor):
            same = not different(one, two)
        elif part == "outliers" and one is not None and two is not None:
            same = torch.equal(one.index, two.index) and torch.equal(one.weight, two.weight)
        else:
            same = type(one) is type(two) and not isinstance(one, Tensor | QTensor) and one == two
        if not same:
            found.append(part)
    return found


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two packed weights are equal, byte for byte."""
    return list(a) == list(b) and all(_bytes(a[name]).equal(_bytes(b[name])) for name in a)


def _bytes(x: Tensor) -> Tensor:
    """The memory of a tensor, flat: NaN equals NaN, and float8 can be compared."""
    return x.contiguous().flatten().view(torch.uint8)


CHECKS: dict[str, Callable[[Recipe], None]] = {
    "recipe survives JSON": recipe_round_trip,
    "values are finite": values_are_finite,
    "values are near the weight": values_are_near,
    "weight is left alone": input_is_left_alone,
    "same result twice": same_result_twice,
    "unpack inverts pack": unpack_inverts_pack,
    "shapes are known in advance": shapes_are_known_in_advance,
    "rows are rows of the matrix": rows_are_rows,
    "bytes stand for their levels": bytes_are_levels,
    "damaged weights are refused": damage_is_refused,
    "gradient of the input": input_gradient,
}
