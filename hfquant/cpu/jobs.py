"""Several products of bound weights in one call of the CPU library: siblings with one input, experts of one token."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..kernel import Bound


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
        x, (at, copied) = x.contiguous(), address_of(bias)
        held.append((x, copied))
        fields += (*bound.at, x.data_ptr(), at, y.data_ptr(), x.numel() // k)
    if fields:
        library = bounds[0].library  # type: ignore[attr-defined]
        library.jobs(_table(len(ys)).pack(*fields), len(ys), ys[0].dtype)
    return True


def join(bounds: Sequence[Bound], biases: Sequence[Tensor | None]) -> Callable[[Tensor], list[Tensor]] | None:
    """What turns one x [..., K] into all the products of `run_jobs` with it: what does not depend on x is done once.

    It holds addresses of weights and biases, and keeps none of them alive. None if some weight needs its input in
    another form, or an input of another size.
    """
    fixed = []
    for bound, bias in zip(bounds, biases, strict=True):
        if type(bound) is not Direct or bound.k != bounds[0].k:  # type: ignore[attr-defined]
            return None
        at, copied = address_of(bias)  # which lives as long as what is returned
        fixed.append((bound, bound.n, *bound.at, at, copied))
    k, library, table = bounds[0].k, bounds[0].library, _table(len(bounds))  # type: ignore[attr-defined]

    def run(x: Tensor) -> list[Tensor]:
        x, shape = x.contiguous(), x.shape
        if shape[-1] != k:
            raise RuntimeError(f"weights with {k} columns cannot take an input of shape {tuple(shape)}")
        rows, at, leading = x.numel() // k, x.data_ptr(), shape[:-1]
        ys: list[Tensor] = []
        fields: list[int] = []
        for _, n, weight, input, bias, _ in fixed:
            y = x.new_empty(*leading, n)
            ys.append(y)
            fields += (weight, input, at, bias, y.data_ptr(), rows)
        library.jobs(table.pack(*fields), len(ys), x.dtype)
        return ys

    return run


@lru_cache(maxsize=64)
def _table(count: int) -> struct.Struct:
    """So many `hfq_job` of hfquant.h."""
    return struct.Struct("@" + "PPPPPq" * count)


def address_of(bias: Tensor | None) -> tuple[int, Tensor | None]:
    """Where the library reads a bias, 0 for none, and the copy that lies there, if it is not the bias itself."""
    offset = _as_float(bias)
    return 0 if offset is None else offset.data_ptr(), None if offset is bias else offset


def _as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
