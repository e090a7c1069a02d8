"""What lies between the products of a decoder layer: steps of the CPU library compute what torch's operators do."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.cpu.steps import Steps
from hfquant.halves import Gain
from hfquant.kernel import Bound
from hfquant.spec import TensorSpec

from .problems import DTYPES, ISAS, LIBRARY, SUMS, normal, packed, random_weight

SEEDS, ROWS, PARTS = st.integers(0, 2**31), st.sampled_from([1, 2, 5, 13]), st.integers(1, 3)
COLUMNS = st.sampled_from([1, 7, 16, 31, 32, 33, 50, 64, 2048])
HEADS, TOKENS = st.sampled_from([8, 20, 64, 80, 96, 128, 512]), st.sampled_from([1, 31, 32, 33, 100])
SHARING = st.sampled_from([1, 2, 4, 9, 16])  # more than 8 do not go at once


def run(steps: Steps, slots: list[Tensor], rows: int, positions: int = 1, tokens: int = 1) -> None:
    assert all(slot.is_contiguous() and slot.dtype == slots[0].dtype for slot in slots)
    addresses = struct.pack(f"@{len(slots)}P", *map(Tensor.data_ptr, slots))
    LIBRARY.steps(steps.table(), len(steps.fields), addresses, (rows, positions, tokens), slots[0].dtype)


def smallest(dtype: torch.dtype) -> float:
    """The step between subnormal numbers: twice what any rounding of them may change."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_bits(y: Tensor, wanted: Tensor) -> None:
    """The same bits, signs of zeros included; any NaN for a NaN."""
    bits, numbers = torch.int32 if y.dtype == torch.float32 else torch.int16, ~wanted.isnan()
    assert torch.equal(~y.isnan(), numbers)
    assert torch.equal(y[numbers].view(bits), wanted[numbers].view(bits))


def assert_rounded_twice(y: Tensor, exact: Tensor, factor: Tensor) -> None:
    """y is an exact number times a factor, rounded to its dtype before that and after it."""
    half = torch.finfo(y.dtype).eps / 2
    # Silu in float32 gives 0 where e^-x is infinite: of numbers below 2^-118.
    lost = max(smallest(y.dtype), 2.0**-118) * (factor.double().abs() + 1)
    assert ((y.double() - exact).abs() <= ((1 + half) ** 2 - 1 + SUMS) * exact.abs() + lost).all()


def assert_as_torch(y: Tensor, wanted: Tensor) -> None:
    """The same numbers up to a last place of each of two roundings, the same infinities, NaN in the same places."""
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
    found, wanted = y.double().nan_to_num(), wanted.double().nan_to_num()  # infinities are the largest numbers
    bound = (2 * torch.finfo(y.dtype).eps + SUMS) * wanted.abs() + 2 * smallest(y.dtype)
    assert ((found - wanted).abs() <= bound).all()


def norm(x: Tensor, gain: Gain, parts: int = 1) -> Tensor:
    """Of x [rows, parts * columns], which is the same in place."""
    steps, x, y = Steps(), x.clone(), torch.full_like(x, torch.nan)
    for to in (1, 0):
        steps.norm(gain, 0, to, parts)
    run(steps, [x, y], len(x))
    assert_bits(x, y)
    return y


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=30, deadline=None)
@given(columns=COLUMNS, rows=ROWS, parts=PARTS, size=st.sampled_from([1e-3, 1.0, 30.0]), seed=SEEDS)
def test_norm_is_its_formula(name: str, columns: int, rows: int, parts: int, size: float, seed: int) -> None:
    for dtype in DTYPES:
        x = (normal(rows, parts, columns, seed=seed) * size).to(dtype)
        gain = Gain(normal(columns, seed=seed + 1).to(dtype), 1e-6)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + gain.eps).sqrt() * gain.weight.double()
        with LIBRARY.using(name):
            y = norm(x.reshape(rows, -1), gain, parts)
        assert_rounded_twice(y.view_as(x), exact, gain.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_norm_of_unusual_numbers(isa: str, columns: int, dtype: torch.dtype) -> None:
    """Zeros, subnormal numbers, those whose squares are no float32, infinities and NaN: as models compute it."""
    x, tiny, most = normal(300, columns).to(dtype), smallest(dtype), torch.finfo(dtype).max
    x[0], x[1], x[2], x[3], x[4, 0] = 0.0, tiny, 3 * tiny, most, -most
    x[5, 0], x[6, -1], x[7, 0], x[8, 0] = torch.nan, torch.inf, -torch.inf, tiny
    for gain in (Gain(normal(columns, seed=1).to(dtype), eps) for eps in (1e-6, 0.0)):
        factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + gain.eps)
        y, wanted = norm(x, gain), gain.weight * (x.float() * factor).to(dtype)
        assert_as_torch(y, wanted)
        same = (y == wanted)[9:].double().mean()
        assert dtype == torch.float32 or same > 0.98  # the order of a sum hardly ever changes what 16 bits are


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=30, deadline=None)
@given(half=st.sampled_from([1, 3, 10, 32, 40, 64, 256]), rows=ROWS, parts=PARTS, every=ROWS, seed=SEEDS)
def test_rotary_positions_are_those_of_torch(
    name: str, half: int, rows: int, parts: int, every: int, seed: int
) -> None:
    """In place, with as many positions as rows or fewer."""
    positions, steps = min(every, rows), Steps()
    steps.rope(0, 1, 2, 2 * half, parts)
    angle = normal(positions, 1, 2 * half, seed=seed + 1) * 9
    for dtype in DTYPES:
        x, cos, sin = normal(rows, parts, 2 * half, seed=seed).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)
        at = torch.arange(rows) % positions
        wanted = x * cos[at] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[at]
        with LIBRARY.using(name):
            run(steps, [x, cos, sin], rows, positions)
        if dtype == torch.float32:  # a product that goes into a sum may not be rounded
            assert (x - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        else:
            assert_bits(x, wanted)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=30, deadline=None)
@given(columns=COLUMNS, rows=ROWS, size=st.sampled_from([1e-3, 1.0, 20.0]), seed=SEEDS)
def test_gates_and_sums(name: str, columns: int, rows: int, size: float, seed: int) -> None:
    """A gate is silu(x) * other in the place of x; a sum is that of torch, in a place of its own, of x or of other."""
    gate, add = Steps(), Steps()
    gate.gate(0, 1, columns)
    for x, y in ((0, 2), (0, 0), (2, 1)):
        add.add(x, 1, y, columns)
    for dtype in DTYPES:
        a, b = (normal(rows, columns, seed=seed) * size).to(dtype), normal(rows, columns, seed=seed + 1).to(dtype)
        gated, x, other, y = a.clone(), a.clone(), b.clone(), torch.full_like(a, torch.nan)
        with LIBRARY.using(name):
            run(gate, [gated, b], rows)
            run(add, [x, other, y], rows)
        assert_rounded_twice(gated, silu(a.double()) * b.double(), b)
        assert_bits(torch.cat((y, x, other)), torch.cat((a + b, a + b, a + b + b)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_sums_of_all_numbers(isa: str, dtype: torch.dtype) -> None:
    """Every number of 16 bits, and as many others: subnormal, infinite and NaN ones, too large or too small for e^x."""
    steps, generator = Steps(), torch.Generator().manual_seed(0)
    steps.gate(0, 1, 256)
    steps.add(2, 1, 2, 256)
    words = torch.arange(2**16, dtype=torch.int32)
    rest = torch.randint(2**16, words.shape, generator=generator, dtype=torch.int32)
    a = (words << 16 | rest).view(dtype) if dtype == torch.float32 else words.to(torch.int16).view(dtype)
    for b in (torch.ones_like(a), a[torch.randperm(len(a), generator=generator)]):
        gated, added = a.clone(), a.clone()
        run(steps, [gated, b, added], 256)
        assert_as_torch(gated, silu(a) * b)
        assert_bits(added, a + b)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of q [rows, parts, n] to k, v [rows, heads, tokens, n], which is the same in the place of q."""
    (rows, parts, n), steps, q, y = q.shape, Steps(), q.clone(), torch.full_like(q, torch.nan)
    for to in (3, 0):
        steps.attend(0, 1, 2, to, n, parts, parts // k.shape[1], scale)
    run(steps, [q, k, v, y], rows, tokens=k.shape[2])
    assert_bits(q, y)
    return y


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=25, deadline=None)
@given(n=HEADS, tokens=TOKENS, sharing=SHARING, heads=st.integers(1, 2), rows=st.integers(1, 2), seed=SEEDS)
@example(n=512, tokens=100, sharing=16, heads=2, rows=2, seed=0)
@example(n=20, tokens=33, sharing=9, heads=2, rows=2, seed=0)
def test_attention(name: str, n: int, tokens: int, sharing: int, heads: int, rows: int, seed: int) -> None:
    for dtype in DTYPES:
        q = normal(rows, heads * sharing, n, seed=seed).to(dtype)
        k, v = normal(2, rows, heads, tokens, n, seed=seed + 1).to(dtype)
        many = (x.double().repeat_interleave(sharing, 1) for x in (k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(q.double().unsqueeze(2), *many, scale=n**-0.5)
        with LIBRARY.using(name):
            y = attend(q, k, v, n**-0.5).unsqueeze(2)
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * SUMS * v.double().abs().max() + smallest(dtype)
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33, 100])
def test_attention_with_scores_that_are_large_or_equal(isa: str, tokens: int, dtype: torch.dtype) -> None:
    v = normal(1, 1, tokens, 20, seed=1).to(dtype)
    spread = torch.linspace(-1, 1, tokens)[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))]
    for shift in (0, 2, -2):  # scores of both signs, and of one
        k = (spread + shift).to(dtype).view(1, 1, tokens, 1).repeat(1, 1, 1, 20)
        y = attend(torch.ones(1, 3, 20, dtype=dtype), k, v, 1e4 / 20)
        assert torch.equal(y, v[:, :, spread.argmax()].expand_as(y))  # e^-100 of the others is nothing
    y, equal = attend(torch.zeros(1, 3, 20, dtype=dtype), k, v, 1.0).double(), v.double().mean(2)
    assert torch.allclose(y, equal.expand_as(y), rtol=torch.finfo(dtype).eps, atol=SUMS)


def test_attention_shows_what_is_not_a_number(isa: str) -> None:
    """To the queries that share it, and to no others."""
    for at, token in ((0, 0), (0, 32), (1, 7)):
        q, pair = normal(2, 18, 20), normal(2, 2, 2, 33, 20, seed=1)
        pair[at, 1, 0, token] = torch.nan
        y = attend(q, *pair, 0.2)
        assert y[1, :9].isnan().all() and y[0].isfinite().all() and y[1, 9:].isfinite().all()


def test_attention_leaves_out_what_is_infinitely_far(isa: str) -> None:
    """As a mask would: the first tokens alone, and all of them, which leaves nothing."""
    k, v = torch.zeros(1, 1, 70, 8), normal(1, 1, 70, 8)
    for count in (32, 33, 69):
        far = k.clone()
        far[:, :, :count] = -torch.inf
        y = attend(torch.ones(1, 2, 8), far, v, 1.0)
        assert torch.allclose(y, v[:, :, count:].mean(2).expand_as(y), atol=SUMS)
    assert attend(torch.ones(1, 2, 8), torch.full_like(k, -torch.inf), v, 1.0).isnan().all()


def bound_weight(n: int, k: int, seed: int) -> tuple[Bound, list[Tensor]]:
    tensors, spec = packed(random_weight((n, k), TensorSpec("int4", Blocks(1, 32)), seed), "dense")
    return cpu.bind(tensors, spec), tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_have_the_bits_of_single_calls(isa: str, rows: int, dtype: torch.dtype) -> None:
    """Those that follow a norm: three, and more than are handed over at once."""
    x, gain = normal(rows, 160).to(dtype), Gain(normal(160, seed=1).to(dtype), 1e-6)
    for sizes in ((20, 300, 37), range(16, 26)):
        weights, steps = [bound_weight(n, 160, n) for n in sizes], Steps()
        biases = [normal(n).to(dtype) if n % 2 else None for n in sizes]
        steps.norm(gain, 0, 1)
        for slot, ((bound, _), bias) in enumerate(zip(weights, biases, strict=True), 2):
            steps.product(bound, bias, 1, slot)
        ys = [torch.full((rows, n), torch.nan, dtype=dtype) for n in sizes]
        run(steps, [x, x.clone(), *ys], rows)
        for y, (bound, held), bias in zip(ys, weights, biases, strict=True):
            assert torch.equal(y, bound(norm(x, gain), held, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_results_do_not_depend_on_threads(isa: str, rows: int, dtype: torch.dtype) -> None:
    """All steps one after the other, with as many numbers as make threads worth it, and few."""
    (bound, held), steps, before, found = bound_weight(512, 512, 0), Steps(), torch.get_num_threads(), []
    x, gain, angle = normal(rows, 512).to(dtype), normal(512, seed=1).to(dtype), normal(rows, 64)
    given = [part.to(dtype) for part in (*normal(2, rows, 2, 40, 64, seed=2), angle.cos(), angle.sin())]
    steps.norm(Gain(gain, 1e-6), 0, 5)
    for slot in (6, 7):
        steps.product(bound, None, 5, slot)
    steps.rope(6, 3, 4, 64, 8)
    steps.attend(6, 1, 2, 5, 64, 8, 4, 0.1)
    steps.gate(7, 5, 512)
    steps.add(0, 7, 7, 512)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made = [torch.full_like(x, torch.nan) for _ in range(3)]
            run(steps, [x, *given, *made], rows, rows, 40)
            found.append(torch.cat(made))
    finally:
        torch.set_num_threads(before)
    assert held and found[0].isfinite().all() and all(torch.equal(found[0], other) for other in found[1:])
