"""Compiled rounding gives the bits of the torch code that defines it, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import compiled, cpu
from hfquant.blocks import Blocks
from hfquant.codebooks import FittedGrid
from hfquant.compiled import ROUNDINGS, Parameters
from hfquant.cpu import rounding
from hfquant.grids import GRIDS, Codebook, Grid, IntGrid, by_pattern, grid
from hfquant.kernel import use_kernel
from hfquant.ranges import RANGES, Params
from hfquant.rounders import to_nearest
from hfquant.scales import encode, round_to
from hfquant.spec import TensorSpec
from hfquant.stats import Stats

from .problems import DTYPES, ISAS, LIBRARY
from .problems import GRIDS as PATTERNS

UNSIGNED = ("ue2m2", "ue1m2", "ue4m4", "ue3m0", "e3m0b2", "e5m2", "e6m1", "e7m0", "e1m6")
FITTED = (-3.0, -1.0, -0.25, 0.0, 1e-30, 0.5, 2.0)  # any count of levels
NAMES = (*PATTERNS, *UNSIGNED, *(name for name in GRIDS.names() if not isinstance(grid(name), FittedGrid)))
CPU = cpu.ROUNDING


def numbers(grid: Grid, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Levels, the middles between them, their neighbours, any bit pattern, and what is no number."""
    levels = grid.levels()
    middle = ((levels[:-1].double() + levels[1:].double()) / 2).float()
    points = torch.cat([levels, middle, torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])])
    count = shape[0] * shape[1]
    x = points[torch.randint(len(points), (count,), generator=generator)]
    kind = torch.randint(5, (count,), generator=generator)
    x = torch.where(kind == 1, torch.nextafter(x, torch.tensor(torch.inf)), x)
    x = torch.where(kind == 2, torch.nextafter(x, torch.tensor(-torch.inf)), x)
    x = torch.where(kind == 3, torch.randn(count, generator=generator) * grid.top, x)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    return torch.where(kind == 4, bits, x).reshape(shape)


@st.composite
def roundings(draw: st.DrawFn) -> tuple[Tensor, Parameters]:
    """A matrix, not always without gaps between rows, and what it is rounded to."""
    book = draw(st.booleans()) and draw(st.booleans())
    to = Codebook("book", FITTED[draw(st.integers(0, 3)) :]) if book else grid(draw(st.sampled_from(NAMES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 9)), draw(st.one_of(st.integers(1, 70), st.integers(500, 1100)))
    blocks = Blocks(draw(st.sampled_from([1, 2, 3, -1])), draw(st.sampled_from([1, 3, 12, 16, 32, 100, -1])))
    counts = blocks.counts(shape)
    scale = torch.ones(counts) if draw(st.booleans()) else torch.randn(counts, generator=generator).exp()
    if draw(st.booleans()):
        scale.view(-1)[0] = draw(st.sampled_from([torch.nan, torch.inf, 1e-38, 1e38]))
    asymmetric = isinstance(to, IntGrid) and not to.is_signed and draw(st.booleans())
    zero = torch.randint(to.size, counts, generator=generator).float() if asymmetric else None
    x = numbers(to, (shape[0], shape[1] + draw(st.sampled_from([0, 3]))), generator)[:, : shape[1]]
    return x.to(draw(st.sampled_from(DTYPES))), Parameters(to, scale, zero, blocks.sides(shape))


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal, signs of 0 and places of NaN included."""
    bad = wanted.isnan()
    same = torch.equal(found.isnan(), bad) and torch.equal(found.signbit()[~bad], wanted.signbit()[~bad])
    return same and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=250, deadline=None)
@given(problem=roundings())
def test_codes_and_values_are_those_of_torch(name: str, problem: tuple[Tensor, Parameters]) -> None:
    x, to = problem
    blocks, shape = Blocks(*to.sides), (x.shape[0], x.shape[1])
    scale, zero = (None if given is None else blocks.expand(given, shape) for given in (to.scale, to.zero))
    assert scale is not None
    with use_kernel("reference"):  # all in torch
        codes, values = encode(x.float(), scale, zero, to.grid), round_to(x.float(), scale, zero, to.grid)
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
