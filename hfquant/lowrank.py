"""Low-rank corrections: a weight W is nearer to Q + B A than to the quantized Q alone.

Errors are measured as |E H^(1/2)|, the Frobenius norm of E = W - Q - B A weighted by the second moment H of the layer's
inputs: with H = X^T X / T that is the root mean square over T tokens of the output's error |E x|. Without H all
directions of the input count alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .errors import SpecError
from .qtensor import QTensor

EXACT = 1024  # rows or columns up to which directions come from a full decomposition of a matrix of that size
_EXTRA = 16  # directions beside those asked for that an iteration for larger ones carries
_PASSES = 6  # products with the error that it takes
_RIDGE = 1e-12  # of the mean input power for every direction: where no input decides, the size of the error does
_NOISE = 1e-7  # singular values below this share of the largest are rounding noise of float32 weights


@dataclass(frozen=True)
class Factors:
    """A matrix of rank r: `b` [N, r] times `a` [r, K], float32, each column of `b` as long as its row of `a`."""

    b: Tensor
    a: Tensor

    def product(self) -> Tensor:
        """B A [N, K] float32."""
        return self.b @ self.a


@dataclass(frozen=True)
class Correction:
    """A quantized weight and its correction. `before`, `after`: the error without and with it.

    `iteration`: the one that it comes from, 1 for the weight as it was given, 0 if no correction is better than none.
    """

    q: QTensor
    factors: Factors
    before: float
    after: float
    iteration: int


def weighted_norm(error: Tensor, moment: Tensor | None = None) -> float:
    """|E H^(1/2)| for `error` [N, K] and `moment` [K, K], symmetric and positive semidefinite; |E| without it."""
    if moment is None:
        return float(error.float().norm())
    e = error.float()
    squared = ((e @ moment.to(e)) * e).sum(dtype=torch.float64)
    return float(squared.clamp_min(0).sqrt())


def best_factors(error: Tensor, rank: int, moment: Tensor | None = None) -> Factors:
    """The B A of rank `rank` for which |(E - B A) H^(1/2)| is smallest; `error` [N, K], `moment` [K, K].

    With U the main left singular vectors of E H^(1/2), U U^T E H^(1/2) is its best approximation (Eckart and Young
    1936), which B A = U U^T E attains. That needs no inverse of H, which has directions without any input; there the
    correction follows E itself. The projection EoRA (Liu et al. 2024, section 3) writes with H^(-1/2) is the same where
    H can be inverted. Beyond `EXACT` rows and columns U is found by iteration, which ends near the smallest error.
    Raises SpecError for a rank below 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpecError(f"the rank of a correction is a whole number, at least 1, got {rank!r}")
    e = error.double() if min(error.shape) <= EXACT else error.float()
    h = None if moment is None else moment.to(e)
    if h is not None and float(trace := h.trace()) > 0:
        h = h / trace  # the directions are the same, and squares neither overflow nor vanish
        h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (_RIDGE / len(h))
    u = _main_directions(e, h, rank) if rank < min(e.shape) else torch.linalg.svd(e, full_matrices=False).U
    return _balanced(u, u.T @ e, rank)


def _main_directions(e: Tensor, h: Tensor | None, rank: int) -> Tensor:
    """The left singular vectors [N, rank] of E H^(1/2) with the largest singular values."""
    rows, features = e.shape
    if min(rows, features) > EXACT:
        basis = _krylov(partial(_outer, e, h), rows, rank, e)
        return basis @ _top(basis.T @ _outer(e, h, basis), rank)
    if rows <= features:
        return _top((e if h is None else e @ h) @ e.T, rank)
    weighed = e if h is None else e @ _root(h)  # right singular vectors are fewer: the left ones are their images
    return torch.linalg.qr(weighed @ _top(weighed.T @ weighed, rank).flip(1)).Q


def _top(symmetric: Tensor, count: int) -> Tensor:
    """Its eigenvectors with the largest eigenvalues, the largest last."""
    return torch.linalg.eigh((symmetric + symmetric.T) / 2).eigenvectors[:, -count:]


def _root(h: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(h)
    return vectors * values.clamp_min(0).sqrt()


def _outer(e: Tensor, h: Tensor | None, v: Tensor) -> Tensor:
    """E H E^T v."""
    back = e.T @ v
    return e @ (back if h is None else h @ back)


def _krylov(apply: Callable[[Tensor], Tensor], size: int, count: int, like: Tensor) -> Tensor:
    """An orthonormal basis of random directions and what `apply` makes of them, again and again.

    Its span holds more of the main directions than the last of these alone, most of all where singular values fall
    slowly, as those of rounding errors do. The seed is fixed, so that the same weight gets the same factors.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, min(count + _EXTRA, size), generator=generator).to(like)
    blocks = []
    for _ in range(_PASSES):
        block = torch.linalg.qr(apply(block)).Q
        blocks.append(block)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def _balanced(b: Tensor, a: Tensor, rank: int) -> Factors:
    """Factors of the same product for an orthonormal `b`, padded with zeros to `rank`."""
    turn, strength, directions = torch.linalg.svd(a, full_matrices=False)
    kept = strength > _NOISE * strength[:1]
    root = strength[kept].sqrt()
    made_b = (b @ turn[:, kept] * root).float()
    made_a = (root[:, None] * directions[kept]).float()
    rest = rank - len(root)
    return Factors(torch.nn.functional.pad(made_b, (0, rest)), torch.nn.functional.pad(made_a, (0, 0, 0, rest)))


def alternate(
    w: Tensor,
    start: QTensor,
    quantize: Callable[[Tensor], QTensor],
    rank: int,
    iterations: int = 1,
    moment: Tensor | None = None,
) -> Correction:
    """Quantize `w` [N, K] minus its correction, and correct what is left, in turns: LoftQ.

    The first iteration corrects `start`, the weight as it is quantized already; each further one calls `quantize` with
    W - B A. The result is the iteration with the smallest error, so that more of them never end with a larger one, and
    none with more than `start` has. Raises SpecError for less than one iteration.
    Source: Li et al. 2023, "LoftQ", algorithm 1.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise SpecError(f"iterations is a whole number, at least 1, got {iterations!r}")
    w = w.float()
    error = w - start.dequantize()
    before = weighted_norm(error, moment)
    none = Factors(w.new_zeros(w.shape[0], rank), w.new_zeros(rank, w.shape[1]))
    best = Correction(start, none, before, before, 0)
    q = start
    for iteration in range(1, iterations + 1):
        factors = best_factors(error, rank, moment)
        after = weighted_norm(error - factors.product(), moment)
        if after < best.after:
            best = Correction(q, factors, before, after, iteration)
        if iteration < iterations:
            q = quantize(w - factors.product())
            error = w - q.dequantize()
    return best
