"""FPQ's search: formats, candidates, and losses that are what they say."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hfquant import ops
from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.grids import IntGrid, grid
from hfquant.input_ranges import input_params
from hfquant.kernel import use_kernel
from hfquant.quantize import pack, quantize_linear
from hfquant.ranges import absmax
from hfquant.recipe import Recipe
from hfquant.rounders import to_nearest
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.stats import DRIFT, HESSIAN, InputStats, Stats
from hfquant_fpq.loss import OutputError
from hfquant_fpq.space import Space, bias, float_grid, formats, usual
from hfquant_fpq.weights import fpq

N, K, T = 24, 48, 200
CHANNEL = TensorSpec("e2m1", Blocks(1, -1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose channels know of each other and differ in size."""
    mix = normal(width, width, seed=seed + 1)
    return normal(tokens, width, seed=seed) @ mix * normal(width, seed=seed + 2).exp()


def seen(x: Tensor, original: Tensor | None = None) -> Stats:
    needs = {HESSIAN} if original is None else {HESSIAN, DRIFT}
    stats = InputStats(x.shape[1], frozenset(needs))
    stats.add(x, original)
    return Stats("layer", inputs=stats)


def loss(w: Tensor, q: Tensor, x: Tensor, original: Tensor | None = None) -> float:
    """The mean squared error of the outputs, by the definition."""
    exact = (x if original is None else original).double() @ w.double().T
    return float((x.double() @ q.double().T - exact).square().sum() / len(x))


def rounded(w: Tensor, params: Any) -> Tensor:
    return to_nearest(w, params).dequantize()


# ---- formats


@pytest.mark.parametrize(
    ("bits", "names"),
    [(4, "e1m2 e2m1 e3m0"), (6, "e1m4 e2m3 e3m2 e4m1 e5m0"), (8, "e1m6 e2m5 e3m4 e4m3 e5m2"), (3, "e1m1 e2m0")],
)
def test_the_formats_of_a_width_are_those_of_the_paper(bits: int, names: str) -> None:
    assert " ".join(formats(bits)) == names
    assert usual(bits) in formats(bits) and all(grid(name).bits == bits for name in formats(bits))


def test_e4m3_is_torchs_on_its_range_and_reaches_480() -> None:
    numbers = grid("e4m3")
    assert numbers.top == 480
    x = torch.linspace(-448, 448, 100_001)
    assert torch.equal(numbers.decode(numbers.encode(x)), x.to(torch.float8_e4m3fn).float())


def test_e5m2_is_torchs_on_its_range_and_reaches_114688() -> None:
    numbers = grid("e5m2")
    assert numbers.top == 114688
    x = torch.cat([torch.linspace(-57344, 57344, 50_001), torch.linspace(-1e-3, 1e-3, 50_001)])
    assert torch.equal(numbers.decode(numbers.encode(x)), x.to(torch.float8_e5m2).float())


@pytest.mark.parametrize("bits", range(3, 9))
def test_one_exponent_bit_gives_narrow_integers(bits: int) -> None:
    levels, integers = grid(formats(bits)[0]).levels(), IntGrid(bits, narrow=True).levels()
    assert torch.equal(levels / levels[-1] * integers[-1], integers)


@pytest.mark.parametrize("name", [*formats(4), *formats(6), *formats(8)])
@given(peak=st.floats(1e-6, 1e6))
def test_the_bias_of_equation_7_gives_the_largest_number_of_equation_6(name: str, peak: float) -> None:
    numbers = float_grid(name)
    b = float(bias(torch.tensor(peak, dtype=torch.float64), numbers))
    assert 2.0**-b * (2 - 2.0**-numbers.m) * 2.0 ** (2**numbers.e - 1) == pytest.approx(peak)


def definition(x: Tensor, name: str, high: float, b: float | None = None) -> Tensor:
    """Equations 8 and 9 of LLM-FP4, with rounding to nearest in the place of the printed floor; `b`: the exact bias."""
    numbers = float_grid(name)
    b = float(bias(torch.tensor(high, dtype=torch.float64), numbers)) if b is None else b
    clipped = x.double().clamp(-high, high)
    level = (clipped.abs().clamp_min(1e-300).log2() + b).floor().clamp_min(1)
    step = torch.exp2(level - numbers.m - b)
    return (clipped / step).round() * step


@pytest.mark.parametrize("name", [*formats(4), *formats(6), *formats(8)])
def test_grids_are_the_equations_of_the_paper(name: str) -> None:
    high, spec = 3.7, TensorSpec(name, Blocks(-1, -1))
    x = torch.cat([normal(2, 5000), torch.tensor([[high], [-high]])], dim=1).clamp(-high, high)
    torch.testing.assert_close(
        rounded(x, absmax(x, spec, Stats())).double(), definition(x, name, high), rtol=1e-5, atol=0
    )


# ---- candidates


@pytest.mark.parametrize("mode", ["joint", "minmax"])
def test_no_clipping_is_the_first_candidate(mode: str) -> None:
    peak = torch.tensor([1.0, 3.0])
    assert torch.equal(next(Space(("e2m1",), mode).exponents(peak, "e2m1")), torch.zeros(2))


def test_candidates_are_spaced_evenly_in_octaves() -> None:
    found = sorted(float(value) for value in Space(("e2m1",)).exponents(torch.tensor(5.0), "e2m1"))
    assert found == [step / 8 for step in range(-24, 5)]
    assert list(Space(("e2m1",)).finer()) == [1 / 16, 1 / 32]
    assert list(Space(("e2m1",), steps=8).finer()) == list(Space(("e2m1",), "paper").finer()) == []


def test_the_candidates_of_the_paper_multiply_the_bias() -> None:
    peak, numbers = torch.tensor(0.05, dtype=torch.float64), float_grid("e2m1")
    found = [float(exponent) for exponent in Space(("e2m1",), "paper").exponents(peak, "e2m1")]
    unclipped = float(bias(peak, numbers))
    assert len(found) == 100
    for index, exponent in enumerate(found):
        gamma = 0.01 + index * 1.19 / 100
        assert float(bias(peak * 2**exponent, numbers)) == pytest.approx(gamma * unclipped)
    assert 0.0 not in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "best"}, "'joint', 'paper', 'minmax'"),
        ({"steps": 0}, "at least 1"),
        ({"lowest": 1.0}, "no clipping"),
        ({"names": ()}, "at least one format"),
        ({"names": ("int4",)}, "named like 'e2m1'"),
        ({"names": ("e4m3fn",)}, "without suffix"),
    ],
)
def test_a_space_without_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Space(**{"names": ("e2m1",), **options})


# ---- losses


@given(seed=st.integers(0, 1000), quantized=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_loss_is_the_error_of_the_outputs_up_to_a_constant(seed: int, quantized: bool) -> None:
    w, x = normal(N, K, seed=seed), correlated(T, K, seed=seed)
    z = x + 0.1 * normal(T, K, seed=seed + 9) if quantized else x
    error = OutputError(w, seen(z, x if quantized else None).inputs)
    one, other = w + 0.1 * normal(N, K, seed=seed + 3), w + 0.05 * normal(N, K, seed=seed + 4)
    by_definition = loss(w, one, z, x) - loss(w, other, z, x)
    found = float((error.exact(one - w) - error.exact(other - w)).double().sum())
    assert found == pytest.approx(by_definition, rel=1e-3, abs=1e-4 * loss(w, one, z, x))


def test_the_sketch_of_a_wide_layer_is_exact_for_few_directions() -> None:
    w, x = normal(4, 1100), correlated(40, 1100)  # 40 tokens span less than the sketch keeps
    error, d = OutputError(w, seen(x).inputs), 0.1 * normal(4, 1100, seed=5)
    torch.testing.assert_close(error.rough(d), error.exact(d), rtol=1e-3, atol=0)


def test_the_sketch_has_the_exact_diagonal_and_stands_for_the_rest() -> None:
    w, x = normal(64, 1100), correlated(3000, 1100)
    error = OutputError(w, seen(x).inputs)
    assert error.sketch is not None and error.gram is not None
    made = error.sketch.leading @ error.sketch.leading.T + torch.diag(error.sketch.rest)
    torch.testing.assert_close(made.diagonal(), error.gram.diagonal(), rtol=1e-3, atol=0)
    assert (made - error.gram).norm() < (torch.diag(error.gram.diagonal()) - error.gram).norm()
    rounding = rounded(w, absmax(w, CHANNEL, Stats())) - w
    torch.testing.assert_close(error.rough(rounding).sum(), error.exact(rounding).sum(), rtol=0.05, atol=0)


# ---- the search


@given(seed=st.integers(0, 1000), group=st.sampled_from([-1, 16]), quantized=st.booleans())
@settings(max_examples=15, deadline=None)
def test_what_is_chosen_is_never_worse_than_no_clipping_in_the_usual_format(
    seed: int, group: int, quantized: bool
) -> None:
    w, x = normal(N, K, seed=seed), correlated(T, K, seed=seed)
    spec = TensorSpec("e2m1", Blocks(1, group))
    plain = loss(w, rounded(w, absmax(w, spec, Stats())), x)
    chosen = loss(w, rounded(w, fpq(w, spec, seen(x))), x)
    # With groups each is searched as if the others were exact: what they do together may differ a little.
    assert chosen <= plain * (1 + 1e-5) if group == -1 else chosen <= 1.1 * plain


@given(seed=st.integers(0, 1000), bits=st.sampled_from([4, 6]))
@settings(max_examples=10, deadline=None)
def test_a_larger_space_is_never_worse(seed: int, bits: int) -> None:
    w, x = normal(N, K, seed=seed), correlated(T, K, seed=seed)
    spec, stats = TensorSpec(usual(bits), Blocks(1, -1)), seen(x)

    def best(**options: Any) -> float:
        return loss(w, rounded(w, fpq(w, spec, stats, **options)), x)

    names = list(formats(bits))
    by_formats = [best(names=names[: count + 1]) for count in range(len(names))]
    by_steps = [best(steps=steps) for steps in (1, 2, 4, 8, 16, 32)]
    by_width = [best(lowest=lowest) for lowest in (-0.5, -1.0, -2.0)]
    for losses in (by_formats, by_steps, by_width):
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(losses))


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_each_channel_has_the_best_candidate_of_all(seed: int) -> None:
    """Brute force, by the definition."""
    w, x = normal(3, 8, seed=seed), correlated(50, 8, seed=seed)
    params = fpq(w, TensorSpec("e2m1", Blocks(1, -1)), seen(x))
    found = rounded(w, params)
    for name in formats(4):
        for exponent in [step / 8 for step in range(-24, 5)]:
            high = w.abs().amax(1, keepdim=True) * 2**exponent
            other = torch.stack([definition(row, name, float(top)) for row, top in zip(w, high, strict=True)]).float()
            for row in range(3):
                if name == params.spec.grid:
                    mine = loss(w[row : row + 1], found[row : row + 1], x)
                    assert mine <= loss(w[row : row + 1], other[row : row + 1], x) * (1 + 1e-4)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("e2m1", lambda x: x),
        ("e1m2", lambda x: torch.special.ndtr(x) * 2 - 1),
        ("e3m0", lambda x: x.sign() * (2.5 * normal(*x.shape, seed=7)).exp()),
    ],
    ids=["normal", "uniform", "log-normal"],
)
def test_the_format_suits_the_distribution(name: str, draw: Any) -> None:
    w = draw(normal(64, 512, seed=3))
    assert fpq(w, CHANNEL, Stats()).spec.grid == name


def test_an_empty_row_stays_empty() -> None:
    w = normal(N, K)
    w[3] = 0
    params = fpq(w, CHANNEL, seen(correlated(T, K)))
    q = rounded(w, params)
    assert (q[3] == 0).all() and q.isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, -1])
def test_blocks_of_any_height_are_searched(rows: int) -> None:
    w, x = normal(N, K), correlated(T, K)
    spec = TensorSpec("e2m1", Blocks(rows, -1))
    params = fpq(w, spec, seen(x))
    assert params.scale.shape == spec.blocks.counts((N, K))
    assert loss(w, rounded(w, params), x) <= loss(w, rounded(w, absmax(w, spec, Stats())), x) * (1 + 1e-5)


@pytest.mark.parametrize(("rows", "group"), [(1, -1), (3, -1), (1, 1200)])
def test_wide_layers_are_never_worse_than_no_clipping_in_the_usual_format(rows: int, group: int) -> None:
    w, x = normal(8, 1500), correlated(300, 1500)
    spec = TensorSpec("e2m1", Blocks(rows, group))
    plain = loss(w, rounded(w, absmax(w, spec, Stats())), x)
    chosen = loss(w, rounded(w, fpq(w, spec, seen(x))), x)
    assert chosen <= plain * (1 + 1e-5) and math.isfinite(chosen)


def test_wide_layers_find_nearly_what_an_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = normal(16, 1300), correlated(2000, 1300)
    sketched = loss(w, rounded(w, fpq(w, CHANNEL, seen(x))), x)
    monkeypatch.setattr("hfquant_fpq.loss._SMALL", 2000)
    assert sketched <= 1.02 * loss(w, rounded(w, fpq(w, CHANNEL, seen(x))), x)


# ---- the op


@pytest.mark.parametrize("name", [*formats(4), *formats(6), *formats(8)])
@given(seed=st.integers(0, 1000), octave=st.integers(-4, 4))
@settings(max_examples=10, deadline=None)
def test_the_op_quantizes_its_input_bit_for_bit_as_defined(name: str, seed: int, octave: int) -> None:
    high, b = float_grid(name).top * 2.0**octave, float_grid(name).exponent_bias - octave  # no rounding in either
    tensor = TensorSpec(name, Blocks(-1, -1))
    recipe = Recipe(Scheme(CHANNEL, InputSpec(tensor, dynamic=False)))
    w, x = normal(N, K, seed=seed), normal(T, K, seed=seed + 1) * high / 3
    x[0] = definition(x, name, high, b)[0].float() * 1.25  # ties among them
    packed, spec = pack(quantize_linear(w, recipe), recipe, input_params(-high, high, tensor))
    values = list(packed.values())
    expected = F.linear(definition(x, name, high, b).float(), ops.dequantize(values, spec.key(), torch.float32))
    with use_kernel("reference"):  # what it must give; kernels may add up in another order
        assert torch.equal(ops.linear(x, values, None, spec.key()), expected)
