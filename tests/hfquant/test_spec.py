"""Specs and recipes survive JSON exactly, and nonsense is refused with advice."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec, is_affine

sides = st.one_of(st.just(-1), st.integers(1, 4096))
blocks = st.builds(Blocks, sides, sides)
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
grids = st.sampled_from(["int4", "int8n", "uint4", "e2m1", "e4m3fn", "nf4", "quantile3", "a third party's"])
scales = st.recursive(dtypes, lambda inner: st.builds(TensorSpec, grids, blocks, st.just(False), inner), max_leaves=3)
symmetric = st.builds(TensorSpec, grids, blocks, st.just(False), scales)
tensors = st.one_of(
    symmetric,
    st.builds(TensorSpec, st.sampled_from(["uint2", "uint8"]), blocks, st.one_of(st.just(True), dtypes), scales),
)
inputs = st.builds(
    InputSpec,
    st.builds(TensorSpec, grids, blocks, st.just(False), dtypes),
    st.just(True),
    st.one_of(st.none(), st.floats(0, 1e6)),
)
schemes = st.builds(Scheme, tensors, st.one_of(st.none(), inputs))
json_values = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none())
steps = st.builds(Step, st.text(min_size=1), st.dictionaries(st.text().filter(lambda k: k != "name"), json_values))
recipes = st.builds(Recipe, schemes, steps, steps, steps, st.one_of(st.none(), st.text(min_size=1)))
packed = st.builds(
    PackedSpec,
    st.text(min_size=1),
    st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 20)),
    schemes,
    st.lists(st.text(), max_size=5).map(tuple),
    st.integers(0, 100),
)


@given(schemes)
def test_schemes_survive_json(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@given(recipes)
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(packed)
def test_packed_specs_survive_their_key(spec: PackedSpec) -> None:
    assert PackedSpec.parse(spec.key()) == spec
    assert PackedSpec.parse(spec.key()).key() == spec.key()


@given(packed, packed)
def test_keys_tell_specs_apart(one: PackedSpec, other: PackedSpec) -> None:
    assert (one.key() == other.key()) == (one == other)


def test_scale_dtype_is_what_a_search_looks_at() -> None:
    row = Blocks(1, -1)
    assert TensorSpec("int4", row, scale="bfloat16").scale_dtype == torch.bfloat16
    assert TensorSpec("int4", row, scale=TensorSpec("uint8", row, scale="float16")).scale_dtype == torch.float32


def test_zero_points_have_a_dtype() -> None:
    row = Blocks(1, -1)
    found = [TensorSpec("uint4", row, zero).zero_dtype for zero in (False, True, "float32", "float16", "bfloat16")]
    assert found == [None, torch.uint8, torch.float32, torch.float16, torch.bfloat16]


def test_zero_points_on_the_grid_are_recorded_as_ever() -> None:
    """Checkpoints of earlier versions hold these very words."""
    stored = '{"grid": "uint4", "blocks": [1, 64], "zero": true, "scale": "bfloat16"}'
    assert json.dumps(TensorSpec("uint4", Blocks(1, 64), True, "bfloat16").to_dict()) == stored
    assert TensorSpec.from_dict(json.loads(stored)).zero is True


def test_only_integer_grids_are_affine() -> None:
    row = Blocks(1, -1)
    assert is_affine(TensorSpec("uint4", row, True)) and is_affine(TensorSpec("int8n", row))
    assert not is_affine(TensorSpec("nf4", row)) and not is_affine(TensorSpec("e1m2", row))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec("int4", Blocks(1, 64), scale="float64"), "float32, float16, bfloat16 or quantized"),
        (lambda: TensorSpec("int4", Blocks(1, 64), zero=True), "unsigned integer grid such as uint4, got 'int4'"),
        (lambda: TensorSpec("nf4", Blocks(1, 64), zero=True), "unsigned integer grid such as uint4, got 'nf4'"),
        (lambda: TensorSpec("int4", Blocks(1, 64), zero="float32"), "unsigned integer grid such as uint4, got 'int4'"),
        (lambda: TensorSpec("uint4", Blocks(1, 64), zero="float64"), "float32, float16, bfloat16, got 'float64'"),
        (lambda: TensorSpec("uint4", Blocks(1, 64), zero=1), "zero is True, False, or"),
        (lambda: InputSpec(TensorSpec("uint8", Blocks(1, -1), zero="float32")), "use zero=True instead of 'float32'"),
        (
            lambda: TensorSpec("int4", Blocks(1, 64), scale=TensorSpec("uint8", Blocks(1, 256), zero=True)),
            "without a zero point: give their spec zero=False",
        ),
        (
            lambda: InputSpec(TensorSpec("int8", Blocks(1, -1)), dynamic=False),
            r"blocks \(-1, -1\) instead",
        ),
        (
            lambda: InputSpec(TensorSpec("int8", Blocks(-1, -1)), dynamic=False, split=6.0),
            "at run time",
        ),
        (
            lambda: InputSpec(TensorSpec("int8", Blocks(1, -1), scale=TensorSpec("uint8", Blocks(1, 256)))),
            "scales of an input cannot be quantized",
        ),
        (lambda: TensorSpec("int99", Blocks(1, 64)).numbers(), "unknown grid 'int99'"),
    ],
)
def test_impossible_specs_are_refused(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
