"""Blocks against loops that cut the matrix by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfquant import blocks as module
from hfquant.blocks import Blocks, row_chunks
from hfquant.errors import SpecError

sides = st.one_of(st.just(-1), st.integers(1, 12))
blocks = st.builds(Blocks, sides, sides)
shapes = st.tuples(st.integers(1, 25), st.integers(1, 25))


def cut(w: Tensor, b: Blocks) -> list[list[Tensor]]:
    """The blocks of `w`, each flattened."""
    rows = w.shape[0] if b.rows == -1 else b.rows
    cols = w.shape[1] if b.cols == -1 else b.cols
    return [[block.flatten() for block in band.split(cols, 1)] for band in w.split(rows, 0)]


def matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 31 + shape[1]))


@given(blocks, shapes)
def test_reduce_is_the_loop_over_blocks(b: Blocks, shape: tuple[int, int]) -> None:
    w = matrix(shape)
    low, spread = b.reduce(w, lambda x: (x.amin(1), x.amax(1) - x.amin(1)))
    expected = cut(w, b)
    assert b.counts(shape) == tuple(low.shape) == (len(expected), len(expected[0]))
    assert torch.equal(low, torch.tensor([[x.min() for x in band] for band in expected]))
    assert torch.equal(spread, torch.tensor([[x.max() - x.min() for x in band] for band in expected]))


@given(blocks, shapes)
def test_ragged_blocks_are_seen_as_they_are(b: Blocks, shape: tuple[int, int]) -> None:
    (sizes,) = b.reduce(matrix(shape), lambda x: (torch.full((x.shape[0],), float(x.shape[1])),))
    assert sizes.tolist() == [[x.numel() for x in band] for band in cut(matrix(shape), b)]
    assert sizes.sum() == shape[0] * shape[1]


@given(blocks, shapes)
def test_expand_gives_every_element_the_value_of_its_block(b: Blocks, shape: tuple[int, int]) -> None:
    counts = b.counts(shape)
    values = torch.arange(counts[0] * counts[1]).reshape(counts)
    height, width = b.sides(shape)
    expected = torch.tensor([[int(values[i // height, j // width]) for j in range(shape[1])] for i in range(shape[0])])
    assert torch.equal(b.expand(values, shape).expand(shape), expected)


@given(blocks, shapes, st.data())
def test_expand_of_some_rows_is_a_part_of_the_whole(b: Blocks, shape: tuple[int, int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0] + 3))
    values = torch.randn(b.counts(shape), generator=torch.Generator().manual_seed(3))
    part = b.expand(values, shape, slice(start, stop))
    assert torch.equal(
        part.expand(min(stop, shape[0]) - start, shape[1]), b.expand(values, shape).expand(shape)[start:stop]
    )


@given(blocks, shapes, st.integers(1, 60))
def test_chunking_changes_nothing(b: Blocks, shape: tuple[int, int], chunk: int) -> None:
    w = matrix(shape)
    whole = b.reduce(w, lambda x: (x.amin(1), x.abs().amax(1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        parts = b.reduce(w, lambda x: (x.amin(1), x.abs().amax(1)))
        rows = [index for part in row_chunks(shape) for index in range(shape[0])[part]]
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))
    assert rows == list(range(shape[0]))


def test_work_is_done_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    seen: list[int] = []

    def largest(x: Tensor) -> tuple[Tensor]:
        seen.append(x.numel())
        return (x.amax(1),)

    Blocks(1, 8).reduce(torch.zeros(40, 16), largest)
    assert max(seen) == 64 and sum(seen) == 640


def test_half_precision_is_reduced_in_float32() -> None:
    w = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    (total,) = Blocks(1, -1).reduce(w, lambda x: (x.sum(1),))
    assert total.dtype == torch.float32 and float(total) == pytest.approx(4096 * float(w[0, 0]))


@pytest.mark.parametrize("side", [0, -2])
def test_impossible_sides_are_refused(side: int) -> None:
    with pytest.raises(SpecError, match="positive or -1"):
        Blocks(side, 1)
    with pytest.raises(SpecError, match="positive or -1"):
        Blocks(1, side)
