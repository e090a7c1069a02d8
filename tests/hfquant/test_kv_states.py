"""Tokens of a cache: each block is quantized once, by itself, and nothing that is there ever changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.kv_states import States, check_states
from hfquant.ranges import absmax
from hfquant.rounders import to_nearest
from hfquant.spec import TensorSpec
from hfquant.stats import Stats

GRIDS = ("uint2", "uint3", "uint4", "uint8", "int2", "int4n", "int8", "e4m3", "e2m1", "nf4")
BLOCKS = (Blocks(4, 1), Blocks(8, 1), Blocks(1, 8), Blocks(1, -1), Blocks(2, 5))
Problem = tuple[States, Tensor]


@st.composite
def problems(draw: st.DrawFn, least: int = 0) -> Problem:
    """Empty states for any numbers, and tokens for them."""
    grid = draw(st.sampled_from(GRIDS))
    scale = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    spec = TensorSpec(grid, draw(st.sampled_from(BLOCKS)), grid.startswith("uint"), scale)
    step, residual = spec.blocks.rows * draw(st.integers(1, 2)), draw(st.integers(0, 12))
    shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(least, 40)),
        draw(st.sampled_from([8, 13])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = (torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape[3], generator=generator))).to(dtype)
    return States(check_states(spec, "keys"), residual, step, x[:, :, :0]), x


def filled(states: States, x: Tensor, cuts: list[int]) -> States:
    """With tokens that come in several calls."""
    for part in x.tensor_split(sorted(min(cut, x.shape[2]) for cut in cuts), 2):
        states = states.then(part).settled()
    return states


def seen(states: States, x: Tensor) -> Tensor:
    """What all tokens should be read as: blocks of each head of each sequence quantized apart from all others."""
    assert states.spec is not None
    old = max(0, x.shape[2] - states.residual) // states.step * states.step
    out = x.clone()
    for head in [head for sequence in out for head in sequence]:
        for block in head[:old].split(states.spec.blocks.rows) if old else ():
            block.copy_(to_nearest(block, absmax(block, states.spec, Stats("block"))).dequantize(x.dtype))
    return out


@given(problems(), st.lists(st.integers(0, 40), max_size=6))
def test_blocks_are_quantized_one_by_one_however_tokens_come(problem: Problem, cuts: list[int]) -> None:
    empty, x = problem
    states = filled(empty, x, cuts)
    assert torch.equal(states.read(), seen(empty, x)) and states.tokens == x.shape[2]
    tail = states.tail.shape[2]
    assert min(x.shape[2], empty.residual) <= tail < empty.residual + empty.step
    assert torch.equal(states.tail, x[:, :, x.shape[2] - tail :])


@given(problems(), st.lists(st.integers(0, 40), max_size=6))
def test_codes_that_are_there_never_change(problem: Problem, cuts: list[int]) -> None:
    states, x = problem
    for part in x.tensor_split(sorted(min(cut, x.shape[2]) for cut in cuts), 2):
        later = states.then(part).settled()
        if states.packed is not None:
            assert later.packed is not None
            for name, before in states.packed.tensors.items():
                assert torch.equal(later.packed.tensors[name][:, :, : before.shape[2]], before)
        states = later


@pytest.mark.parametrize(("tokens", "old"), [(7, 0), (8, 0), (9, 0), (11, 0), (12, 4), (13, 4), (16, 8), (40, 32)])
def test_what_is_quantized_at_the_edge_of_the_window(tokens: int, old: int) -> None:
    """The newest 8 tokens never, 4 at a time, whether they come at once or one by one."""
    x = torch.randn(1, 1, tokens, 8)
    empty = States(TensorSpec("uint4", Blocks(4, 1), True, "float16"), 8, 4, x[:, :, :0])
    for cuts in ([], list(range(tokens))):
        states = filled(empty, x, cuts)
        assert states.tail.shape[2] == tokens - old
        assert (0 if states.packed is None else states.packed.tokens) == old


@given(problems(least=1), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_sequences_are_chosen_as_if_they_had_been_from_the_start(problem: Problem, chosen: list[int]) -> None:
    empty, x = problem
    index = torch.tensor([number % x.shape[0] for number in chosen])
    states = filled(empty, x, []).map(lambda value: value[index])
    expected = filled(empty, x[index], [])
    assert torch.equal(states.read(), expected.read()) and states.nbytes == expected.nbytes


@given(problems(least=1), st.integers(0, 50))
def test_without_the_newest_tokens_the_others_are_what_they_were(problem: Problem, less: int) -> None:
    """Then it goes on: what comes is behind them, and whole blocks keep their codes."""
    empty, x = problem
    states, keep = filled(empty, x, []), max(0, x.shape[2] - less)
    cut = states.without(less)
    assert torch.equal(cut.read(), states.read()[:, :, :keep]) and cut.tokens == keep
    assert cut.packed is None or cut.packed.tokens % empty.step == 0
    more = cut.then(x).settled()
    assert more.tokens == keep + x.shape[2]
    newest = min(empty.residual, x.shape[2])
    assert torch.equal(more.read()[:, :, more.tokens - newest :], x[:, :, x.shape[2] - newest :])
    if cut.packed is not None:
        assert torch.equal(more.read()[:, :, : cut.packed.tokens], states.read()[:, :, : cut.packed.tokens])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", ["uint4", "int8", "nf4", "e4m3"])
def test_a_block_with_a_value_that_is_not_finite_is_nan_and_no_other(grid: str, bad: float) -> None:
    x = torch.randn(1, 2, 8, 8)
    x[0, 1, 5, 3] = bad
    spec = TensorSpec(grid, Blocks(4, 1), grid.startswith("uint"), "float16")
    found = States(spec, 0, 4, x[:, :, :0]).then(x).settled().read()
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 1, 4:, 3] = True
    assert torch.equal(found.isnan(), expected)


def test_memory_is_codes_scales_and_zero_points_as_the_formula_says() -> None:
    """Per channel of 32 tokens: 32 codes of 4 bits, a scale of 16 and a zero point of 4 bits; no copy of the text."""
    x = torch.randn(2, 3, 160, 64, dtype=torch.bfloat16)
    states = States(TensorSpec("uint4", Blocks(32, 1), True, "float16"), 32, 32, x[:, :, :0]).then(x).settled()
    channels = 2 * 3 * 64
    assert states.nbytes == channels * (128 * 4 + 4 * (16 + 4)) // 8 + channels * 32 * 2
    assert states.tail.untyped_storage().nbytes() == states.tail.nbytes


REFUSED = {
    "fitted": (TensorSpec("quantile4", Blocks(32, 1)), "fitted"),
    "no sign": (TensorSpec("uint4", Blocks(32, 1)), "zero=True"),
    "nested scales": (TensorSpec("int4", Blocks(32, 1), scale=TensorSpec("uint8", Blocks(1, 64))), "not quantized"),
    "all tokens": (TensorSpec("int4", Blocks(-1, 1)), "number of tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_a_cache_cannot_have_are_refused(name: str) -> None:
    spec, what = REFUSED[name]
    with pytest.raises(SpecError, match=what):
        check_states(spec, "keys")
