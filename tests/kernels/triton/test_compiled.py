"""The reader of machine code sees what there is."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from .compiled import NVIDIA, TARGETS, Binary, recording


@triton.jit
def scaled_sum(x, y, out, n, STEP: tl.constexpr, INTEGER: tl.constexpr):
    at = tl.arange(0, STEP)
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, n, STEP):
        value = tl.load(x + start + at)
        total += value.to(tl.float32) * 0.5 if INTEGER else value * 0.5
    tl.store(out + at, total + tl.load(y))


@triton.jit
def squared(x, out, N: tl.constexpr):
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + row * N + col)
    tl.store(out + row * N + col, tl.dot(a, tl.trans(a)))


@triton.jit
def crowded(x, out, N: tl.constexpr, K: tl.constexpr):
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    held = tl.load(x + row * N + col)
    for step in range(K):
        held = held * tl.load(x + step) + tl.load(x + (row * N + col) * 3 + step) / held
    tl.store(out + row * N + col, held)


def summed(target: str, dtype: torch.dtype, offset: int = 0) -> Binary:
    with recording() as launches:
        x, out = torch.empty(4097 + offset, dtype=dtype), torch.empty(512)
        ints = dtype == torch.int32
        scaled_sum[(1,)](x[offset:], out, out, 4096, STEP=512, INTEGER=ints, num_warps=4, enable_fp_fusion=True)
    (launch,) = launches
    assert launch.grid == (1,)
    return launch.compile(target)


@pytest.mark.parametrize("target", NVIDIA)
def test_it_finds_conversions_and_wide_loads_in_the_loop(target: str) -> None:
    floats, ints, unaligned = (
        summed(target, torch.float32),
        summed(target, torch.int32),
        summed(target, torch.float32, 1),
    )
    assert ints.count("I2F", ints.loop) and not floats.count("I2F", floats.loop)
    assert floats.count(r"(LDG|LDGSTS)\.E.*\.128") and not unaligned.count(r"(LDG|LDGSTS)\.E.*\.128")
    assert 0 < len(floats.loop) < len(floats.lines)


def test_it_finds_them_on_amd() -> None:
    floats, ints = summed("gfx942", torch.float32), summed("gfx942", torch.int32)
    assert ints.count("v_cvt_f32_i32", ints.loop) and not floats.count("v_cvt_f32_i32", floats.loop)
    assert floats.count("(global|buffer)_load_dwordx") and 0 < len(floats.loop) < len(floats.lines)


@pytest.mark.parametrize("target", TARGETS)
def test_it_finds_matrix_instructions_and_what_they_need(target: str) -> None:
    with recording() as launches:
        squared[(1,)](torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64), N=64, num_warps=4)
    binary = launches[0].compile(target)
    name = {"sm_90": "HGMMA|WGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma"}.get(target, "HMMA")
    assert binary.count(name) and binary.spilled == 0 and 16 < binary.registers <= 512
    assert launches[0].compile(target) is binary, "compiled once"


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_it_finds_spills(target: str) -> None:
    with recording() as launches:
        x = torch.empty(1 << 16)
        crowded[(1,)](x, x, N=64, K=2, num_warps=4, maxnreg=24)
        crowded[(1,)](x, x, N=64, K=2, num_warps=4)
    tight, wide = (launch.compile(target) for launch in launches)
    assert tight.spilled > 0 and tight.registers <= 24 and wide.spilled == 0


def test_it_finds_spills_on_amd() -> None:
    with recording() as launches:
        x = torch.empty(1 << 17)
        crowded[(1,)](x, x, N=128, K=2, num_warps=1)
    assert launches[0].compile("gfx942").spilled > 0


def test_the_cache_of_the_user_is_left_alone() -> None:
    folder = triton.knobs.cache.dir
    assert summed("sm_80", torch.float32).metadata.name == "scaled_sum" and triton.knobs.cache.dir == folder
