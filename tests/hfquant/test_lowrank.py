"""Low-rank corrections are the best of their rank in the norm that the inputs give, and alternation never loses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfquant import lowrank
from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.lowrank import alternate, best_factors, weighted_norm
from hfquant.presets import BUILTIN
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import Scheme, TensorSpec

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, features: int, tokens: int, spread: float = 0.0) -> Tensor:
    """X^T X / T of random inputs whose channels differ by up to 10^spread."""
    x = drawn(seed, tokens, features) * torch.logspace(0, spread, features, dtype=torch.float64)
    return x.T @ x / tokens


def root(h: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(h)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def smallest_error(e: Tensor, rank: int, h: Tensor) -> float:
    """What Eckart and Young say: the singular values that a matrix of this rank must leave."""
    return float(torch.linalg.svdvals(e @ root(h))[rank:].square().sum().sqrt())


def error(e: Tensor, made: lowrank.Factors, h: Tensor) -> float:
    return float(((e - made.b.double() @ made.a.double()) @ root(h)).norm())


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 14), st.integers(1, 30), st.integers(0, 5), st.integers(0, 999))
def test_the_error_is_the_smallest_that_the_rank_allows(shape, rank, tokens, spread, seed):
    """Whether or not there are fewer tokens than columns, and however much their sizes differ."""
    e, h = drawn(seed, *shape), moment(seed + 1, shape[1], tokens, spread)
    made = best_factors(e, rank, h)
    assert made.b.shape == (shape[0], rank) and made.a.shape == (rank, shape[1])
    scale = float((e @ root(h)).norm())
    assert error(e, made, h) <= smallest_error(e, rank, h) + 2e-6 * scale
    if rank >= min(shape):
        torch.testing.assert_close(made.product(), e.float(), rtol=1e-5, atol=1e-5)


def test_the_correction_is_that_of_the_closed_form_with_an_inverse():
    """EoRA as its paper writes it: truncated SVD of E H^(1/2), then times H^(-1/2)."""
    e, h = drawn(0, 20, 16), moment(1, 16, 100, 2)
    u, s, v = torch.linalg.svd(e @ root(h))
    written = (u[:, :5] * s[:5]) @ v[:5] @ torch.linalg.inv(root(h))
    torch.testing.assert_close(best_factors(e, 5, h).product(), written.float(), rtol=1e-4, atol=1e-5)


def test_without_a_moment_it_is_the_truncated_svd():
    e = drawn(0, 20, 16)
    u, s, v = torch.linalg.svd(e)
    torch.testing.assert_close(best_factors(e, 5).product(), ((u[:, :5] * s[:5]) @ v[:5]).float())
    torch.testing.assert_close(best_factors(e, 5).product(), best_factors(e, 5, torch.eye(16)).product())


def test_where_no_input_goes_the_correction_follows_the_error_itself():
    """An inverse of the moment would make of rounding noise there what it likes."""
    e, h = drawn(0, 8, 6), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1e-30], dtype=torch.float64))
    made = best_factors(e, 3, h)
    assert float(made.product().norm()) <= float(e.norm())
    assert error(e, made, h) < 1e-6
    nothing = best_factors(e, 3, torch.zeros(6, 6))
    assert nothing.product().isfinite().all()


@pytest.mark.parametrize("power", [-30, 0, 30])
def test_only_directions_of_the_moment_matter_not_its_size(power):
    e, h = drawn(0, 8, 6), moment(1, 6, 20)
    torch.testing.assert_close(best_factors(e, 3, h * 10.0**power).product(), best_factors(e, 3, h).product())


def test_errors_fall_with_the_rank():
    e, h = drawn(0, 16, 24), moment(1, 24, 60, 1)
    errors = [error(e, best_factors(e, rank, h), h) for rank in range(1, 17)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float((e @ root(h)).norm()) and errors[-1] < 1e-5


def test_factors_are_balanced_and_directions_without_error_empty():
    e = drawn(0, 10, 2) @ drawn(1, 2, 12)
    made = best_factors(e, 4)
    torch.testing.assert_close(made.b.norm(dim=0), made.a.norm(dim=1))
    assert (made.b[:, 2:] == 0).all() and (made.a[2:] == 0).all() and (made.b[:, :2].norm(dim=0) > 0.1).all()
    empty = best_factors(torch.zeros(10, 12), 4)
    assert not empty.b.any() and not empty.a.any()


@pytest.mark.parametrize("weighed", [False, True])
def test_iteration_for_large_weights_gets_what_is_to_be_had(monkeypatch, weighed):
    """Rounding errors, the worst there is: no direction stands out. And exactly what has a low rank."""
    w = drawn(0, 300, 200).float()
    e = w - quantize_linear(w, BUILTIN["int3"]()).dequantize()
    h = moment(1, 200, 400, 1.5) if weighed else torch.eye(200, dtype=torch.float64)
    exact = {rank: error(e.double(), best_factors(e, rank, h), h) for rank in (8, 32)}
    monkeypatch.setattr(lowrank, "EXACT", 100)
    whole = float((e.double() @ root(h)).norm())
    for rank, least in exact.items():
        found = error(e.double(), best_factors(e, rank, h), h)
        assert least - 1e-5 * whole <= found
        assert whole**2 - found**2 >= 0.99 * (whole**2 - least**2)
    low = (drawn(2, 300, 5) @ drawn(3, 5, 200)).float()
    assert error(low.double(), best_factors(low, 8, h), h) < 1e-4 * float((low.double() @ root(h)).norm())
    assert torch.equal(best_factors(e, 8, h).b, best_factors(e, 8, h).b)


def quantizer(method: str):
    recipe = BUILTIN[method]()
    return lambda w: quantize_linear(w, recipe)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("method", ["int2", "int3", "nf4", "e2m1", "quantile3"])
def test_alternation_never_loses(method, weighed):
    w = drawn(0, 48, 64).float()
    h = moment(1, 64, 200, 1) if weighed else None
    quantize = quantizer(method)
    start = quantize(w)
    errors = [weighted_norm(w - start.dequantize(), h)]
    for iterations in (1, 2, 4, 8):
        made = alternate(w, start, quantize, 4, iterations, h)
        assert made.before == errors[0]
        residual = w - made.q.dequantize() - made.factors.product()
        assert made.after == pytest.approx(weighted_norm(residual, h), rel=1e-5)
        assert 1 <= made.iteration <= iterations
        errors.append(made.after)
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
    if not weighed:  # rounding to nearest again follows this norm
        assert errors[-1] < errors[1]


def test_the_first_iteration_keeps_the_weight_as_it_is_quantized():
    w = drawn(0, 8, 64).float()
    start = quantizer("int3")(w)

    def refuse(values):
        raise AssertionError("one iteration quantizes nothing")

    made = alternate(w, start, refuse, 2)
    assert made.q is start and made.iteration == 1
    torch.testing.assert_close(made.factors.product(), best_factors(w - start.dequantize(), 2).product())


def test_a_quantizer_that_gets_worse_changes_nothing():
    w = drawn(0, 8, 64).float()
    start = quantizer("int4")(w)
    made = alternate(w, start, lambda values: quantizer("int2")(values * 3), 2, 5)
    assert made.q is start and made.iteration == 1


def test_an_exact_weight_needs_no_correction():
    """Integers on an integer grid with scale 1."""
    w = torch.randint(-7, 8, (4, 8), generator=torch.Generator().manual_seed(0)).float()
    w[:, 0] = 7
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(1, -1), scale="float32")))
    made = alternate(w, quantize_linear(w, recipe), quantizer("int4"), 2, 3)
    assert made.iteration == 0 and made.before == made.after == 0 and not made.factors.product().any()


def test_bad_requests_are_refused():
    w = drawn(0, 4, 8).float()
    for rank in (0, -1, 1.5, True):
        with pytest.raises(SpecError, match="rank"):
            best_factors(w, rank)
    for iterations in (0, True, 1.5):
        with pytest.raises(SpecError, match="iterations"):
            alternate(w, quantizer("int4")(w), quantizer("int4"), 2, iterations)
