"""The Hadamard transform is the orthonormal matrix that it says it is, for every width."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfquant.hadamard import hadamard, hadamard_matrix, inverse_hadamard, random_hadamard, random_signs

WIDTHS = [1, 2, 3, 4, 7, 12, 16, 37, 64, 96, 176, 240, 256]
POWERS_OF_FOUR = [1, 4, 16, 64, 256]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sylvester(order: int) -> Tensor:
    """Entry (i, j) is minus one to the number of binary digits that i and j have in common."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]).double()


def dct(order: int) -> Tensor:
    """Rows are the orthonormal cosine waves of the DCT-II."""
    rows = [[math.cos(math.pi * (i + 0.5) * j / order) for i in range(order)] for j in range(order)]
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("width", WIDTHS)
def test_is_sylvester_kronecker_cosine(width: int) -> None:
    order = width & -width
    expected = torch.kron(sylvester(order) / math.sqrt(order), dct(width // order)).T
    torch.testing.assert_close(hadamard_matrix(width), expected, rtol=0, atol=1e-13)


@given(st.integers(1, 200), st.integers(0, 5))
def test_is_orthonormal_and_spreads_evenly(width: int, seed: int) -> None:
    for matrix in (hadamard_matrix(width), random_hadamard(width, seed)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
        assert float(matrix.abs().max()) <= math.sqrt(2 / width) + 1e-12 or width == 1


@given(st.integers(1, 200), st.sampled_from([(), (1,), (3,), (2, 3), (0,)]))
def test_transform_is_a_product_and_is_taken_back(width: int, shape: tuple[int, ...]) -> None:
    x = drawn(*shape, width)
    y = hadamard(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    torch.testing.assert_close(y, (x.double() @ hadamard_matrix(width)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_hadamard(y), x, rtol=1e-5, atol=1e-5)
    exact = x.double()
    assert hadamard(exact).dtype == torch.float64
    torch.testing.assert_close(inverse_hadamard(hadamard(exact)), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", POWERS_OF_FOUR)
def test_integers_come_back_bit_for_bit(width: int) -> None:
    x = torch.randint(-1000, 1001, (5, width), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(inverse_hadamard(hadamard(x)), x)
    assert torch.equal(hadamard(x) * math.isqrt(width), (x.double() @ sylvester(width)).float())


@pytest.mark.parametrize("width", [64, 176])
def test_tokens_do_not_depend_on_their_batch(width: int) -> None:
    x = drawn(9, width)
    assert torch.equal(hadamard(x), torch.stack([hadamard(token) for token in x]))
    assert torch.equal(hadamard(x.T.contiguous().T), hadamard(x))


@pytest.mark.parametrize("width", [64, 176])
def test_autocast_does_not_round(width: int) -> None:
    x = drawn(9, width)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hadamard(x)
    assert torch.equal(inside, hadamard(x))


def test_low_precision_is_computed_in_float32() -> None:
    x = drawn(4, 48).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()))


def test_random_rotation_follows_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = random_hadamard(24, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(random_hadamard(24, 7), first)
    assert not torch.equal(random_hadamard(24, 8), first)
    x = drawn(3, 24).double()
    torch.testing.assert_close(hadamard(x * random_signs(24, 7)), x @ first, rtol=0, atol=1e-12)


def test_one_large_channel_is_spread_over_all() -> None:
    x = torch.zeros(1, 176)
    x[0, 5] = 100
    assert float(hadamard(x).abs().max()) <= 100 * math.sqrt(2 / 176) + 1e-4
