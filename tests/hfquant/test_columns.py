"""Which columns stay in 16 bit, and what happens to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfquant.blocks import Blocks
from hfquant.columns import none, proxy, take_outliers
from hfquant.errors import SpecError
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.spec import Scheme, TensorSpec
from hfquant.stats import Stats

SPEC = TensorSpec("int4", Blocks(1, 16))


@given(st.integers(1, 200), st.floats(0.001, 0.999))
def test_proxy_takes_the_columns_whose_producers_spread_most(width: int, fraction: float) -> None:
    spread = torch.rand(width, generator=torch.Generator().manual_seed(width))
    chosen = proxy(torch.zeros(2, width), SPEC, Stats("w", spread), fraction)
    rest = [column for column in range(width) if column not in chosen.tolist()]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert fraction * width <= chosen.numel() < fraction * width + 1
    assert not rest or spread[chosen].min() >= spread[rest].max()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_proxy_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(SpecError, match="between 0 and 1"):
        proxy(torch.zeros(2, 4), SPEC, Stats("w", torch.ones(4)), fraction)


def test_proxy_says_which_layer_has_no_producer() -> None:
    with pytest.raises(SpecError, match=r"layers\.0\.q: the layer that produces its input was not found"):
        proxy(torch.zeros(2, 4), SPEC, Stats("layers.0.q"), 0.1)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_taken_columns_are_kept_and_zeroed(dtype: torch.dtype, kept: torch.dtype) -> None:
    w = torch.randn(3, 8).to(dtype)
    index = torch.tensor([1, 6])
    body, outliers = take_outliers(w, index)
    assert outliers is not None and outliers.weight.dtype == kept and outliers.index.dtype == torch.int32
    assert torch.equal(outliers.weight, w[:, index].to(kept)) and (body[:, index] == 0).all()
    others = [0, 2, 3, 4, 5, 7]
    assert torch.equal(body[:, others], w[:, others]) and body.dtype == dtype


def test_nothing_taken_is_the_weight_itself() -> None:
    w = torch.randn(3, 8)
    body, outliers = take_outliers(w, none(w, SPEC, Stats()))
    assert body is w and outliers is None


def test_an_outlier_column_no_longer_widens_its_block() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[:, 5] *= 100
    spread = torch.ones(64)
    spread[5] = 2.0
    plain = quantize_linear(w, Recipe(Scheme(SPEC)))
    split = quantize_linear(w, Recipe(Scheme(SPEC), columns=Step("proxy", {"fraction": 1 / 64})), Stats("w", spread))
    others = torch.arange(64) != 5
    assert torch.equal(split.dequantize()[:, 5], w[:, 5].float())
    error = [(q.dequantize() - w.float())[:, others].square().sum() for q in (split, plain)]
    assert error[0] < 0.2 * error[1]
