"""The factor of the Hessian in its own memory, and rows of a weight that are rounded apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.ranges import absmax
from hfquant.spec import TensorSpec
from hfquant.stats import HESSIAN, InputStats, Stats
from hfquant_gptq import cholesky, rounder
from hfquant_gptq.cholesky import permute_, reverse_cholesky_
from hfquant_gptq.hessian import factorize


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "_BLOCK", 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int) -> Tensor:
    x = normal(2 * size, size)
    h = x.T @ x / size
    return (h + h.T) / 2


@pytest.mark.parametrize("size", [1, 15, 16, 17, 70])
def test_the_factor_is_lower_triangular_and_gives_the_matrix_back(size: int) -> None:
    h = positive(size)
    r = h.clone()
    place = r.data_ptr()
    assert reverse_cholesky_(r) and r.data_ptr() == place
    assert torch.equal(r, r.tril()) and bool((r.diagonal() > 0).all())
    torch.testing.assert_close(r.T @ r, h, rtol=1e-12, atol=1e-12)
    upper = torch.linalg.cholesky(h.flip((0, 1))).flip((0, 1))  # the same from the library, in memory of its own
    torch.testing.assert_close(r, upper.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", [0, 20, 69])
@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_a_matrix_that_is_not_positive_definite_is_left_as_it_was(place: int, bad: float) -> None:
    h = positive(70)
    h[place, place] = bad
    before = h.clone()
    assert not reverse_cholesky_(h)
    assert torch.equal(h.nan_to_num(7.0, 8.0), before.nan_to_num(7.0, 8.0))


@pytest.mark.parametrize("size", [1, 16, 37])
def test_rows_and_columns_are_rearranged_in_place(size: int) -> None:
    h, order = normal(size, size), torch.randperm(size, generator=torch.Generator().manual_seed(1))
    expected = h[order][:, order]
    place = h.data_ptr()
    permute_(h, order)
    assert torch.equal(h, expected) and h.data_ptr() == place


def seen(width: int) -> Stats:
    inputs = InputStats(width, frozenset({HESSIAN}))
    inputs.add((normal(90, width) @ normal(width, width, seed=1)).float())
    return Stats("layer", inputs=inputs, log=[])


def test_the_last_reader_factorizes_the_statistics_themselves() -> None:
    w = normal(5, 70).float()
    first, last = seen(70), seen(70)
    assert first.inputs is not None and last.inputs is not None and last.inputs.gram is not None
    last.inputs.last = True
    place = last.inputs.gram.data_ptr()
    one, other = factorize(first.inputs, w, "group", 16, 0.01), factorize(last.inputs, w, "group", 16, 0.01)
    assert one is not None and other is not None
    assert torch.equal(one.lower, other.lower) and torch.equal(one.pivots, other.pivots)
    assert other.lower.data_ptr() == place and last.inputs.gram is None and first.inputs.gram is not None


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("int4", Blocks(1, 16), scale="bfloat16"),
        TensorSpec("uint3", Blocks(1, 16), True, "bfloat16"),
        TensorSpec("e2m1", Blocks(5, 8)),
        TensorSpec("uint4", Blocks(-1, 32), True),
        TensorSpec("int3", Blocks(1, -1)),
    ],
    ids=lambda spec: f"{spec.grid}-{spec.blocks.rows}x{spec.blocks.cols}",
)
def test_rows_know_nothing_of_each_other(spec: TensorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(33, 70, seed=3).float()
    found = []
    for part in (1, 700, 1 << 21):
        monkeypatch.setattr(rounder, "_PART", part)
        stats = seen(70)
        found.append(rounder.gptq(w, spec, absmax, stats))
    for other in found[:2]:
        assert torch.equal(other.codes, found[2].codes)
        assert torch.equal(other.scale_values(), found[2].scale_values())
        assert (other.zero is None) == (found[2].zero is None)
        assert other.zero is None or torch.equal(other.zero, found[2].zero)
