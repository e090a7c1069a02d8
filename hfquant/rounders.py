"""Rounders: which codes. A rounder gets the range function, because GPTQ looks for ranges as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import compiled
from .blocks import row_chunks
from .codebooks import FittedGrid
from .qtensor import QTensor
from .ranges import Params
from .scales import encode
from .spec import TensorSpec
from .stats import Stats
from .tables import Table

FindRange = Callable[[Tensor, TensorSpec, Stats], Params]


class Rounder(Protocol):
    """Turns a weight [N, K] into codes and grid parameters."""

    def __call__(self, w: Tensor, spec: TensorSpec, find: FindRange, stats: Stats, /, **options: Any) -> QTensor:
        """`find` is the range function with its options already bound: it gives the grid parameters of a weight."""


ROUNDERS: Table[Rounder] = Table("rounder")


def nearest(w: Tensor, spec: TensorSpec, find: FindRange, stats: Stats) -> QTensor:
    """Each weight to the nearest level of its block, ties to even."""
    return to_nearest(w, find(w, spec, stats))


def to_nearest(w: Tensor, params: Params) -> QTensor:
    """A weight [N, K] on the levels that `params` describe, each value on the nearest one, ties to even."""
    spec, shape = params.spec, (w.shape[0], w.shape[1])
    codes = compiled.codes(w, compiled.Parameters(params.grid, params.scale, params.zero, spec.blocks.sides(shape)))
    if codes is None:
        codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
        for rows in row_chunks(shape):
            scale = spec.blocks.expand(params.scale, shape, rows)
            zero = None if params.zero is None else spec.blocks.expand(params.zero, shape, rows)
            codes[rows] = encode(w[rows].float(), scale, zero, params.grid)
    return with_levels(QTensor(codes, params.stored, params.stored_zero(), None, spec), params)


def with_levels(q: QTensor, params: Params) -> QTensor:
    """Attach the levels of a grid that was fitted to this weight, padded to 2^bits so that their shape is known."""
    named = params.spec.numbers()
    if not isinstance(named, FittedGrid):
        return q
    levels = params.grid.levels().to(q.codes.device)
    missing = 2**named.bits - levels.numel()
    return replace(q, levels=torch.cat([levels, levels[-1:].expand(missing)]))


BUILTIN: dict[str, Callable[..., QTensor]] = {"nearest": nearest}
