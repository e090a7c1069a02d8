"""Blocks: who shares a scale. A matrix is cut into rectangles; the last ones of a row or column may be smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SpecError

_CHUNK = 1 << 18  # elements worked on at once: float32 copies of 1 MiB stay in cache and leave the heap whole


@dataclass(frozen=True)
class Blocks:
    """Rectangles of `rows` x `cols` elements, -1 for the whole axis.

    Tensor (-1, -1), channel or token (1, -1), group (1, 128), tile (128, 128).
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for axis in (self.rows, self.cols):
            if axis != -1 and axis < 1:
                raise SpecError(f"block sides are positive or -1 for the whole axis, got ({self.rows}, {self.cols})")

    def sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a full block in a matrix of `shape` [N, K]."""
        rows = shape[0] if self.rows == -1 else min(self.rows, shape[0])
        cols = shape[1] if self.cols == -1 else min(self.cols, shape[1])
        return max(rows, 1), max(cols, 1)

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks [R, C] there are along each axis, the ragged last ones included."""
        rows, cols = self.sides(shape)
        return -(-shape[0] // rows), -(-shape[1] // cols)

    def reduce(self, w: Tensor, fn: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Apply `fn` to the blocks of `w` [N, K] and lay its results out as [R, C] float32.

        `fn` maps [B, E] float32, one block a row, to tensors [B]; it sees ragged blocks as they are, never padded.
        """
        shape = (w.shape[0], w.shape[1])
        height, width = self.sides(shape)
        out: tuple[Tensor, ...] | None = None
        for top, bottom, left, right in self._regions(shape):
            part = w[top:bottom, left:right].float()
            rows, cols = min(height, bottom - top), min(width, right - left)
            tall, wide = (bottom - top) // rows, (right - left) // cols
            blocks = part.reshape(tall, rows, wide, cols).transpose(1, 2).reshape(tall * wide, rows * cols)
            results = fn(blocks)
            if out is None:
                out = tuple(w.new_empty(self.counts(shape), dtype=torch.float32) for _ in results)
            for target, value in zip(out, results, strict=True):
                i, j = top // height, left // width
                target[i : i + tall, j : j + wide] = value.reshape(tall, wide)
        assert out is not None
        return out

    def _regions(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
        """Rectangles (top, bottom, left, right) that divide evenly into equal blocks, small enough to be copied."""
        height, width = self.sides(shape)
        for left, right in _full_and_rest(shape[1], width):
            step = max(1, _CHUNK // (height * (right - left))) * height
            for top, bottom in _full_and_rest(shape[0], height):
                for start in range(top, bottom, step):
                    yield start, min(start + step, bottom), left, right

    def expand(self, values: Tensor, shape: tuple[int, int], rows: slice = slice(None)) -> Tensor:
        """Spread per-block `values` [R, C] over the elements: [n, K] for the rows asked for, broadcast where it can."""
        height, width = self.sides(shape)
        start, stop, _ = rows.indices(shape[0])
        if values.shape[0] > 1:
            index = torch.arange(start, stop, device=values.device) // height
            values = values[start:stop] if height == 1 else values[index]
        if values.shape[1] > 1:
            values = values.repeat_interleave(width, dim=1)[:, : shape[1]]
        return values


def _full_and_rest(length: int, step: int) -> list[tuple[int, int]]:
    """Split [0, length) into the part that `step` divides and the rest."""
    full = length // step * step
    return [part for part in ((0, full), (full, length)) if part[0] < part[1]]


def row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows of a matrix of `shape` [N, K] that are small enough to be copied to float32."""
    step = max(1, _CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
