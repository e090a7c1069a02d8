"""Several products in one call have the bits that each has alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.cpu.jobs import Direct, run_jobs
from hfquant.kernel import Bound
from hfquant.spec import TensorSpec

from .problems import DTYPES, LIBRARY, int_problems, packed, problems, random_weight


@st.composite
def several(draw: st.DrawFn) -> list[tuple]:
    """Up to four layers, each with a bound weight, an input of its own, a bias, all of one dtype."""
    rows = st.just(1) if draw(st.booleans()) else st.sampled_from([1, 2, 7])
    dtype, found = draw(st.sampled_from(DTYPES)), []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            q, layout, x, bias = draw(problems(rows, [dtype]))
            tensors, spec = packed(q, layout)
        else:
            q, layout, input, inputs, x, bias = draw(int_problems(rows))
            tensors, spec = packed(q, layout, input, inputs)
        bound = cpu.bind(tensors, spec)
        if isinstance(bound, Direct):  # others need their input in another form
            found.append((bound, tensors, x.to(dtype), bias))
    assume(found)
    return found


@pytest.mark.parametrize("name", LIBRARY.isas())
@settings(max_examples=40, deadline=None)
@given(layers=several())
def test_jobs_have_the_bits_of_single_calls(name: str, layers: list[tuple]) -> None:
    bounds, _held, xs, biases = zip(*layers, strict=True)
    before = torch.get_num_threads()
    with LIBRARY.using(name):
        alone = [bound(x, held, bias) for bound, held, x, bias in layers]
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                ys = [torch.full_like(y, float("nan")) for y in alone]
                assert run_jobs(bounds, xs, biases, ys)
                assert all(torch.equal(y, other) for y, other in zip(ys, alone, strict=True)), threads
        finally:
            torch.set_num_threads(before)


def layer(order: Tensor | None = None) -> tuple[Bound, list[Tensor]]:
    q = random_weight((20, 64), TensorSpec("int4", Blocks(1, 32)), 0)
    tensors, spec = packed(replace(q, order=order), "dense")
    return cpu.bind(tensors, spec), tensors


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    bound, held = layer()
    x, y = torch.ones(1, 64), torch.zeros(1, 20)
    for given_x, bias, to in ((torch.ones(1, 63), None, y), (x, torch.ones(19), y), (x, None, torch.zeros(1, 21))):
        with pytest.raises(RuntimeError, match="a weight of 20 x 64 cannot take"):
            run_jobs([bound, bound], [x, given_x], [None, bias], [y, to])
    assert not y.any() and held
    assert run_jobs([], [], [], [])


def test_a_weight_that_needs_another_input_is_left_to_its_own_call() -> None:
    (bound, held), (reordered, other) = layer(), layer(torch.arange(64).flip(0).int())
    x, ys = torch.ones(1, 64), [torch.zeros(1, 20), torch.zeros(1, 20)]
    assert not run_jobs([bound, reordered], [x, x], [None, None], ys)
    assert not any(y.any() for y in ys) and held and other
