"""Formats by type of layer: nothing is lost, nothing counts twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfquant.format_counts import count_formats, grids_of, layer_type

LAYERS = st.lists(
    st.tuples(
        st.sampled_from(["model.layers.0.q_proj", "model.layers.10.q_proj", "layers.2.experts.3.w1", "lm_head"]),
        st.sampled_from(["e1m2", "e2m1", "e3m0", None]),
    )
)


@given(LAYERS)
def test_counts_are_those_of_the_pairs(layers: list[tuple[str, str | None]]) -> None:
    found = count_formats(layers)
    pairs = Counter((layer_type(name), grid) for name, grid in layers if grid is not None)
    assert {(kind, grid): count for kind, row in found.items() for grid, count in row.items()} == pairs
    assert list(found) == sorted(found) and all(list(row) == sorted(row) for row in found.values())
    assert grids_of(found) == sorted({grid for _, grid in layers} - {None})


@given(LAYERS)
def test_the_order_of_layers_does_not_matter(layers: list[tuple[str, str | None]]) -> None:
    """The view of a model with a reference lists the worst first."""
    assert str(count_formats(layers)) == str(count_formats(layers[::-1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj", "q_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj", "gate_up_proj"),
        ("model.layers.0.block_sparse_moe.experts.7.w2", "w2"),
        ("features.proj.0", "proj"),
        ("lm_head", "lm_head"),
        ("0", "0"),
    ],
)
def test_a_type_is_the_last_part_of_a_name_that_is_no_number(name: str, expected: str) -> None:
    assert layer_type(name) == expected
