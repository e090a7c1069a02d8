"""Properties that every method has, whatever its grid, blocks and scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hfquant  # noqa: F401  registers the tables of the core
from hfquant.blocks import Blocks
from hfquant.errors import SpecError, WeightError
from hfquant.qtensor import QTensor
from hfquant.quantize import bits_per_weight, check_recipe, pack, pack_empty, quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.stats import Stats

DOUBLE = TensorSpec("uint8", Blocks(1, 256))
SYMMETRIC = ["int2", "int3", "int4", "int4n", "int8", "nf4", "fp4", "dyn8", "e2m1", "e3m2", "e4m3fn", "quantile4"]
DTYPES = ["float32", "float16", "bfloat16"]
grids = st.one_of(
    st.tuples(st.sampled_from(SYMMETRIC), st.just(False)),
    st.tuples(st.sampled_from(["uint2", "uint4", "uint8"]), st.just(True)),
)
seeds = st.integers(0, 10**6)


def spec_of(numbers: tuple[str, bool], blocks: Blocks, scale: str | TensorSpec = "float32") -> TensorSpec:
    return TensorSpec(numbers[0], blocks, numbers[1], scale)


def quantized(w: Tensor, spec: TensorSpec, step: str | Step = "absmax") -> QTensor:
    return quantize_linear(w, Recipe(Scheme(spec), Step(step) if isinstance(step, str) else step))


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# How far a weight moves


@given(st.sampled_from(["int2", "int3n", "int4", "int8", "uint4", "uint8"]), seeds, st.sampled_from(DTYPES))
def test_integers_move_by_half_a_step_at_most(name: str, seed: int, scale: str) -> None:
    w, asymmetric = random((6, 32), seed) + seed % 3, name.startswith("u")
    spec = TensorSpec(name, Blocks(1, 16), asymmetric, scale)
    q = quantized(w, spec)
    step = spec.blocks.expand(q.scale_values(), (6, 32))
    error = (q.dequantize() - w).abs()
    # A scale rounded to 16 bit can leave the ends of an asymmetric range outside, by its own rounding error.
    span = w.amax().clamp_min(0) - w.amin().clamp_max(0)
    outside = {"float32": 2**-23, "float16": 2**-11, "bfloat16": 2**-8}[scale] * span if asymmetric else 0
    assert (error <= step * (0.5 + 2**-16) + outside).all()


@given(grids, seeds, st.sampled_from(DTYPES))
def test_zero_stays_exactly_zero(numbers: tuple[str, bool], seed: int, scale: str) -> None:
    w = random((4, 24), seed) + seed % 5 - 2
    w[:, ::3] = 0.0
    assert (quantized(w, spec_of(numbers, Blocks(1, 8), scale)).dequantize()[:, ::3] == 0).all()


@pytest.mark.parametrize("name", ["int4", "int4n", "int8", "nf4", "e2m1", "e4m3fn"])
@given(seed=seeds)
def test_quantizing_twice_changes_nothing(name: str, seed: int) -> None:
    spec = TensorSpec(name, Blocks(1, 16))
    once = quantized(random((4, 32), seed), spec)
    twice = quantized(once.dequantize(), spec)
    # The range is found again up to the rounding of scale * level, so values agree to float32's last digit.
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=2**-22, atol=0)
    if float(spec.numbers().levels()[0]) == -spec.numbers().top:
        assert torch.equal(twice.codes, once.codes)


# Symmetries


@given(grids, seeds, st.integers(-12, 12), st.sampled_from([*DTYPES, DOUBLE]), st.sampled_from(["absmax", "mse"]))
@settings(max_examples=80)
def test_a_power_of_two_in_gives_a_power_of_two_out(
    numbers: tuple[str, bool], seed: int, power: int, scale: str | TensorSpec, step: str
) -> None:
    if scale == "float16":
        power = power // 4  # stays within its normal numbers
    step = "absmax" if numbers[0].startswith("quantile") else step
    w, spec = random((3, 40), seed), spec_of(numbers, Blocks(1, 16), scale)
    one, other = quantized(w, spec, step), quantized(w * 2.0**power, spec, step)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.dequantize() * 2.0**power, other.dequantize())


@pytest.mark.parametrize("name", ["percentile", "kl"])
def test_searched_ranges_scale_with_the_weight(name: str) -> None:
    w, spec = random((2, 2048), 0), TensorSpec("int8", Blocks(1, -1))
    assert torch.equal(quantized(w, spec, name).dequantize() / 64, quantized(w / 64, spec, name).dequantize())


@given(grids, seeds)
def test_columns_of_a_block_may_be_permuted(numbers: tuple[str, bool], seed: int) -> None:
    w, spec = random((5, 37), seed), spec_of(numbers, Blocks(1, 16))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(part.numel(), generator=generator) + part[0] for part in torch.arange(37).split(16)]
    )
    assert torch.equal(quantized(w[:, order], spec).dequantize(), quantized(w, spec).dequantize()[:, order])


@given(grids, seeds, st.sampled_from(["float32", "bfloat16"]))
def test_rows_may_be_permuted(numbers: tuple[str, bool], seed: int, scale: str) -> None:
    w, spec = random((7, 37), seed), spec_of(numbers, Blocks(1, 16), scale)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(quantized(w[order], spec).dequantize(), quantized(w, spec).dequantize()[order])


@given(st.sampled_from(["int4n", "int8n", "e2m1", "e4m3fn", "fp4"]), seeds)
def test_symmetric_grids_treat_both_signs_alike(name: str, seed: int) -> None:
    w, spec = random((5, 32), seed), TensorSpec(name, Blocks(1, 16), scale="bfloat16")
    assert torch.equal(quantized(-w, spec).dequantize(), -quantized(w, spec).dequantize())


# Blocks


@given(grids, seeds, st.sampled_from(DTYPES), st.integers(0, 5))
def test_a_group_as_wide_as_the_row_is_per_channel(numbers: tuple[str, bool], seed: int, scale: str, more: int) -> None:
    w = random((4, 24), seed)
    one = quantized(w, spec_of(numbers, Blocks(1, 24 + more), scale))
    assert torch.equal(one.dequantize(), quantized(w, spec_of(numbers, Blocks(1, -1), scale)).dequantize())


@given(st.sampled_from(["int4", "nf4", "e2m1"]), seeds)
def test_groups_never_cross_rows(name: str, seed: int) -> None:
    spec = TensorSpec(name, Blocks(1, 16))
    w = random((6, 40), seed)
    louder = w.clone()
    louder[3] *= 1000
    others = [0, 1, 2, 4, 5]
    assert torch.equal(quantized(louder, spec).dequantize()[others], quantized(w, spec).dequantize()[others])


@given(grids, seeds, st.integers(1, 15), st.sampled_from(["absmax", "percentile", "mse"]))
def test_a_ragged_tail_is_quantized_as_if_alone(numbers: tuple[str, bool], seed: int, tail: int, step: str) -> None:
    if numbers[0].startswith("quantile"):
        numbers = ("int4", False)  # a fitted grid is shared by the whole tensor
    w, spec = random((5, 32 + tail), seed), spec_of(numbers, Blocks(1, 16))
    whole = quantized(w, spec, step).dequantize()
    assert torch.equal(whole[:, 32:], quantized(w[:, 32:].contiguous(), spec, step).dequantize())
    assert torch.equal(whole[:, :32], quantized(w[:, :32].contiguous(), spec, step).dequantize())


# Awkward weights


@given(grids, st.sampled_from([*DTYPES, DOUBLE]), st.sampled_from(["absmax", "percentile", "mse"]))
def test_zero_groups_become_exactly_zero(numbers: tuple[str, bool], scale: str | TensorSpec, step: str) -> None:
    step = "absmax" if numbers[0].startswith("quantile") else step
    w = random((4, 32), 0)
    w[1, :16] = 0
    w[2] = 0
    for weight in (w, torch.zeros(4, 32)):
        q = quantized(weight, spec_of(numbers, Blocks(1, 16), scale), step)
        values = q.dequantize()
        assert q.scale_values().isfinite().all() and (q.scale_values() > 0).all()
        assert (values[weight == 0] == 0).all() and values.isfinite().all()


def test_whole_zero_channels_survive_the_kl_range() -> None:
    assert (quantized(torch.zeros(2, 2048), TensorSpec("int8", Blocks(1, -1)), "kl").dequantize() == 0).all()


@given(st.sampled_from(["int2", "int4", "int4n", "int8", "uint4", "uint8"]), seeds, st.sampled_from(DTYPES))
def test_groups_of_one_sign_keep_their_range(name: str, seed: int, scale: str) -> None:
    # GPTQ's symmetric branch halves the scale of such groups, which clips everything above half the maximum.
    w = random((4, 16), seed).abs() + 0.01
    spec = TensorSpec(name, Blocks(1, 16), name.startswith("u"), scale)
    positive, negative = (quantized(x, spec) for x in (w, -w))
    top = w.amax(1, keepdim=True)
    step = positive.scale_values()
    assert (positive.dequantize().amax(1, keepdim=True) >= top - 0.51 * step - 2**-7 * top).all()
    errors = [(q.dequantize() - x).square().sum(1) for q, x in ((positive, w), (negative, -w))]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + (0.05 if spec.zero else 0) * errors[1]).all()


@given(grids, st.sampled_from([*DTYPES, DOUBLE]), st.floats(-40, -8), seeds)
def test_tiny_weights_are_never_nan_or_infinite(
    numbers: tuple[str, bool], scale: str | TensorSpec, exponent: float, seed: int
) -> None:
    w = random((4, 32), seed) * 10.0**exponent
    q = quantized(w, spec_of(numbers, Blocks(1, 16), scale))
    assert q.dequantize().isfinite().all() and (q.scale_values() > 0).all()
    assert q.dequantize().abs().max() <= 1.01 * w.abs().max() + q.scale_values().max()


@pytest.mark.parametrize("scale", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-8, 1e-6, 1e-4])
def test_tiny_weights_keep_their_accuracy_where_the_scale_can(size: float, scale: str) -> None:
    ordinary, spec = random((64, 512), 0), TensorSpec("int8", Blocks(1, 16), scale=scale)
    w = ordinary * size
    tiny = quantized(w, spec).dequantize() - w
    expected = (quantized(ordinary, spec).dequantize() - ordinary).norm() / ordinary.norm()
    relative = float(tiny.double().norm() / w.double().norm() / expected)
    if scale != "float16" or size >= 1e-4:
        assert relative < 1.1
    elif size == 1e-6:  # int8 steps of 2e-8 do not exist in float16: its smallest number, 6e-8, is the step
        assert float(tiny.abs().max()) <= 2.0**-25 * 1.001
    elif size < 1e-8:
        assert (w + tiny == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    w = random((8, 16), 0).to(dtype)
    w[3, 5] = w[0, 0] = bad
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp holds 2 NaN or infinite values out of 128"):
        quantize_linear(w, Recipe(Scheme(TensorSpec("int4", Blocks(1, 16)))), Stats("model.layers.3.mlp"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_quantized_as_its_float32_values(dtype: torch.dtype) -> None:
    w, spec = random((4, 32), 0).to(dtype), TensorSpec("int4", Blocks(1, 16))
    assert torch.equal(quantized(w, spec).dequantize(), quantized(w.float(), spec).dequantize())


@given(grids, seeds)
def test_quantizing_leaves_the_weight_alone(numbers: tuple[str, bool], seed: int) -> None:
    w = random((4, 32), seed)
    before = w.clone()
    quantized(w, spec_of(numbers, Blocks(1, -1)))
    assert torch.equal(w, before)


# Storage


def test_double_quantization_costs_0_127_bits() -> None:
    # QLoRA, section 3: 8/64 + 32/(64 * 256) bits instead of 32/64.
    recipe = Recipe(Scheme(TensorSpec("nf4", Blocks(1, 64), scale=DOUBLE)))
    empty, _ = pack_empty((4096, 4096), recipe, torch.bfloat16)
    assert bits_per_weight(empty, (4096, 4096)) - 4 == 8 / 64 + 32 / (64 * 256) == 0.126953125
    w = random((512, 1024), 0)
    q = quantize_linear(w, recipe)
    packed, _ = pack(q, recipe)
    assert bits_per_weight(packed, (512, 1024)) - 4 == 0.126953125
    assert (q.scale_values() > 0).all()
    single = quantized(w, replace(q.spec, scale="float32")).dequantize()
    assert float((q.dequantize() - w).norm()) < 1.01 * float((single - w).norm())


def test_columns_may_be_chosen_beforehand() -> None:
    w, index = random((4, 32), 0), torch.tensor([3, 17])
    q = quantize_linear(w, Recipe(Scheme(TensorSpec("int4", Blocks(1, 16)))), columns=index)
    assert q.outliers is not None and q.outliers.index.tolist() == [3, 17]
    assert torch.equal(q.dequantize()[:, index], w[:, index].bfloat16().float())


# Recipes that cannot work


INT4 = Scheme(TensorSpec("int4", Blocks(1, 64)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(Scheme(TensorSpec("uint4", Blocks(1, 64)))), "signed grid or a zero point: 'uint4' has neither"),
        (Recipe(INT4, Step("absmax", {"norm": 2})), "range 'absmax' has no option 'norm': its options are none"),
        (Recipe(INT4, Step("mse", {"normm": 2})), "has no option 'normm': its options are norm, steps, shrink"),
        (Recipe(INT4, Step("mse", {"spec": 2})), "has no option 'spec'"),
        (Recipe(INT4, Step("nonsense")), "unknown range 'nonsense'"),
        (Recipe(INT4, rounder=Step("nearest", {"block": 1})), "rounder 'nearest' has no option 'block'"),
        (Recipe(INT4, rounder=Step("nonsense")), "unknown rounder 'nonsense'"),
        (Recipe(INT4, columns=Step("proxy", {"share": 1})), "columns 'proxy' has no option 'share'.*are fraction"),
        (Recipe(INT4, layout="nonsense"), "unknown layout 'nonsense'"),
        (Recipe(Scheme(TensorSpec("int8", Blocks(1, 64))), layout="dense"), "layout 'dense' cannot store int8"),
        (Recipe(Scheme(TensorSpec("int12", Blocks(1, 64)))), "unknown grid 'int12'"),
        (Recipe(Scheme(INT4.weight, InputSpec(TensorSpec("int12", Blocks(1, -1))))), "unknown grid 'int12'"),
        (
            Recipe(Scheme(replace(INT4.weight, scale=TensorSpec("int12", Blocks(1, 64))))),
            "unknown grid 'int12'",
        ),
        (
            Recipe(Scheme(replace(INT4.weight, scale=TensorSpec("quantile8", Blocks(1, 64))))),
            "scales cannot be quantized on 'quantile8', which is fitted to data: use 'uint8'",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused_early(recipe: Recipe, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_recipe(recipe)


def test_a_good_recipe_is_given_back() -> None:
    recipe = Recipe(INT4, Step("mse", {"norm": 2.4}), columns=Step("proxy", {"fraction": 0.1}))
    assert check_recipe(recipe) is recipe


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("range_", ["absmax", "mse"])
def test_a_block_of_zeros_does_not_disturb_its_neighbours_when_scales_are_quantized(range_: str, zero: bool) -> None:
    """A padding row or a pruned block: with 1 for its scale, the small scales beside it would be rounded to steps."""
    spec = TensorSpec("uint8" if zero else "int8", Blocks(1, 64), zero, TensorSpec("uint8", Blocks(1, 256)))
    recipe = Recipe(Scheme(spec), Step(range_))
    w = 0.02 * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    dense = quantize_linear(w, recipe).dequantize()
    w[3] = 0
    padded = quantize_linear(w, recipe).dequantize()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert not padded[3].any()
    assert (padded - w)[others].norm() <= 1.2 * (dense - w)[others].norm()
