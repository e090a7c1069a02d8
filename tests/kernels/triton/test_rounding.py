"""Rounding by a Triton kernel gives the bits of the torch code that defines it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from hfquant import compiled
from hfquant.blocks import Blocks
from hfquant.compiled import ROUNDINGS, Parameters
from hfquant.gpu import rounding as gpu
from hfquant.grids import Grid, IntGrid, grid
from hfquant.kernel import use_kernel
from hfquant.kernels.triton import rounding
from hfquant.ranges import RANGES
from hfquant.rounders import to_nearest
from hfquant.spec import TensorSpec
from hfquant.stats import Stats
from hfquant_gptq.columnwise import column_rounder

from ..roundings import defined, roundings, same_bits
from .compiled import TARGETS, recording
from .interpret import interpreted


@settings(max_examples=80, deadline=None)
@given(problem=roundings())
def test_codes_and_values_are_those_of_torch(problem: tuple[torch.Tensor, Parameters]) -> None:
    assert_as_torch(*problem)


@settings(max_examples=20, deadline=None)
@given(problem=roundings(real_zeros=True))
def test_zero_points_may_be_any_numbers(problem: tuple[torch.Tensor, Parameters]) -> None:
    assert_as_torch(*problem)


def assert_as_torch(x: torch.Tensor, to: Parameters) -> None:
    codes, values = defined(x, to)
    with interpreted():
        assert torch.equal(rounding.codes(x, to), codes)
        assert same_bits(rounding.values(x, to), values)
        found = rounding.both(x, to)
    assert torch.equal(found[0], codes) and same_bits(found[1], values)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel rounded; it stands for "cpu" here, where the tests have their tensors."""
    calls: list[str] = []

    def watched(what: str) -> Any:
        def call(x: torch.Tensor, to: Parameters) -> Any:
            calls.append(what)
            with interpreted():
                return getattr(rounding, what)(x, to)

        return call

    def why_not(x: torch.Tensor, to: Grid, what: str) -> str | None:
        return gpu.why_not_numbers(x, to)

    here = compiled.Rounding("here", why_not, *(watched(what) for what in ("codes", "values", "both")), real_zeros=True)
    monkeypatch.setattr(ROUNDINGS, "_entries", {"here": (here, "hfquant")})
    return calls


@pytest.mark.parametrize("name", ["nf4", "e4m3", "uint3", "quantile4"])
@pytest.mark.parametrize("how", ["absmax", "mse", "percentile"])
def test_a_weight_is_quantized_alike_with_and_without_it(name: str, how: str, taken: list[str]) -> None:
    w = torch.randn(20, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = TensorSpec(name, Blocks(1, 64), name.startswith("uint"), "bfloat16")
    how = "absmax" if name == "quantile4" else how
    options = {"steps": 5} if how == "mse" else {}
    found = to_nearest(w, RANGES.get(how)(w, spec, Stats(), **options))
    assert "codes" in taken and ("values" in taken) == (how == "mse")
    before = len(taken)
    with use_kernel("reference"):
        wanted = to_nearest(w, RANGES.get(how)(w, spec, Stats(), **options))
    assert len(taken) == before
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("rows", [1, 8, -1])
@pytest.mark.parametrize(
    ("name", "zero"), [("uint4", True), ("uint4", "float32"), ("int4", False), ("e2m1", False), ("nf4", False)]
)
def test_gptq_rounds_columns_in_one_operation(name: str, zero: bool | str, rows: int, taken: list[str]) -> None:
    w = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    params = RANGES.get("absmax")(w, TensorSpec(name, Blocks(rows, 16), zero), Stats())
    fast = column_rounder(params, (20, 32))
    with use_kernel("reference"):
        plain = column_rounder(params, (20, 32))
    for column, block in ((3, 0), (20, 1)):
        found, wanted = fast(w[:, column].contiguous(), block), plain(w[:, column].contiguous(), block)
        assert torch.equal(found[0].float(), wanted[0].float()) and torch.equal(found[1], wanted[1])
    assert taken == ["both"] * 2


class Doubled(IntGrid):
    """A grid of a plugin that rounds in its own way."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x * 2)


@pytest.mark.parametrize(
    ("x", "to", "text"),
    [
        (torch.ones(2, 2, dtype=torch.float64), IntGrid(4), "not torch.float64"),
        (torch.ones(4, 2).T, IntGrid(4), "whose rows have no gaps"),
        (torch.ones(2, 2), Doubled(4), "int4 has a way of its own"),
        (torch.empty(1 << 31, device="meta"), IntGrid(4), "fewer than 2147483648 numbers"),
    ],
)
def test_what_it_declines_it_says_why(x: torch.Tensor, to: Grid, text: str) -> None:
    assert f"the numbers are on {x.device}" in str(gpu.why_not(x, to, "codes"))
    assert text in str(gpu.why_not_numbers(x, to))


def test_another_kernel_can_be_asked_for() -> None:
    with use_kernel("cpu"):
        assert gpu.why_not_numbers(torch.ones(2, 2), IntGrid(4)) == "kernel 'cpu' was asked for"
    with use_kernel("triton"):
        assert gpu.why_not_numbers(torch.ones(2, 2), IntGrid(4)) is None


def test_old_gpus_round_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    for capability, reason in (((7, 5), "needs compute capability 8.0, this GPU has 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert gpu.why_not(torch.ones(2, 2).as_subclass(OnGpu), IntGrid(4), "codes") == reason


def test_parameters_that_do_not_fit_are_refused() -> None:
    """The kernel reads what it is told to."""
    x = torch.ones(4, 8)
    for scale in (torch.ones(4, 1), torch.ones(4, 2).double()):
        with pytest.raises(RuntimeError, match="8 blocks need as many float32 parameters"):
            rounding.codes(x, Parameters(IntGrid(4), scale, None, (1, 4)))


WIDE = r"LDG\.E.*\.128|(global|buffer)_load_dwordx4"


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    """Loads of 16 bytes; codes and values by logic and arithmetic: only the place of a tile is divided."""
    x = torch.empty(1024, 4096, dtype=torch.bfloat16)
    scale, zero = torch.empty(1024, 32), torch.empty(1024, 32)
    with recording() as launches:
        rounding.both(x, Parameters(grid("nf4"), scale, None, (1, 128)))
        if target in ("sm_90", "gfx942"):
            rounding.codes(x, Parameters(grid("uint4"), scale, zero, (1, 128)))
        if target in ("sm_80", "sm_100"):
            rounding.values(x, Parameters(grid("e2m1"), scale, None, (1, 128)))
    for launch in launches:
        binary = launch.compile(target)
        assert binary.spilled == 0 and binary.count(WIDE)
        threads = TARGETS[target].warp_size * launch.options["num_warps"]
        assert binary.count("F2I|I2F|v_cvt_[fiu]32_[fiu]32") < rounding.NUMBERS / threads
