"""The rounder "gptq": each column is rounded to make up for the errors of the columns before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfquant.codebooks import FittedGrid
from hfquant.errors import SpecError
from hfquant.qtensor import QTensor
from hfquant.ranges import Params
from hfquant.rounders import FindRange, nearest, with_levels
from hfquant.spec import TensorSpec
from hfquant.stats import DRIFT, HESSIAN, InputStats, Stats

from .columnwise import column_rounder
from .descent import descend
from .hessian import ORDERS, Factor, factorize

_PART = 1 << 20  # weights worked on at once: float64 copies of 8 MiB


def gptq(
    w: Tensor,
    spec: TensorSpec,
    find: FindRange,
    stats: Stats,
    actorder: str = "group",
    damping: float = 0.01,
    block_size: int = 128,
    gptaq: float = 0.0,
    sweeps: int = 1,
) -> QTensor:
    """Round the columns of `w` [N, K] so that the error of the outputs, tr(D H D^T), becomes small.

    Before each block of columns that share scales, its grid parameters are found again for what the block should hold
    to make up best for all errors so far. They are those of `w` itself with `actorder` "static", which takes columns of
    all blocks in turns, and where scales or grid belong to the whole weight (quantized scales, fitted grids).

    `actorder`: "group" (the blocks in the order of their largest input channel, and the columns inside each likewise),
    "static" (all columns by their input channel) or "none". `damping`: added to the diagonal of H, as a share of its
    mean; doubled up to 1 where H cannot be factorized. `block_size`: columns between two large matrix products, for
    speed alone. `gptaq`: share, 0 to 1, of the drift of the inputs that the weight is corrected for (GPTAQ). `sweeps`:
    how often all columns are rounded again afterwards, each for the errors of all others; 0 is GPTQ alone.

    Empty columns of `w` stay empty. Without tokens, or if H cannot be factorized, weights are rounded to nearest; this
    and every other remedy is noted in `stats`. Source: Frantar et al. 2022, "GPTQ", section 3; group order: GPTQModel.
    Raises CalibrationError without calibration, SpecError for options out of range.
    """
    check_options(actorder, damping, block_size, gptaq, sweeps)
    inputs = stats.seen(HESSIAN)
    width = spec.blocks.sides((w.shape[0], w.shape[1]))[1]
    if inputs.tokens == 0:
        stats.note("no calibration token reached this layer: its weights are rounded to nearest")
        return nearest(w, spec, find, stats)
    factor = factorize(inputs, w, actorder, width, damping)
    if factor is None:
        stats.note("the Hessian cannot be factorized with any damping: the weights are rounded to nearest")
        return nearest(w, spec, find, stats)
    for remedy in factor.remedies:
        stats.note(remedy)
    once = actorder == "static" or not isinstance(spec.scale, str) or isinstance(spec.numbers(), FittedGrid)
    parts = []
    for rows in [w] if once else w.split(_rows_at_once(w, spec)):
        sweep = _Sweep.start(rows, factor, block_size, sweeps)
        if gptaq:
            sweep.errors.add_(correction(sweep.errors, factor, stats.seen(DRIFT)), alpha=gptaq)
        parts.append(
            sweep.with_one_choice(find, stats, spec) if once else sweep.with_fresh_parameters(find, stats, spec)
        )
    return _below_each_other(parts)


def _needs(options: dict[str, Any]) -> frozenset[str]:
    return frozenset({HESSIAN, DRIFT} if options.get("gptaq") else {HESSIAN})


vars(gptq)["needs"] = _needs


def check_options(actorder: str, damping: float, block_size: int, gptaq: float, sweeps: int) -> None:
    """Raise SpecError for options out of range."""
    if actorder not in ORDERS:
        raise SpecError(f"actorder is one of {', '.join(map(repr, ORDERS))}, got {actorder!r}")
    for name, value in (("damping", damping), ("gptaq", gptaq)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise SpecError(f"{name} is a number from 0 to 1, got {value!r}")
    for name, count, least in (("block_size", block_size, 1), ("sweeps", sweeps, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise SpecError(f"{name} is a whole number, at least {least}, got {count!r}")


def correction(weight: Tensor, factor: Factor, inputs: InputStats) -> Tensor:
    """What to add to a weight, [K, N] in processing order, so that W x is what W x' was before.

    W E[(x' - x) x^T] H^-1, the least-squares solution; empty columns stay empty. Source: Li et al. 2025, "GPTAQ",
    which spreads the same term over the columns.
    """
    assert inputs.drift is not None
    order = factor.order
    drift = (inputs.drift / inputs.tokens).to(order.device)[order[:, None], order].to(weight)
    lower, pivots = factor.lower.to(weight), factor.pivots.to(weight)
    y = torch.linalg.solve_triangular(lower.T, drift.T @ weight, upper=True, unitriangular=True)
    y = torch.linalg.solve_triangular(lower, y / pivots.square()[:, None], upper=False, unitriangular=True)
    return y.masked_fill_((weight == 0).all(1, keepdim=True), 0)


@dataclass(frozen=True)
class _Sweep:
    """The pass over the columns, on transposed matrices in processing order.

    `errors` [K, N]: W^T, of which rows become those of (W - Q)^T as they are rounded. `codes` [K, N] uint8.
    """

    errors: Tensor
    codes: Tensor
    order: Tensor
    lower: Tensor
    factor: Factor
    block_size: int
    sweeps: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.errors.shape[1], self.errors.shape[0]

    @classmethod
    def start(cls, w: Tensor, factor: Factor, block_size: int, sweeps: int) -> _Sweep:
        dtype = torch.float32 if w.device.type == "mps" else torch.float64
        order = factor.order.to(w.device)
        errors = w.T[order].to(dtype)
        codes = torch.empty(errors.shape, dtype=torch.uint8, device=w.device)
        return cls(errors, codes, order, factor.lower.to(errors), factor, block_size, sweeps)

    def with_one_choice(self, find: FindRange, stats: Stats, spec: TensorSpec) -> QTensor:
        """Round everything with grid parameters found for the weight as it is."""
        place, weight = self.order.argsort(), self.errors.clone()
        params = find(weight[place].float().T.contiguous(), spec, self._costs(stats, place))
        width = spec.blocks.sides(self.shape)[1]
        self._round(0, self.shape[1], weight.clone(), params, self.order // width)
        return self._result(weight, params)

    def with_fresh_parameters(self, find: FindRange, stats: Stats, spec: TensorSpec) -> QTensor:
        """Round block after block, each with grid parameters of its own."""
        width = spec.blocks.sides(self.shape)[1]
        weight, found = self.errors.clone() if self.sweeps else self.errors, dict[int, Params]()
        start = 0
        while start < len(self.errors):
            block = int(self.order[start]) // width
            stop = start + min(width, len(self.errors) - block * width)
            feedback = self.lower[start:stop, :start] @ self.errors[:start]
            # The block's weights that undo all errors so far, if they need not be rounded.
            within = self.lower[start:stop, start:stop]
            wanted = torch.linalg.solve_triangular(within, feedback, upper=False, unitriangular=True)
            wanted = (wanted + self.errors[start:stop]).float().T.contiguous()
            found[block] = find(wanted, spec, self._costs(stats, torch.arange(start, stop)))
            target = feedback.add_(self.errors[start:stop])
            self._round(start, stop, target, found[block], torch.zeros_like(self.order[start:stop]))
            start = stop
        return self._result(weight, _side_by_side([found[block] for block in sorted(found)]))

    def _costs(self, stats: Stats, positions: Tensor) -> Stats:
        """What ranges see of the columns at some positions: for E[x_j^2], what an error of column j costs in the end.

        That is S_j^2 and less than E[x_j^2], because the columns after it make up for some of it.
        """
        assert stats.inputs is not None
        device = stats.inputs.square_sum.device
        part = stats.columns(self.order[positions].to(device))
        assert part.inputs is not None
        pivots = self.factor.pivots.to(device)[positions.to(device)]
        part.inputs.square_sum = pivots.square() * part.inputs.tokens
        return part

    def _round(self, start: int, stop: int, target: Tensor, params: Params, blocks: Tensor) -> None:
        """Round the columns from `start` to `stop`; `target` [stop - start, N] has the feedback of all before them."""
        round_column = column_rounder(params, (target.shape[1], stop - start))
        index = blocks.tolist()
        for left in range(start, stop, self.block_size):
            right = min(left + self.block_size, stop)
            if left > start:
                target[left - start : right - start] += self.lower[left:right, start:left] @ self.errors[start:left]
            for j in range(left, right):
                wanted = target[j - start]
                if j > left:
                    wanted = torch.addmv(wanted, self.errors[left:j].T, self.lower[j, left:j])
                self.codes[j], value = round_column(wanted.float(), index[j - start])
                self.errors[j] -= value

    def _result(self, weight: Tensor, params: Params) -> QTensor:
        if self.sweeps:
            round_column = column_rounder(params, self.shape)
            blocks = self.order // params.spec.blocks.sides(self.shape)[1]
            lower, pivots = self.lower, self.factor.pivots.to(self.errors)
            for _ in range(self.sweeps):
                descend(weight, self.errors, self.codes, lower, pivots, round_column, blocks, self.block_size)
        codes = self.codes[self.order.argsort()].T.contiguous()
        return with_levels(QTensor(codes, params.stored, params.stored_zero(), None, params.spec), params)


def _rows_at_once(w: Tensor, spec: TensorSpec) -> int:
    """How many rows are worked on at once: they know nothing of each other, and float64 copies are large."""
    height = spec.blocks.sides((w.shape[0], w.shape[1]))[0]
    return max(1, _PART // (height * w.shape[1])) * height


def _below_each_other(parts: list[QTensor]) -> QTensor:
    """A matrix from some of its rows each, which share no scales."""
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale for part in parts if isinstance(part.scale, Tensor)])
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(parts[0], codes=codes, scale=scale, zero=torch.cat(zeros) if zeros else None)


def _side_by_side(parts: list[Params]) -> Params:
    """The parameters [R, C] of a matrix from those [R, 1] of its columns of blocks."""
    zeros = [part.zero for part in parts if part.zero is not None]
    stored = [part.stored for part in parts if isinstance(part.stored, Tensor)]
    scale = torch.cat([part.scale for part in parts], dim=1)
    return replace(
        parts[0], scale=scale, stored=torch.cat(stored, dim=1), zero=torch.cat(zeros, dim=1) if zeros else None
    )
