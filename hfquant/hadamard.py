"""Hadamard transforms of every width: fast, orthonormal, and nothing to store.

A width K = 2^n m with odd m takes the Sylvester-Hadamard matrix of order 2^n Kronecker the orthonormal DCT-II of order
m. Where QuaRot (Ashkboos et al. 2024) needs a table of Hadamard matrices for each m, the cosines have a closed form,
exist for every m, and spread an outlier nearly as evenly: no entry exceeds sqrt(2 / K).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., K] times the orthonormal matrix `hadamard_matrix(K)`, along the last axis.

    Computed in float32, or float64 if `x` is that, and returned so. Where K is a power of four, integers are
    transformed and scaled without any rounding.
    """
    return _transform(x, inverse=False)


def inverse_hadamard(x: Tensor) -> Tensor:
    """`x` [..., K] times the transpose of `hadamard_matrix(K)`: the inverse of `hadamard`."""
    return _transform(x, inverse=True)


def hadamard_matrix(features: int) -> Tensor:
    """The matrix [K, K] float64 of `hadamard`, symmetric where K is a power of two."""
    return hadamard(torch.eye(features, dtype=torch.float64))


def random_hadamard(features: int, seed: int) -> Tensor:
    """A rotation [K, K] float64: random signs, then the Hadamard transform. The same for the same `seed`."""
    return random_signs(features, seed)[:, None] * hadamard_matrix(features)


def random_signs(features: int, seed: int) -> Tensor:
    """Signs s [K] float64, each 1 or -1: `hadamard(x * s)` is `x` times `random_hadamard(K, seed)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (features,), generator=generator).double() * 2 - 1


def _transform(x: Tensor, inverse: bool) -> Tensor:
    features = x.shape[-1]
    odd = features // (features & -features) if features else 1
    values = x if x.dtype == torch.float64 else x.float()
    if odd > 1:
        values = _cosine(values, odd, inverse)
    return _sylvester(values.reshape(-1, features), features // odd, odd).view(x.shape)


def _sylvester(x: Tensor, order: int, width: int) -> Tensor:
    """Transform `x` [T, order * width] along the first of the two axes that its columns make up.

    Butterflies only add and subtract: the result does not depend on how tokens are batched, nor on the precision that
    matrix products are allowed to have.
    """
    shape, half = x.shape, 1
    while half < order:
        upper, lower = x.reshape(shape[0], order // (2 * half), 2, half * width).unbind(2)
        x = torch.stack((upper + lower, upper - lower), dim=2)
        half *= 2
    return x.reshape(shape) * order**-0.5


def _cosine(x: Tensor, odd: int, inverse: bool) -> Tensor:
    """Transform every run of `odd` entries of `x` [..., K] by the DCT.

    In float64 where the device has it, which keeps autocast and TF32 from rounding the factors.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    matrix = _dct(odd).to(x.device, wide)
    runs = x.reshape(-1, odd).to(wide)
    return (runs @ (matrix if inverse else matrix.T)).to(x.dtype).view(x.shape)


@lru_cache(maxsize=16)
def _dct(order: int) -> Tensor:
    """The orthonormal DCT-II [order, order] float64: row j holds cos(pi (2 i + 1) j / (2 order)), scaled."""
    i = torch.arange(order, dtype=torch.float64, device="cpu")  # what is cached has values wherever models are made
    j = i[:, None]
    matrix = torch.cos(math.pi * (2 * i + 1) * j / (2 * order)) * math.sqrt(2 / order)
    matrix[0] = order**-0.5
    return matrix
