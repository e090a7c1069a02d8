"""Grids against torch's float8 types, brute force, and each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfquant  # noqa: F401  registers the grids of the core
from hfquant.codebooks import FittedGrid
from hfquant.errors import FormatError, SpecError
from hfquant.grids import GRIDS, Codebook, FloatGrid, Grid, IntGrid, _levels, grid, thresholds

INTEGERS = [f"int{b}" for b in range(2, 9)] + [f"int{b}n" for b in range(2, 9)] + [f"uint{b}" for b in range(2, 9)]
FLOATS = [f"e{e}m{m}" for e in range(1, 8) for m in range(7) if 3 <= 1 + e + m <= 8]
UNSIGNED = [f"ue{e}m{m}" for e in range(1, 8) for m in range(8) if 3 <= e + m <= 8]
SPECIAL = ["e4m3fn", "e5m2ieee", "e3m4fn", "e2m2ieee", "e4m3b11", "e5m2b-3", "e4m3fnb8"]
BOOKS = [name for name in GRIDS.names() if not isinstance(grid(name), FittedGrid)]
NAMES = [*INTEGERS, *FLOATS, *UNSIGNED, *SPECIAL, *BOOKS]
each_grid = pytest.mark.parametrize("name", NAMES)

# Every float16 number there is, as float32: 63488 finite values with all ties of the 8-bit floats among them.
HALVES = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
HALVES = HALVES[HALVES.isfinite()]


def nearest(numbers: Grid, x: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest levels by comparing all of them in float64, ties to an even distance from zero's code."""
    distance = (x.double()[:, None] - numbers.levels().double()[None, :]).abs()
    steps = (torch.arange(numbers.size) - numbers.zero_code) % 2
    best = distance == distance.amin(1, keepdim=True)
    # Among the (at most two) nearest levels, the even one.
    return (best.long() * 4 - steps).argmax(1).to(torch.uint8)


def probes(numbers: Grid) -> torch.Tensor:
    """Levels, middles between them, and the float32 neighbours of both; values outside; random ones."""
    levels = numbers.levels()
    middle = ((levels[:-1].double() + levels[1:].double()) / 2).float()
    points = torch.cat([levels, middle])
    infinity = torch.tensor(torch.inf)
    near = [points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)]
    span = float(levels[-1] - levels[0])
    noise = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 1.2 * span + (float(levels[0]) - 0.1 * span)
    return torch.cat([*near, noise, torch.tensor([0.0, -0.0, 2 * span, -2 * span])])


@each_grid
def test_encode_is_the_nearest_level_and_ties_go_to_even(name: str) -> None:
    numbers, x = grid(name), probes(grid(name))
    assert torch.equal(numbers.encode(x), nearest(numbers, x))


@pytest.mark.parametrize("name", [*FLOATS, *UNSIGNED, *SPECIAL, "e3m0b2", "e4m0b-1", "e2m0b4", "ue3m0b2"])
def test_floats_are_encoded_by_arithmetic_as_by_the_general_search(name: str) -> None:
    numbers = grid(name)
    any_bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(1))
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, -3.4e38])
    x = torch.cat([any_bits.to(torch.int32).view(torch.float32), odd, probes(numbers)])
    assert torch.equal(numbers.encode(x), Grid.encode(numbers, x))


@each_grid
def test_the_nearest_level_is_that_of_the_nearest_code(name: str) -> None:
    numbers, x = grid(name), probes(grid(name))
    assert torch.equal(numbers.nearest(x), numbers.decode(numbers.encode(x)))


@each_grid
def test_levels_are_sorted_unique_float32_with_an_exact_zero(name: str) -> None:
    levels = grid(name).levels()
    assert levels.dtype == torch.float32 and levels.isfinite().all()
    assert (levels.diff() > 0).all() and 2 <= levels.numel() <= 256
    assert float(levels[grid(name).zero_code]) == 0.0
    assert levels.numel() <= 2 ** grid(name).bits


@each_grid
def test_decode_then_encode_gives_the_code_back(name: str) -> None:
    numbers = grid(name)
    codes = torch.arange(numbers.size).to(torch.uint8)
    assert torch.equal(numbers.decode(codes), numbers.levels())
    assert torch.equal(numbers.encode(numbers.decode(codes)), codes)


@each_grid
def test_rounding_twice_changes_nothing(name: str) -> None:
    numbers = grid(name)
    once = numbers.decode(numbers.encode(probes(numbers)))
    assert torch.equal(numbers.decode(numbers.encode(once)), once)


@each_grid
def test_values_beyond_the_ends_saturate(name: str) -> None:
    numbers = grid(name)
    ends = numbers.decode(numbers.encode(torch.tensor([-torch.inf, -3.0e38, 3.0e38, torch.inf])))
    low, high = float(numbers.levels()[0]), numbers.top
    assert ends.tolist() == [low, low, high, high]


@pytest.mark.parametrize("name", [n for n in NAMES if torch.equal(grid(n).levels(), -grid(n).levels().flip(0))])
def test_symmetric_grids_round_both_signs_alike(name: str) -> None:
    numbers, x = grid(name), probes(grid(name))
    assert torch.equal(numbers.decode(numbers.encode(-x)), -numbers.decode(numbers.encode(x)))


def test_which_grids_are_symmetric() -> None:
    symmetric = {n for n in NAMES if torch.equal(grid(n).levels(), -grid(n).levels().flip(0))}
    assert symmetric == {*(f"int{b}n" for b in range(2, 9)), *FLOATS, *SPECIAL, "fp4"}


@each_grid
def test_the_name_finds_the_grid(name: str) -> None:
    assert grid(name).name == name and grid(grid(name).name) == grid(name)


@given(
    st.integers(1, 7).flatmap(
        lambda e: st.tuples(st.just(e), st.integers(0 if e > 1 else 1, 7 - e), st.integers(-40, 40))
    ),
    st.sampled_from(["none", "fn", "ieee"]),
)
def test_every_float_grid_round_trips_through_its_name(shape: tuple[int, int, int], specials: str) -> None:
    e, m, bias = shape
    try:
        made = FloatGrid(e, m, bias, specials)
    except SpecError as error:
        assert "another bias" in str(error) and e == 7  # only the widest exponents leave float32 with these biases
        return
    assert grid(made.name) == made
    assert torch.equal(made.levels(), FloatGrid(e, m, None, specials).levels() * 2.0 ** (2 ** (e - 1) - 1 - bias))


@pytest.mark.parametrize("name", UNSIGNED)
def test_an_unsigned_format_has_the_magnitudes_of_the_signed_one(name: str) -> None:
    numbers = grid(name)
    assert isinstance(numbers, FloatGrid) and not numbers.signed and numbers.bits == numbers.e + numbers.m
    if numbers.bits < 8:
        signed = FloatGrid(numbers.e, numbers.m).levels()
        assert torch.equal(numbers.levels(), signed[signed >= 0])
    codes = torch.arange(numbers.size).to(torch.uint8)
    assert torch.equal(numbers.to_bits(codes), codes) and torch.equal(numbers.from_bits(codes), codes)
    assert not numbers.encode(torch.tensor([-1.0, -0.0, -torch.inf])).any()


def torch_codes(name: str, dtype: torch.dtype, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bit patterns of all float16 values up to `top`: ours, and torch's with -0 written as +0."""
    x = HALVES[HALVES.abs() <= top]
    numbers = grid(name)
    assert isinstance(numbers, FloatGrid)
    theirs = x.to(dtype)
    patterns = theirs.view(torch.uint8)
    return numbers.to_bits(numbers.encode(x)), torch.where(theirs.float() == 0, 0, patterns).to(torch.uint8)


def test_e4m3fn_is_torch_float8_e4m3fn_code_for_code() -> None:
    ours, theirs = torch_codes("e4m3fn", torch.float8_e4m3fn, 448)
    assert torch.equal(ours, theirs) and ours.unique().numel() == 253
    assert grid("e4m3fn").top == torch.finfo(torch.float8_e4m3fn).max == 448


def test_e5m2ieee_is_torch_float8_e5m2_code_for_code() -> None:
    ours, theirs = torch_codes("e5m2ieee", torch.float8_e5m2, 57344)
    assert torch.equal(ours, theirs) and ours.unique().numel() == 247
    assert grid("e5m2ieee").top == torch.finfo(torch.float8_e5m2).max == 57344


@pytest.mark.parametrize(
    ("name", "dtype", "common", "top"),
    [("e4m3", torch.float8_e4m3fn, 448, 480), ("e5m2", torch.float8_e5m2, 57344, 114688)],
)
def test_grids_without_specials_equal_torch_on_its_range_and_reach_further(name, dtype, common, top) -> None:
    ours, theirs = torch_codes(name, dtype, common)
    assert torch.equal(ours, theirs)
    assert grid(name).top == top


def test_every_finite_pattern_of_torch_float8_is_read() -> None:
    for name, dtype in (("e4m3fn", torch.float8_e4m3fn), ("e5m2ieee", torch.float8_e5m2)):
        numbers, patterns = grid(name), torch.arange(256).to(torch.uint8)
        values = patterns.view(dtype).float()
        finite = values.isfinite()
        assert torch.equal(numbers.decode(numbers.from_bits(patterns[finite])), values[finite])
        for pattern in patterns[~finite]:
            with pytest.raises(FormatError, match=f"1 of 1 values in {name}"):
                numbers.from_bits(pattern[None])


@pytest.mark.parametrize("name", [*FLOATS, *SPECIAL])
def test_from_bits_inverts_to_bits(name: str) -> None:
    numbers = grid(name)
    codes = torch.arange(numbers.size).to(torch.uint8)
    patterns = numbers.to_bits(codes)
    assert torch.equal(numbers.from_bits(patterns), codes)
    assert int(patterns.max()) < 2**numbers.bits and patterns.unique().numel() == numbers.size
    assert numbers.from_bits(torch.tensor([1 << (numbers.bits - 1)], dtype=torch.uint8)).item() == numbers.zero_code


@pytest.mark.parametrize("bits", range(3, 9))
def test_one_exponent_bit_makes_the_narrow_integers(bits: int) -> None:
    floats, integers = grid(f"e1m{bits - 2}"), grid(f"int{bits}n")
    assert torch.equal(floats.levels() / floats.levels()[floats.zero_code + 1], integers.levels())


def test_the_known_four_bit_floats() -> None:
    assert grid("e2m1").levels()[7:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP MX v1.0, table 5
    assert grid("e3m0").levels()[7:].tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert grid("e2m3").top == 7.5 and grid("e3m2").top == 28  # OCP MX v1.0, tables 3 and 4


def test_integer_grids_end_where_they_should() -> None:
    for bits in range(2, 9):
        assert grid(f"int{bits}").levels()[[0, -1]].tolist() == [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
        assert grid(f"int{bits}n").levels()[[0, -1]].tolist() == [1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1]
        assert grid(f"uint{bits}").levels()[[0, -1]].tolist() == [0, 2**bits - 1]


@given(st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda x: x != 0), min_size=1, max_size=255, unique=True))
def test_any_codebook_rounds_to_nearest(values: list[float]) -> None:
    numbers = Codebook("any", tuple(sorted([*values, 0.0])))
    x = probes(numbers)
    chosen = numbers.decode(numbers.encode(x)).double()
    distance = (x.double()[:, None] - numbers.levels().double()[None, :]).abs().amin(1)
    assert torch.equal((x.double() - chosen).abs(), distance)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntGrid(9), "2 to 8 bits"),
        (lambda: IntGrid(1), "2 to 8 bits"),
        (lambda: IntGrid(4, is_signed=False, narrow=True), "narrow"),
        (lambda: FloatGrid(5, 3), "3 to 8 bits"),
        (lambda: FloatGrid(0, 3), "exponent bit"),
        (lambda: FloatGrid(4, 3, None, "inf"), "specials is"),
        (lambda: FloatGrid(4, 3, 200), "another bias"),
        (lambda: FloatGrid(4, 3, -120), "another bias"),
        (lambda: Codebook("x", (1.0, 2.0)), "with 0 among them"),
        (lambda: Codebook("x", (0.0,)), "2 to 256"),
        (lambda: Codebook("x", (0.0, -1.0)), "sorted"),
        (lambda: Codebook("x", (0.0, 1.0, 1.0)), "without repeats"),
        (lambda: grid("int9"), "unknown grid 'int9'.*nf4"),
        (lambda: grid("e0m3"), "exponent bit"),
        (lambda: grid("uint4n"), "narrow"),
    ],
)
def test_impossible_grids_are_refused(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_a_codebook_may_come_from_a_plugin() -> None:
    ternary = Codebook("ternary", (-1.0, 0.0, 1.0))
    GRIDS.add("ternary", ternary, "test")
    try:
        assert grid("ternary") is ternary and ternary.bits == 2
    finally:
        GRIDS.drop("test")
    assert "ternary" not in GRIDS


@pytest.mark.parametrize("name", ["ue2m2", "nf4", "dyn4", "e3m2"])
def test_levels_have_values_where_models_are_made_without_any(name):
    """Checkpoints are loaded under the meta device; what is cached there serves the whole process."""
    _levels.cache_clear()
    thresholds.cache_clear()
    with torch.device("meta"):
        seen = grid(name)
        assert seen.signed == (not name.startswith("u")) and seen.levels().device.type == "cpu"
        assert thresholds(seen).device.type == "cpu"
    assert torch.equal(seen.encode(seen.levels()).int(), torch.arange(seen.size, dtype=torch.int32))
