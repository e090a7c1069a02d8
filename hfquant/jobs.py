"""Several products of bound weights in one call of the CPU library: siblings with one input, experts of one token."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from .kernel import Bound


@dataclass(eq=False, slots=True)
class Direct:
    """A bound weight [n, k] whose input goes to the library as it is, so that a call can be part of a larger one.

    `weight` and `input` are the library's structures, `input` None for inputs in floating point.
    """

    library: Any
    weight: Any
    input: Any = None
    n: int = field(init=False)
    k: int = field(init=False)
    at: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.n, self.k = self.weight.n, self.weight.k
        self.at = ctypes.addressof(self.weight), 0 if self.input is None else ctypes.addressof(self.input)

    def __call__(self, x: Tensor, packed: list[Tensor], bias: Tensor | None) -> Tensor:
        """y [..., N] of `x` [..., K]."""
        return self.library.linear(x.contiguous(), self.weight, _as_float(bias), self.input)


def run_jobs(
    bounds: Sequence[Bound], xs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> bool:
    """Fill each contiguous y [..., N_i] with the product of its x [..., K_i], in one call; results as of single calls.

    All are of one dtype. Returns False, and does nothing, if some weight needs its input in another form. Raises
    MemoryError, and RuntimeError, as torch does, if shapes do not fit.
    """
    fields: list[int] = []
    held = []  # what is only made for the call must live as long
    for bound, x, bias, y in zip(bounds, xs, biases, ys, strict=True):
        if type(bound) is not Direct:
            return False
        n, k = bound.n, bound.k
        if x.shape[-1] != k or y.shape[-1] != n or (bias is not None and bias.numel() != n):
            given = f"{tuple(x.shape)}" + ("" if bias is None else f" and a bias of {bias.numel()}")
            raise RuntimeError(f"a weight of {n} x {k} cannot take an input of shape {given}")
        x, offset = x.contiguous(), _as_float(bias)
        held.append((x, offset))
        at = 0 if offset is None else offset.data_ptr()
        fields += (*bound.at, x.data_ptr(), at, y.data_ptr(), x.numel() // k)
    if fields:
        library = bounds[0].library  # type: ignore[attr-defined]
        library.jobs(_table(len(ys)).pack(*fields), len(ys), ys[0].dtype)
    return True


@lru_cache(maxsize=64)
def _table(count: int) -> struct.Struct:
    """So many `hfq_job` of hfquant.h."""
    return struct.Struct("@" + "PPPPPq" * count)


def _as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
