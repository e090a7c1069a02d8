"""The weight-only kernel, compiled for GPUs that are not here, is the code that it was written to be."""

from __future__ import annotations

import pytest
import torch

from hfquant.blocks import Blocks
from hfquant.kernels.triton import launch
from hfquant.spec import TensorSpec

from ..problems import packed, random_weight
from .compiled import ATOMIC, NVIDIA, TARGETS, Binary, Launch, recording
from .products import as_if_on

MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}
CONVERSION = r"I2F|v_cvt_f(16|32)_[iu]"
WIDE = r"(LDG|LDGSTS)\.E.*\.128|(global|buffer)_load_dwordx4"
ROWS = (1, 64, 4096)  # a matrix-vector product, a small and a large matrix product


def launches(target: str, rows: int, spec: TensorSpec, dtype: torch.dtype, layout: str = "dense") -> list[Launch]:
    """What a 1024 x 1024 weight launches."""
    tensors, described = packed(random_weight((1024, 1024), spec, 0), layout)
    with as_if_on(target), recording() as recorded:
        launch.bind(tensors, described)(torch.empty(rows, 1024, dtype=dtype), tensors, torch.empty(1024))
    return recorded


def compiled(target: str, rows: int, spec: TensorSpec, dtype: torch.dtype, layout: str = "dense") -> Binary:
    return launches(target, rows, spec, dtype, layout)[0].compile(target)


NF4 = TensorSpec("nf4", Blocks(1, 64), False, "bfloat16")
AFFINE = TensorSpec("uint4", Blocks(1, 128), True, "bfloat16")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", ROWS)
def test_four_bits_are_read_sixteen_bytes_at_a_time_and_never_converted(target: str, rows: int) -> None:
    binary = compiled(target, rows, AFFINE, torch.bfloat16)
    assert binary.spilled == 0
    assert binary.count(MATRIX[target], binary.loop) >= 2
    assert not binary.count(CONVERSION, binary.loop)
    tile = launches(target, rows, AFFINE, torch.bfloat16)[0].options
    # All of x and of the codes: in bytes of a tile, over 16, over the threads.
    bytes_read = tile["BM"] * tile["BK"] * 2 + tile["BN"] * tile["BK"] // 2
    threads = tile["num_warps"] * TARGETS[target].warp_size
    assert binary.count(WIDE, binary.loop) >= bytes_read / 16 / threads


OTHERS = {  # kind of codes: what is stored, in which layout, the dtype of the input, on which targets
    "exact integers, no zero points": (TensorSpec("int4", Blocks(1, 64)), "dense", torch.float16, ("sm_80", "gfx942")),
    "eight bits": (TensorSpec("int8", Blocks(1, -1)), "bytes", torch.bfloat16, ("sm_89", "sm_100")),
    "lookup": (TensorSpec("nf4", Blocks(1, 64)), "dense", torch.bfloat16, ("sm_90", "gfx942")),
    "floating point": (TensorSpec("e2m1", Blocks(1, 32)), "dense", torch.bfloat16, ("sm_89", "sm_90")),
    "scales inside": (TensorSpec("uint3", Blocks(1, 40), True), "dense", torch.bfloat16, ("sm_100", "sm_80")),
    "real zero points": (
        TensorSpec("uint4", Blocks(1, 64), "float32"),
        "dense",
        torch.bfloat16,
        ("sm_90", "gfx942"),
    ),
    "float32": (TensorSpec("uint4", Blocks(1, 40), True), "dense", torch.float32, ("sm_80", "gfx942")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_do_not_spill_and_never_convert_integers(name: str) -> None:
    spec, layout, dtype, targets = OTHERS[name]
    for rows, target in zip((1, 300), targets, strict=True):
        binary = compiled(target, rows, spec, dtype, layout)
        assert binary.spilled == 0 and not binary.count(CONVERSION, binary.loop)
        assert dtype == torch.float32 or binary.count(MATRIX[target], binary.loop)
        # Codes of three bits are read one by one, and a tile of one group of 32 columns has 8 bytes for a thread.
        assert binary.count(WIDE, binary.loop) or name in ("scales inside", "floating point")


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_do_not_spill_and_never_convert_integers(target: str) -> None:
    gathered = TensorSpec("uint3", Blocks(1, 40), True, "bfloat16")
    for spec, rows in ((AFFINE, 300), (gathered, 60)) if target in ("sm_100", "gfx942") else ((AFFINE, 300),):
        tensors, described = packed(random_weight((1024, 1024), spec, 0), "dense")
        with as_if_on(target), recording() as recorded:
            launch.gradient(torch.empty(rows, 1024, dtype=torch.bfloat16), tensors, described)
        binary = recorded[0].compile(target)
        assert binary.spilled == 0 and not binary.count(CONVERSION, binary.loop)
        assert binary.count(MATRIX[target], binary.loop)
        assert spec is gathered or binary.count(WIDE, binary.loop)


@pytest.mark.parametrize("target", TARGETS)
def test_partial_sums_are_added_without_atomics(target: str) -> None:
    product, sums = launches(target, 1, AFFINE, torch.bfloat16)
    for binary in (product.compile(target), sums.compile(target)):
        assert not binary.count(ATOMIC) and binary.spilled == 0
    assert sums.compile(target).count(WIDE)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("spec", "most"), [(AFFINE, 6), (NF4, 8)], ids=["affine", "lookup"])
def test_a_weight_takes_few_instructions(target: str, spec: TensorSpec, most: int) -> None:
    """Of the loop of a matrix-vector product, whole: memory at its limit leaves three to five for each weight.

    Levels are looked up in registers: nothing is loaded by the number of a code.
    """
    tile = launches(target, 1, spec, torch.bfloat16)[0]
    binary, threads = tile.compile(target), 32 * tile.options["num_warps"]
    weights = tile.options["BN"] * tile.options["BK"] / threads
    assert len(binary.loop) <= most * weights
    assert binary.count("LD", binary.loop) < weights
