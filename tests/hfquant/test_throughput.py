"""The probe sees which recipe is slower and in what, and takes about a second."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import pytest
import torch

from hfquant import HfQuantConfig
from hfquant.backend import Backend, register, unregister
from hfquant.blocks import Blocks
from hfquant.input_ranges import InputChoice
from hfquant.recipe import Step
from hfquant.rounders import nearest
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.throughput import measure

RECIPE = HfQuantConfig("int4").recipe
COLUMN, ELEMENT = 4e-5, 4e-7  # seconds


def slow(w, spec, find, stats, column=0.0, element=0.0):
    """Nearest rounding that takes its time, as the clock of the probe counts it."""
    end = time.process_time() + w.shape[1] * column + w.numel() * element
    q = nearest(w, spec, find, stats)
    while time.process_time() < end:
        pass
    return q


@pytest.fixture
def rounder():
    backend = Backend("slow", rounders={"slow": slow})
    register(backend, "test")
    yield lambda **options: replace(RECIPE, rounder=Step("slow", options))
    unregister(backend, "test")


@pytest.fixture(autouse=True)
def one_thread():
    """So that the probe counts time of the CPU, to which other processes add nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_everything_is_measured_and_in_a_short_time():
    before = time.process_time()
    rates = asdict(measure(RECIPE, torch.bfloat16, 256))
    assert time.process_time() - before < 4
    column, element, seen = rates.pop("column"), rates.pop("element"), rates.pop("seen")
    assert all(1e6 < rate < 1e16 for rate in rates.values())
    assert 0 <= column < COLUMN and 0 < element < ELEMENT and seen == 0


@pytest.mark.parametrize("spent", [(COLUMN, 0.0), (0.0, ELEMENT), (COLUMN, ELEMENT)])
def test_time_spent_on_columns_and_time_spent_on_weights_are_told_apart(rounder, spent):
    column, element = spent
    found = measure(rounder(column=column, element=element), torch.float32, 64)
    assert found.column == pytest.approx(column, rel=0.25, abs=COLUMN / 4)
    assert found.element == pytest.approx(element, rel=0.25, abs=ELEMENT / 4)


def looking(seen, given):
    """Finds nothing about an input, and takes its time for each weight that reads it."""
    end = time.process_time() + sum(w.numel() for w in seen.weights) * ELEMENT
    while time.process_time() < end:
        pass
    return InputChoice(given.tensor)


vars(looking).update(searches_dynamic=True, rounds=lambda options: 2)


def test_time_spent_on_inputs_is_told_apart_too():
    backend = Backend("looks", input_ranges={"looking": looking})
    register(backend, "test")
    try:
        scheme = Scheme(RECIPE.scheme.weight, InputSpec(TensorSpec("int8", Blocks(1, -1))))
        found = measure(replace(RECIPE, scheme=scheme, input_range=Step("looking")), torch.float32, 64)
    finally:
        unregister(backend, "test")
    assert found.seen == pytest.approx(ELEMENT, rel=0.25) and found.element < ELEMENT / 4
