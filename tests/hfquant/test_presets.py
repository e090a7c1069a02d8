"""The core's methods: every name gives a recipe that works, and options mean what they say."""

from __future__ import annotations

import pytest
import torch

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.presets import BUILTIN, DOUBLE_QUANTIZATION, kbit, step
from hfquant.quantize import bits_per_weight, check_recipe, pack, quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.stats import Stats

W = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", sorted(BUILTIN))
def test_every_method_quantizes_and_survives_json(method: str) -> None:
    recipe = check_recipe(BUILTIN[method]())
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    q = quantize_linear(W, recipe)
    packed, _ = pack(q, recipe)
    bits = recipe.scheme.weight.numbers().bits
    error = float((q.dequantize() - W).norm() / W.norm())
    # Rounding to powers of two, the coarsest of the wide grids, moves a value by a third at most.
    assert error < {2: 0.75, 3: 0.45}.get(bits, 1 / 3)
    stored = {name: value for name, value in packed.items() if name not in ("levels", "scale")}
    assert bits_per_weight(stored, (16, 128)) == bits


@pytest.mark.parametrize("family", [[f"int{b}" for b in range(2, 9)], [f"quantile{b}" for b in range(2, 9)]])
def test_more_bits_are_more_accurate(family: list[str]) -> None:
    errors = [float((quantize_linear(W, kbit(grid, block_size=64)).dequantize() - W).norm()) for grid in family]
    assert errors == sorted(errors, reverse=True)


def test_smaller_blocks_are_more_accurate() -> None:
    for grid in ("int4", "nf4", "e2m1"):
        errors = [
            float((quantize_linear(W, kbit(grid, block_size=b)).dequantize() - W).norm()) for b in (16, 32, 64, -1)
        ]
        assert errors == sorted(errors)


def test_defaults() -> None:
    four, eight = kbit("int4").scheme.weight, kbit("int8").scheme.weight
    assert (four.blocks, four.scale, four.zero) == (Blocks(1, 64), "bfloat16", False)
    assert (eight.blocks, eight.scale, eight.zero) == (Blocks(1, -1), "float32", False)


def test_block_size_and_group_size_are_one_thing() -> None:
    assert kbit("int4", group_size=32) == kbit("int4", block_size=32) == kbit("int4", block_size=32, group_size=32)
    assert kbit("int4", group_size=-1).scheme.weight.blocks == Blocks(1, -1)


def test_options_reach_the_recipe() -> None:
    recipe = kbit("int4", symmetric=False, range={"name": "mse", "norm": 2.4}, outliers=0.05, layout="bytes")
    assert recipe.scheme.weight.grid == "uint4" and recipe.scheme.weight.zero
    assert recipe.range == Step("mse", {"norm": 2.4}) and recipe.columns == Step("proxy", {"fraction": 0.05})
    assert recipe.layout == "bytes" and kbit("nf4", scale_dtype="float16").scheme.weight.scale == "float16"
    assert kbit("nf4", double_quant=True).scheme.weight.scale == DOUBLE_QUANTIZATION
    q = quantize_linear(W, recipe, Stats("w", torch.arange(128.0)))
    assert q.zero is not None and q.outliers is not None and q.outliers.index.tolist() == list(range(121, 128))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kbit("int4", block_size=32, group_size=64), "mean the same and differ: give one"),
        (lambda: kbit("int4", block_size=1), "at least 2, or -1"),
        (lambda: kbit("int4", block_size=0), "at least 2, or -1"),
        (lambda: kbit("int4", block_size=6.4), "at least 2, or -1"),
        (lambda: kbit("nf4", symmetric=False), "symmetric=False needs an integer method such as int4"),
        (lambda: kbit("nf4", double_quant=True, scale_dtype="float16"), "leave scale_dtype out"),
        (lambda: kbit("nf4", scale_dtype="float8"), "float32, float16, bfloat16"),
        (lambda: step({"norm": 2}), "a step is a name or"),
        (lambda: step(3), "a step is a name or"),
    ],
)
def test_options_that_contradict_are_refused(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
