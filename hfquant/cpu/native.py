"""The library of CPU kernels as Python sees it.

It is loaded once, after torch, so that both share one OpenMP runtime and its threads. It picks the best instruction set
of the processor; HFQUANT_CPU_ISA asks for another one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from ..build import cpu_library
from ..errors import UnsupportedError
from .types import TYPES, Input, Weight

NAME = "cpu"  # of the kernel
ABI = 5


class Library:
    """The loaded library. Raises UnsupportedError if it does not fit, or has nothing for HFQUANT_CPU_ISA."""

    def __init__(self, path: str) -> None:
        try:
            self._c = ctypes.CDLL(path)
        except OSError as error:
            raise UnsupportedError(f"the CPU kernels cannot be loaded: {error}", [_REBUILD]) from error
        self._c.hfq_isa.restype = self._c.hfq_isas.restype = c_char_p
        self._c.hfq_use.argtypes = [c_char_p]
        self._c.hfq_read.restype, self._c.hfq_read.argtypes = c_int64, [c_void_p, c_int64, c_int]
        self._c.hfq_linear.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int]
        self._c.hfq_linear_int.argtypes = [c_void_p, *self._c.hfq_linear.argtypes]
        self._c.hfq_linear_grid.argtypes = self._c.hfq_linear_int.argtypes
        if (found := self._c.hfq_abi()) != ABI:
            raise UnsupportedError(f"{path} has version {found} of the interface, hfquant needs {ABI}", [_REBUILD])
        self._c.hfq_linear_jobs.argtypes = [c_char_p, c_int64, c_int, c_int]
        self._c.hfq_steps.argtypes = [c_char_p, c_int64, c_char_p, c_int64, c_int64, c_int64, c_int, c_int]
        if self._c.hfq_isa() is None:
            asked, able = os.environ.get("HFQUANT_CPU_ISA"), ", ".join(self.isas())
            raise UnsupportedError(f"HFQUANT_CPU_ISA={asked!r} is nothing that runs here: choose from {able}")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._c.hfq_isa().decode()

    def isas(self) -> list[str]:
        """The instruction sets that are built and run on this processor, best first."""
        return self._c.hfq_isas().decode().split(",")

    @contextmanager
    def using(self, isa: str) -> Iterator[None]:
        """Use another instruction set inside the block, in all threads. Raises UnsupportedError if it is not there."""
        before = self.isa
        if self._c.hfq_use(isa.encode()):
            raise UnsupportedError(f"instruction set {isa!r} is nothing that runs here: choose from {self.isas()}")
        try:
            yield
        finally:
            self._c.hfq_use(before.encode())

    def read(self, words: Tensor) -> int:
        """Read `words` int64 as fast as memory gives them: what reading weights is compared with. Returns their sum."""
        return self._c.hfq_read(words.data_ptr(), words.numel(), torch.get_num_threads())

    def call(self, name: str, *addresses: int, type: int) -> int:
        """What a function returns that takes addresses or sizes, the type of numbers and how many threads to use."""
        result: int = self._c[name](*map(c_void_p, addresses), type, torch.get_num_threads())
        return result

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None, input: Input | None = None) -> Tensor:
        """y [..., N] of contiguous `x` [..., K], in its dtype; `bias` [N] float32; `input`: how `x` is quantized.

        Raises MemoryError, and RuntimeError, as torch does, if the shapes do not fit.
        """
        if x.shape[-1] != weight.k or (bias is not None and bias.numel() != weight.n):
            given = f"{tuple(x.shape)}" + ("" if bias is None else f" and a bias of {bias.numel()}")
            raise RuntimeError(f"a weight of {weight.n} x {weight.k} cannot take an input of shape {given}")
        y = x.new_empty(*x.shape[:-1], weight.n)
        at = None if bias is None else bias.data_ptr()
        rows = y.numel() // weight.n if weight.n else 0
        rest = (x.data_ptr(), at, y.data_ptr(), rows, TYPES[x.dtype], torch.get_num_threads())
        if input is None:
            failed = self._c.hfq_linear(ctypes.addressof(weight), *rest)
        else:
            call = self._c.hfq_linear_int if input.integers else self._c.hfq_linear_grid
            failed = call(ctypes.addressof(weight), ctypes.addressof(input), *rest)
        if failed:
            raise MemoryError(f"the CPU kernels ran out of memory on a {weight.n} x {weight.k} weight")
        return y

    def jobs(self, table: bytes, count: int, dtype: torch.dtype) -> None:
        """Run `count` jobs of the `table` of `hfq_job`, whose inputs and results are of `dtype`. Raises MemoryError."""
        if self._c.hfq_linear_jobs(table, count, TYPES[dtype], torch.get_num_threads()):
            raise MemoryError(f"the CPU kernels ran out of memory on {count} products at once")

    def steps(self, table: bytes, count: int, slots: bytes, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Run `count` steps of the `table` of `hfq_step` on the addresses in `slots`. Raises MemoryError.

        `sizes`: rows, positions and tokens.
        """
        if self._c.hfq_steps(table, count, slots, *sizes, TYPES[dtype], torch.get_num_threads()):
            raise MemoryError(f"the CPU kernels ran out of memory on {count} steps of {sizes[0]} rows")


_REBUILD = "build it again: hfquant doctor --build"


@lru_cache(maxsize=1)
def library() -> Library | str:
    """The library, or the reason why there is none."""
    path = cpu_library()
    if path is None:
        return "the library is not built: install a C++ compiler and run `hfquant doctor --build`"
    try:
        return Library(str(path))
    except UnsupportedError as error:
        return str(error)
