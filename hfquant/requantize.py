"""New values for a weight that is quantized already, as when an adapter is merged into it.

The old weight lies exactly on its grid, so rounding a small change to the nearest code puts almost every weight back
onto its old code, and the change is lost: a merged adapter would hardly act. Two things keep it. The old ranges stay
if they fit the new values, so that weights which did not change stay exact. And rounding errors are fed forward along
each row so that they cancel within the directions of the change.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .codebooks import Codebook, FittedGrid
from .columns import take_outliers
from .hadamard import hadamard
from .qtensor import QTensor
from .quantize import check_finite
from .ranges import Params, absmax
from .rounders import to_nearest
from .stats import Stats

_NAMED = Stats("the assigned weight")
_DIRECTIONS = 64  # at most: adapters of a higher rank keep their strongest directions
_SHARE = 8  # nor more than this part of the columns: the others must have room to take the errors
_POWER_STEPS = 2  # a low-rank change is found exactly in one, the rest is for changes of full rank
_NOISE = 1e-2  # directions weaker than this share of the strongest are rounding noise of 16-bit arithmetic
_ALIGNED = 1.5  # times the share of independent errors: more means that rounding works against the change
_WORTH = 0.5  # of a row's squared error within the change must go, or the noise of moved codes is for nothing
_STEPS = 256  # columns are rounded in at most this many blocks: enough feedback, and time linear in their number


def requantize(w: Tensor, like: QTensor) -> QTensor:
    """Quantize new values `w` [N, K] on the numbers, layout of blocks and outlier columns of `like`.

    Ranges are those of `like`, or absmax of the new values if that makes less error. Values equal to those of `like`
    in the dtype of `w` count as unchanged and keep their codes. Raises WeightError on NaN.
    """
    check_finite(w, _NAMED.name)
    if like.rotated:
        plain = replace(like, rotated=False)
        change = hadamard(w.float() - like.dequantize(w.dtype).float())  # 0 where nothing changed, as it must be
        return replace(requantize(plain.dequantize() + change, plain), rotated=True)
    index = torch.empty(0, dtype=torch.int64, device=w.device)
    if like.outliers is not None:
        index = like.outliers.index.long()
    body, outliers = take_outliers(w.float(), index)
    if outliers is not None and like.outliers is not None:
        outliers = replace(outliers, weight=w[:, index].to(like.outliers.weight.dtype).contiguous())
    if like.order is not None:
        body = body[:, like.order.long()]
    old = replace(like, order=None, outliers=None)
    # A 16-bit `w` comes from a rounded view of the old values: that rounding is neither a change nor to be cancelled.
    change = body - old.dequantize(w.dtype).float()
    body = torch.where(change == 0, old.dequantize(), body)
    q = min(_candidates(body, old), key=lambda q: float((q.dequantize() - body).square().sum()))
    return replace(cancel_errors(body, change, q), outliers=outliers, order=like.order)


def _candidates(body: Tensor, old: QTensor) -> list[QTensor]:
    """The new values to the nearest code in the old ranges, and in new ones."""
    return [to_nearest(body, params) for params in (_params_of(old), absmax(body, old.spec, _NAMED))]


def _params_of(q: QTensor) -> Params:
    """The grid parameters that a weight was quantized with."""
    grid = q.spec.numbers()
    if isinstance(grid, FittedGrid):
        assert q.levels is not None
        grid = Codebook(grid.name, tuple(sorted(set(q.levels.tolist()))))
    zero = None if q.zero is None else q.zero.float()
    return Params(q.spec, grid, q.scale_values(), q.scale, zero)


def cancel_errors(w: Tensor, change: Tensor, q: QTensor) -> QTensor:
    """Move some codes of `q` to the next best level, so that its errors hide the `change` [N, K] of `w` [N, K] least.

    With V [K, p] the main directions of the change, columns are rounded from left to right, each towards the value
    that lets the columns to its right cancel what has gathered in E V most cheaply: the least-squares form of GPTQ's
    error feedback, for the Hessian 1 + c V V^T with a large c.
    """
    v = directions(change)
    near, far, far_codes = _two_levels(w, q)
    if not _aligned(near, v):
        return q
    codes, gathered = q.codes.clone(), torch.zeros(w.shape[0], v.shape[1], device=w.device)
    for columns, gain in _gains(v):
        wanted = -(gathered @ gain.T)
        move = (far[:, columns] - wanted).abs() < (near[:, columns] - wanted).abs()
        codes[:, columns] = torch.where(move, far_codes[:, columns], codes[:, columns])
        gathered += torch.where(move, far[:, columns], near[:, columns]) @ v[columns]
    # Levels lie too far apart for the smallest changes: a row whose errors do not cancel keeps its nearest codes.
    worth = gathered.square().sum(1) < _WORTH * (near @ v).square().sum(1)
    return replace(q, codes=torch.where(worth[:, None], codes, q.codes))


def _aligned(errors: Tensor, v: Tensor) -> bool:
    """Whether `errors` [N, K] gather in the directions v [K, p], where independent ones have the share p / K."""
    within = float((errors @ v).square().sum())
    return within * v.shape[0] > _ALIGNED * float(errors.square().sum()) * v.shape[1] and within > 0


def directions(change: Tensor) -> Tensor:
    """Main right singular directions [K, p] float32 of `change` [N, K], orthonormal; p is its rank if that is small.

    Randomized subspace iteration with a fixed seed, so that the same merge gives the same codes.
    """
    change = change.float()
    count = min(_DIRECTIONS, max(1, change.shape[1] // _SHARE), *change.shape)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(change.shape[0], count, generator=generator).to(change.device)
    v = torch.linalg.qr(change.T @ probe).Q
    for _ in range(_POWER_STEPS):
        v = torch.linalg.qr(change.T @ (change @ v)).Q
    _, strength, turn = torch.linalg.svd(change @ v, full_matrices=False)
    return v @ turn[strength > _NOISE * strength[0]].T if float(strength[0]) > 0 else v[:, :0]


def _two_levels(w: Tensor, q: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors [N, K] of the codes in `q` and of the next codes on the other side of `w`, and those codes."""
    near = q.dequantize() - w
    last = (q.spec.numbers().size if q.levels is None else q.levels.numel()) - 1
    codes = (q.codes.short() - near.sign().short()).clamp_(0, last).to(torch.uint8)
    return near, replace(q, codes=codes).dequantize() - w, codes


def _gains(v: Tensor) -> list[tuple[slice, Tensor]]:
    """For blocks of columns from left to right: what each must take of a gathered error [p] for the least squares sum.

    Gains are M^-1 V_j with M the sum of V_k V_k^T over the block and all columns to its right.
    """
    width = max(1, v.shape[0] // _STEPS)
    rows = v.double()
    rest = 1e-6 * torch.eye(v.shape[1], dtype=torch.float64, device=v.device)
    gains = []
    for start in reversed(range(0, v.shape[0], width)):
        columns = slice(start, start + width)
        rest = rest + rows[columns].T @ rows[columns]
        gains.append((columns, torch.linalg.solve(rest, rows[columns].T).T.float()))
    return gains[::-1]
