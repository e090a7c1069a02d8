"""The factor of a matrix in its own memory, also where it takes several blocks and where it fails half-way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfquant_gptq import cholesky
from hfquant_gptq.cholesky import permute_, reverse_cholesky_


@pytest.fixture(params=[1, 7, 64, 512])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cholesky, "_BLOCK", request.param)
    return request.param


def positive(width: int) -> Tensor:
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    h = x.T @ x
    return (h + h.T) / 2


@pytest.mark.parametrize("width", [1, 20, 64, 101])
def test_it_is_the_flipped_cholesky_factor(width: int, blocks: int) -> None:
    h = positive(width)
    r = h.clone()
    assert reverse_cholesky_(r)
    assert torch.equal(r, r.tril())
    torch.testing.assert_close(r.T @ r, h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(r, torch.linalg.cholesky(h.flip((0, 1))).T.flip((0, 1)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 30, 69])
def test_a_failure_leaves_the_matrix_as_it_was(bad: int, blocks: int) -> None:
    h = positive(70)
    h[bad, bad] = -1.0
    again = h.clone()
    assert not reverse_cholesky_(again)
    assert torch.equal(again, h)


def test_permutation_in_place(blocks: int) -> None:
    h, order = positive(101), torch.randperm(101, generator=torch.Generator().manual_seed(0))
    moved = h.clone()
    permute_(moved, order)
    assert torch.equal(moved, h[order][:, order])
