"""The kernels of a KV cache, compiled for GPUs that are not here, are the code that they were written to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from hfquant.blocks import Blocks
from hfquant.kernels.triton import kv_attention
from hfquant.kernels.triton.kv_quantize import quantize
from hfquant.kv_states import quantized
from hfquant.spec import TensorSpec

from .compiled import TARGETS, Binary, recording
from .products import as_if_on


class On(NamedTuple):
    """A launch of attention over 512 packed and 130 newer tokens, for a target."""

    target: str
    keys: TensorSpec
    values: TensorSpec
    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    queries: int = 1

    def compiled(self) -> Iterator[Binary]:
        """Attention, and what puts its parts together."""
        x = torch.zeros(1, 8, 512, self.width, dtype=self.dtype)
        query = torch.zeros(1, 32, self.queries, self.width, dtype=self.dtype)
        mask = torch.ones(1, 1, self.queries, 642, dtype=torch.bool)
        sides = [(spec, quantized(x, spec), x[:, :, :130].contiguous()) for spec in (self.keys, self.values)]
        with as_if_on(self.target), recording() as recorded:
            kv_attention.attend(query, *sides, mask, 0.1)
        return (launched.compile(self.target) for launched in recorded)


def numbers(grid: str, *blocks: Blocks) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(grid, block, grid.startswith("uint"), "float16") for block in blocks)


KIVI = (Blocks(32, 1), Blocks(1, 32))
CONVERSION = r"I2F|v_cvt_f(16|32)_[iu]"
WIDE = r"(LDG|LDGSTS)\.E.*\.(64|128)|(global|buffer)_load_dwordx[24]"


@pytest.mark.parametrize("target", TARGETS)
def test_four_bits_are_read_widely_multiplied_in_matrices_and_never_converted(target: str) -> None:
    attention = next(On(target, *numbers("uint4", *KIVI)).compiled())
    assert attention.spilled == 0
    assert attention.count("v_mfma_f32" if target == "gfx942" else "HMMA", attention.loop) >= 2
    assert not attention.count(CONVERSION, attention.loop)
    assert attention.count(WIDE, attention.loop)


def test_parts_are_put_together_without_atomics() -> None:
    binaries = list(On("sm_90", *numbers("uint4", *KIVI)).compiled())
    assert len(binaries) == 2 and binaries[1].spilled == 0
    assert not any(binary.count("ATOM|RED") for binary in binaries)


OTHERS = {
    "two bits, wide heads": On("sm_90", *numbers("uint2", *KIVI), width=256),
    "eight bits": On("gfx942", *numbers("int8", *KIVI), torch.float16),
    "lookup, several queries": On("sm_89", *numbers("nf4", *KIVI), queries=8),
    "floating point by token": On("sm_100", *numbers("e4m3", Blocks(1, 64), Blocks(1, -1))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_do_not_spill_and_are_never_converted(name: str) -> None:
    binary = next(OTHERS[name].compiled())
    assert binary.spilled == 0 and not binary.count(CONVERSION, binary.loop)


@pytest.mark.parametrize(("target", "grid"), [("sm_80", "uint4"), ("gfx942", "e4m3")])
def test_quantizing_does_not_spill_and_converts_no_numbers(target: str, grid: str) -> None:
    x = torch.empty(1, 8, 1024, 128, dtype=torch.bfloat16)
    with recording() as recorded:
        for spec in numbers(grid, *KIVI):
            quantize(x, spec)
    for launched in recorded:
        binary = launched.compile(target)
        assert binary.spilled == 0
        # Places are divided by way of floating point, once; of numbers each thread has 8 or more.
        assert binary.count(r"I2F|F2I|v_cvt_f(16|32)_[iu]|v_cvt_[iu](16|32)_f") <= 8
        assert binary.count(r"LDG\.E.*\.128|(global|buffer)_load_dwordx4"), "16 bytes a load"
