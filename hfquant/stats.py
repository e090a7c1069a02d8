"""What is known about a layer besides its weight when it is quantized: above all, what its inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import CalibrationError
from .histogram import Histogram

CHANNELS, HISTOGRAM, HESSIAN, DRIFT, FISHER = "channels", "histogram", "hessian", "drift", "fisher"
NEEDS = (CHANNELS, HISTOGRAM, HESSIAN, DRIFT, FISHER)

_ROWS, _VALUES = 1 << 12, 1 << 21  # tokens, and values of them, worked on at once
_COLUMNS = 1 << 8  # columns of a Gram matrix worked on at once: only blocks on and above its diagonal are computed

SAMPLE, _SAMPLE_EACH = 256, 64  # tokens kept of all, and of those that are added at once

F = TypeVar("F", bound=Callable)


def needs(*what: str) -> Callable[[F], F]:
    """Mark a stage's function with the statistics it reads: some of `NEEDS`."""
    assert set(what) <= set(NEEDS)

    def mark(fn: F) -> F:
        vars(fn)["needs"] = frozenset(what)
        return fn

    return mark


def needs_of(fn: Callable, options: dict[str, Any]) -> frozenset[str]:
    """The statistics that a stage's function was marked with; a mark may be a function of the stage's options."""
    found: Any = getattr(fn, "needs", frozenset())
    return frozenset(found(options) if callable(found) else found)


class InputStats:
    """Statistics of the tokens x [K] that a layer sees, accumulated over batches.

    `tokens`: how many. `absmax` [K] float32: largest |x|. `abs_sum`, `square_sum` [K] float64. `gram` [K, K] float64:
    sum of x x^T, half of the usual Hessian of a layer's squared output error, times the tokens. `drift` [K, K] float64:
    sum of (x' - x) x^T with x' the input that the original model sees in the same place. `histogram`: of all values.
    `sample` [S, K] float32: some of the tokens, to look at errors with; `places` [S] int64: the batches they are of.
    `memo`: results that stages derive from all this, for the other layers that read the same input. `weights` [S]
    float32: how much the tokens of the sample count; `outputs`: by matrix, how much its outputs [N] count. Both are
    empty unless errors are weighed by their effect on the model's answer, and then `gram` and `drift` are weighed sums.

    Sums are float64 so that the order of batches, and how they were shared out among processes, leaves no trace in the
    codes that follow from them.
    """

    def __init__(self, features: int, needs: frozenset[str] = frozenset(), name: str = "input") -> None:
        self.features, self.needs, self.name = features, needs, name
        self.tokens = 0
        self.absmax = torch.zeros(features)
        self.abs_sum = torch.zeros(features, dtype=torch.float64)
        self.square_sum = torch.zeros(features, dtype=torch.float64)
        self._gram = torch.zeros(features, features, dtype=torch.float64) if HESSIAN in needs else None
        self._mirrored = True
        self.drift = torch.zeros(features, features, dtype=torch.float64) if DRIFT in needs else None
        self.histogram = Histogram(name) if HISTOGRAM in needs else None
        self.sample = torch.zeros(0, features)
        self.places = torch.zeros(0, dtype=torch.int64)
        self.weights = torch.zeros(0)
        self.outputs: dict[str, Tensor] = {}
        self.memo: dict[Any, Any] = {}
        self.last = False

    def add(self, x: Tensor, original: Tensor | None = None, weights: Tensor | None = None, place: int = 0) -> None:
        """Count the tokens `x` [T, K]; `original` [T, K] is what the original model sees there, for `drift`.

        `weights` [T]: how much each of them counts in sums of squares, all alike if None. `place`: number of the batch.

        Raises CalibrationError for NaN or infinite values, naming the layer.
        """
        step = min(_ROWS, max(1, _VALUES // self.features))
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            moved, counts = (None if more is None else more[rows].float() for more in (original, weights))
            self._add(x[rows].float(), moved, counts, place)

    def _add(self, x: Tensor, original: Tensor | None, weights: Tensor | None, place: int) -> None:
        magnitude = x.abs()
        peak = magnitude.amax(0)
        if not torch.isfinite(peak).all():
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise CalibrationError(
                f"the input of {self.name} is NaN or infinite for {bad} of {x.shape[0]} tokens: the model overflows on "
                "this data. Load it in bfloat16 or float32 (dtype=...), or look at the data"
            )
        self.memo.clear()
        if (room := SAMPLE - self.sample.shape[0]) > 0:
            every, count = max(1, x.shape[0] // _SAMPLE_EACH), min(room, _SAMPLE_EACH)
            kept = x[::every][:count].to(self.sample.device)
            self.sample = torch.cat([self.sample, kept])
            self.places = torch.cat([self.places, torch.full((len(kept),), place)])
            if weights is not None:
                self.weights = torch.cat([self.weights, weights[::every][:count].to(self.weights.device)])
        self.tokens += x.shape[0]
        self.absmax = torch.maximum(self.absmax, peak.to(self.absmax.device))
        self.abs_sum += magnitude.sum(0, dtype=torch.float64).to(self.abs_sum.device)
        self.square_sum += magnitude.square_().sum(0, dtype=torch.float64).to(self.square_sum.device)
        if self.histogram is not None:
            self.histogram.add(x)
        root = None if weights is None else weights.to(x.device).sqrt()[:, None]
        weighed = x if root is None else x * root
        if self._gram is not None:
            _add_gram(self._gram, weighed)
            self._mirrored = False
        if self.drift is not None:
            assert original is not None
            moved = original - x
            self.drift += ((moved if root is None else moved * root).T @ weighed).to(self.drift.device)

    def merge(self, other: InputStats) -> None:
        """Count the tokens of `other` too, as if they had been added here."""
        self.tokens += other.tokens
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self._mirrored = False
        for name in ("abs_sum", "square_sum", "_gram", "drift"):
            mine, more = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine += more
        self.sample = torch.cat([self.sample, other.sample])[:SAMPLE]
        self.places = torch.cat([self.places, other.places])[:SAMPLE]
        self.weights = torch.cat([self.weights, other.weights])[:SAMPLE]
        self.memo.clear()
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)

    @property
    def gram(self) -> Tensor | None:
        """Sum of x x^T [K, K] float64, or None. Only half of it is added up; the other half is filled in here."""
        if self._gram is not None and not self._mirrored:
            _mirror(self._gram)
            self._mirrored = True
        return self._gram

    def take_gram(self) -> Tensor:
        """The Gram matrix [K, K] float64 to work on in place: itself where nobody reads it later, else a copy.

        It may be larger than the whole block of the model that it belongs to.
        """
        gram = self.gram
        assert gram is not None
        if not self.last:
            return gram.clone()
        self._gram = None
        return gram

    def select(self, columns: Tensor) -> InputStats:
        """The statistics of some input columns [k] int64, as if the layer had no others."""
        part = InputStats(columns.numel(), frozenset(), self.name)
        part.needs, part.tokens = self.needs, self.tokens
        part.sample, part.weights, part.outputs = self.sample[:, columns], self.weights, self.outputs
        for name in ("absmax", "abs_sum", "square_sum"):
            setattr(part, name, getattr(self, name)[columns])
        for name, matrix in (("_gram", self.gram), ("drift", self.drift)):
            setattr(part, name, None if matrix is None else matrix[columns][:, columns])
        return part

    def importance(self, names: Iterable[str]) -> Tensor | None:
        """How much errors at the outputs of some matrices count [S, N] for the sample, None where all count alike."""
        if not len(self.weights):
            return None
        return self.weights[:, None] * torch.cat([self.outputs[name] for name in names])

    @property
    def absmean(self) -> Tensor:
        """Mean of |x| over the tokens, [K] float32."""
        return (self.abs_sum / max(self.tokens, 1)).float()

    @property
    def second_moment(self) -> Tensor:
        """Mean of x^2 over the tokens, [K] float32."""
        return (self.square_sum / max(self.tokens, 1)).float()

    def tensors(self) -> list[tuple[Tensor, str]]:
        """Every accumulator with the way it merges, "sum" or "max": for an all-reduce among processes."""
        sums = [self.abs_sum, self.square_sum, self.gram, self.drift]
        return [(self.absmax, "max"), *((tensor, "sum") for tensor in sums if tensor is not None)]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x [K, K] to `gram` block by block, on and above the diagonal only."""
    width = x.shape[1]
    for top in range(0, width, _COLUMNS):
        rows = slice(top, top + _COLUMNS)
        left = x[:, rows].T.contiguous()
        for start in range(top, width, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            block = (left @ x[:, columns]).to(gram.device, gram.dtype)
            if start == top:
                block = (block + block.T) / 2
            gram[rows, columns] += block


def _mirror(gram: Tensor) -> None:
    """Fill what lies below the diagonal with its mirror image, bit for bit."""
    for top in range(0, len(gram), _COLUMNS):
        rows = slice(top, top + _COLUMNS)
        for start in range(top + _COLUMNS, len(gram), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            gram[columns, rows] = gram[rows, columns].T


@dataclass(frozen=True)
class Stats:
    """Facts about one layer.

    `name`: the layer's name in the model, for messages. `producer_std` [K] float32: standard deviation of the weights
    that produce each input feature, for proxy outliers. `inputs`: what calibration saw, None without calibration.
    `log`: what a stage wants the report to say, such as a remedy it had to take; every stage of a layer shares it.
    `grid_is_given`: a range may not choose another grid, because experts that are stored together have one.
    """

    name: str = "weight"
    producer_std: Tensor | None = None
    inputs: InputStats | None = None
    log: list[str] | None = None
    grid_is_given: bool = False

    def note(self, message: str) -> None:
        """Leave a remark for the report."""
        if self.log is not None:
            self.log.append(message)

    def columns(self, index: Tensor) -> Stats:
        """The same layer as if it had only the input columns `index` [k] int64."""
        inputs = None if self.inputs is None else self.inputs.select(index)
        spread = None if self.producer_std is None else self.producer_std[index]
        return replace(self, inputs=inputs, producer_std=spread)

    def seen(self, what: str) -> InputStats:
        """The calibration statistics, which hold `what` of `NEEDS`. Raises CalibrationError if there are none."""
        if self.inputs is None or (what in (HESSIAN, DRIFT) and what not in self.inputs.needs):
            raise CalibrationError(f"{self.name} needs calibration data ({what}): pass data=..., or data='self'")
        return self.inputs
