"""Compiled rounding gives the bits of the torch code that defines it, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hfquant import compiled, cpu
from hfquant.blocks import Blocks
from hfquant.compiled import ROUNDINGS, Parameters
from hfquant.cpu import rounding
from hfquant.grids import Grid, IntGrid, by_pattern, grid
from hfquant.kernel import use_kernel
from hfquant.ranges import RANGES, Params
from hfquant.rounders import to_nearest
from hfquant.scales import round_to
from hfquant.spec import TensorSpec
from hfquant.stats import Stats

from .problems import ISAS, LIBRARY
from .roundings import defined, roundings, same_bits

CPU = cpu.ROUNDING


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=250, deadline=None)
@given(problem=roundings())
def test_codes_and_values_are_those_of_torch(name: str, problem: tuple[Tensor, Parameters]) -> None:
    x, to = problem
    codes, values = defined(x, to)
    with LIBRARY.using(name):
        assert torch.equal(CPU.codes(x, to), codes)
        assert same_bits(CPU.values(x, to), values)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was rounded by compiled code."""
    calls: list[str] = []

    def watch(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, to: calls.append(name) or call(x, to)  # type: ignore[func-returns-value]

    watched = compiled.Rounding("cpu", CPU.why_not, watch("codes", CPU.codes), watch("values", CPU.values))
    monkeypatch.setattr(ROUNDINGS, "_entries", {"cpu": (watched, "hfquant")})
    return calls


@pytest.mark.parametrize("name", ["nf4", "int4", "e4m3", "uint3", "quantile4"])
@pytest.mark.parametrize("how", ["absmax", "mse", "percentile"])
def test_a_weight_is_quantized_alike_with_and_without_it(name: str, how: str, taken: list[str]) -> None:
    w = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = TensorSpec(name, Blocks(1, 64), name.startswith("uint"), "bfloat16")
    how = "absmax" if name == "quantile4" else how
    found = to_nearest(w, RANGES.get(how)(w, spec, Stats()))
    assert "codes" in taken and ("values" in taken) == (how == "mse" and name != "e4m3")  # arithmetic is faster there
    before = len(taken)
    with use_kernel("reference"):
        wanted = to_nearest(w, RANGES.get(how)(w, spec, Stats()))
    assert len(taken) == before
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize(
    ("shape", "scale", "is_taken"),
    [
        *[((6, 40), scale, True) for scale in ((1,), (), (6, 1), (1, 40), (6, 40), (1, 1))],
        *[((2, 3, 20), scale, True) for scale in ((1,), ())],
        *[((7,), (1,), True), ((), (1,), True), ((), (), True), ((2, 3, 20), (3, 1), False), ((6, 40), (40,), False)],
        *[((0, 5), (0, 1), False), ((5, 0), (5, 1), False), ((1, 40), (6, 1), False), ((1, 1), (5, 1), False)],
    ],
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_of_any_shape_that_broadcasts(
    shape: tuple[int, ...], scale: tuple[int, ...], is_taken: bool, asymmetric: bool, taken: list[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(shape, generator=generator) * 9, torch.rand(scale, generator=generator) + 0.5
    zero = torch.randint(16, scale, generator=generator).float() if asymmetric else None
    to = by_pattern("uint4" if asymmetric else "int4")
    assert to is not None
    found = round_to(x, factor, zero, to)
    assert bool(taken) == is_taken
    with use_kernel("reference"):
        wanted = round_to(x, factor, zero, to)
    assert found.shape == wanted.shape and same_bits(found, wanted)


def whole(x: Tensor, to: Grid) -> Params:
    spec = TensorSpec(to.name, Blocks(-1, -1))
    scale = torch.ones(1, 1, device=x.device)
    return Params(spec, to, scale, scale, None)


@pytest.mark.parametrize(("zero", "count"), [(7.0, 3), (7.5, 0)])
def test_zero_points_that_are_not_whole_are_left_to_torch(zero: float, count: int, taken: list[str]) -> None:
    x, numbers = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), grid("uint4")
    to = Parameters(numbers, torch.full((3, 1), 0.25), torch.full((3, 1), zero), (1, 8))
    found = [compiled.codes(x, to), compiled.values_in_blocks(x, to), compiled.values(x, to.scale, to.zero, numbers)]
    assert len(taken) == sum(each is not None for each in found) == count


def test_results_do_not_depend_on_threads() -> None:
    x, before = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    to = Parameters(grid("dyn8"), torch.rand(70, 32, generator=torch.Generator().manual_seed(1)), None, (1, 32))
    wanted = CPU.codes(x, to)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(CPU.codes(x, to), wanted)
    finally:
        torch.set_num_threads(before)


class Doubled(IntGrid):
    """A grid of a plugin that rounds in its own way."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x * 2)


@pytest.mark.parametrize(
    ("x", "to", "text"),
    [
        (torch.ones(2, 2, dtype=torch.float64), IntGrid(4), "not torch.float64"),
        (torch.ones(2, 2, device="meta"), IntGrid(4), "the numbers are on meta"),
        (torch.ones(4, 2).T, IntGrid(4), "whose rows have no gaps"),
        (torch.ones(2, 2), Doubled(4), "int4 has a way of its own"),
    ],
)
def test_what_it_declines_it_says_why_and_torch_does(x: Tensor, to: Grid, text: str, taken: list[str]) -> None:
    assert text in str(CPU.why_not(x, to, "codes"))
    assert to_nearest(x, whole(x, to)).codes.shape == x.shape
    assert not taken


def test_without_the_library_torch_does(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    x = torch.ones(2, 2)
    assert CPU.why_not(x, IntGrid(4), "codes") is None
    monkeypatch.setattr(rounding, "library", lambda: "the library is not built")
    assert CPU.why_not(x, IntGrid(4), "codes") == "the library is not built"
    assert to_nearest(x, whole(x, IntGrid(4))).codes.tolist() == [[9, 9], [9, 9]]
    assert not taken


def test_nobody_who_follows_operators_misses_one(taken: list[str]) -> None:
    scale, to = torch.full((4, 1), 0.5), IntGrid(4)

    def f(x: Tensor) -> Tensor:
        return round_to(x, scale, None, to)

    x = torch.linspace(-3, 3, 32).reshape(4, 8)
    wanted = f(x)
    assert taken == ["values"]
    followed: list[Any] = [
        torch.compile(f, backend="eager", fullgraph=True)(x),
        f(x.clone().requires_grad_()).detach(),
        torch.func.vmap(lambda row: round_to(row, scale[0], None, to))(x),
        torch.jit.trace(f, x, check_trace=False)(x),  # a check would call f itself
    ]
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        followed.append(f(x))
    assert taken == ["values"]
    assert all(torch.equal(found, wanted) for found in followed)
    with torch.no_grad():
        assert torch.equal(f(x.clone().requires_grad_()), wanted)
    assert taken == ["values"] * 2


def test_parameters_that_do_not_fit_are_refused() -> None:
    """The library reads what it is told to."""
    x = torch.ones(4, 8)
    for scale in (torch.ones(4, 1), torch.ones(4, 2).double()):
        with pytest.raises(RuntimeError, match="8 blocks need as many float32 parameters"):
            CPU.codes(x, Parameters(IntGrid(4), scale, None, (1, 4)))
