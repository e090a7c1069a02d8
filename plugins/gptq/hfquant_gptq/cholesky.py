"""The Cholesky factor of a large matrix in its own memory, which a failure leaves as it was."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # rows and columns worked on at once


def reverse_cholesky_(h: Tensor) -> bool:
    """Turn `h` [K, K] float64, symmetric and contiguous, into R, lower triangular, with H = R^T R.

    Rows are taken from the last to the first, block by block. Only the lower triangle is written until all is done, so
    that what was there can be had back from the upper one: False, and `h` as it was, if H is not positive definite.
    """
    diagonal = h.diagonal().clone()
    for stop in range(len(h), 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        rows = _rows(h, start, stop)
        if rows is None:
            _mirror_(h, diagonal)
            return False
        h[start:stop, :start] = rows[:, :start]
        h[start:stop, start:stop].triu_(1).add_(rows[:, start:])
    h.tril_()
    return True


def _rows(h: Tensor, start: int, stop: int) -> Tensor | None:
    """The rows from `start` to `stop` of R, up to column `stop`, from those below them; None if there are none."""
    below = h[stop:]
    rest = torch.addmm(h[start:stop, :stop], below[:, start:stop].T, below[:, :stop], alpha=-1)
    corner, info = torch.linalg.cholesky_ex(rest[:, start:].flip((0, 1)))
    if int(info):
        return None
    upper = corner.flip((0, 1))
    rest[:, :start] = torch.linalg.solve_triangular(upper, rest[:, :start], upper=True)
    rest[:, start:] = upper.T
    return rest if bool(torch.isfinite(rest).all()) else None


def _mirror_(h: Tensor, diagonal: Tensor) -> None:
    """Make `h` symmetric again from its upper triangle and `diagonal`."""
    for start in range(0, len(h), _BLOCK):
        rows = slice(start, start + _BLOCK)
        corner = h[rows, rows].triu(1)
        h[rows, rows] = corner + corner.T
        h[start + _BLOCK :, rows] = h[rows, start + _BLOCK :].T
    h.diagonal().copy_(diagonal)


def permute_(h: Tensor, order: Tensor) -> None:
    """Rearrange rows and columns of `h` [K, K] in place: position j gets what was in place `order`[j]."""
    for start in range(0, len(h), _BLOCK):
        part = slice(start, start + _BLOCK)
        h[part] = h[part][:, order]
    for start in range(0, len(h), _BLOCK):
        part = slice(start, start + _BLOCK)
        h[:, part] = h[:, part][order]
