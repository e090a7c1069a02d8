"""A streaming histogram of the values of a tensor: it comes out the same in whatever order and parts they arrive."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import CalibrationError

BINS = 8192  # of each sign: the largest magnitude lies in their upper half
_SMALLEST = -149  # exponent of the smallest float32 number: before anything but 0 is seen, bins are this fine
_CHUNK = 1 << 20  # values worked on at once


class Histogram:
    """Counts of values by sign and magnitude, with bins on a ladder of powers of two.

    `counts` [2, BINS] int64: of values >= 0 in row 0, of negative ones in row 1; bin i holds magnitudes in
    [i, i + 1) * 2^`exponent`. `low`, `high`: the smallest and the largest value, exactly; inf and -inf while there is
    none. `name`: whose values they are, for messages.

    The exponent is the smallest one with which the largest magnitude has a bin. It depends on that magnitude alone, and
    making bins twice as wide joins them pairwise without touching a value again. So the counts of a set of values do
    not depend on their order, nor on how they were shared out among batches and processes; and values times a power of
    two give the same counts.
    """

    def __init__(self, name: str = "input") -> None:
        self.name = name
        self.exponent = _SMALLEST
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def absmax(self) -> float:
        """Largest magnitude, 0 while there is no value."""
        return max(self.high, -self.low, 0.0)

    def add(self, x: Tensor) -> None:
        """Count all values of `x` [any shape], as float32. Raises CalibrationError for NaN or infinite values."""
        if x.numel() == 0:
            return
        parts = x.detach().reshape(-1).split(_CHUNK)
        # All bounds first: `x` is counted in full or not at all, and bins are widened once.
        bounds = torch.stack([torch.stack(torch.aminmax(part.float())) for part in parts])
        low, high = float(bounds[:, 0].min()), float(bounds[:, 1].max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"the input of {self.name} holds NaN or infinite values: the model overflows on this data. Load it in "
                "bfloat16 or float32 (dtype=...), or look at the data"
            )
        self.reach(torch.tensor([-low, high], dtype=torch.float64))
        for part in parts:
            self.counts += self._count(part.float())

    def _count(self, x: Tensor) -> Tensor:
        """Counts [2, BINS] int64 of values [n] float32 that have a bin."""
        # In float64 the product is exact whatever the exponent, and truncation is the floor of a magnitude.
        index = (x.abs().double() * math.ldexp(1.0, -self.exponent)).int()
        index += BINS * (x < 0)
        return torch.bincount(index, minlength=2 * BINS).reshape(2, BINS).to(self.counts.device)

    def bounds(self) -> Tensor:
        """[-low, high], float64; the larger ones of two histograms are those of both."""
        return torch.tensor([-self.low, self.high], dtype=torch.float64)

    def reach(self, bounds: Tensor) -> None:
        """Take the larger of these bounds [-low, high] and the own ones, with bins that are wide enough.

        For an all-reduce: `reach` the maximum of the `bounds` of all processes, then the sum of their counts is right.
        """
        self.low, self.high = min(self.low, -float(bounds[0])), max(self.high, float(bounds[1]))
        _, exponent = math.frexp(self.absmax)  # absmax < 2^exponent
        steps = exponent - (BINS.bit_length() - 1) - self.exponent
        if steps > 0 and self.absmax > 0:
            target = (torch.arange(BINS) >> min(steps, 63)).to(self.counts.device)
            self.counts = torch.zeros_like(self.counts).index_add_(1, target, self.counts)
            self.exponent += steps

    def merge(self, other: Histogram) -> None:
        """Count the values of `other` too, as if they had been added here; `other` stays as it is."""
        joined = other.copy()
        joined.reach(self.bounds())
        self.reach(other.bounds())
        self.counts = self.counts + joined.counts.to(self.counts.device)

    def copy(self) -> Histogram:
        """An independent histogram with the same counts."""
        made = Histogram(self.name)
        made.exponent, made.counts, made.low, made.high = self.exponent, self.counts.clone(), self.low, self.high
        return made

    def magnitudes(self) -> Tensor:
        """Counts [n] int64 of |x| up to the bin of the largest one."""
        used = 1 + int(math.ldexp(self.absmax, -self.exponent))
        return self.counts.sum(0)[:used]

    def points(self) -> tuple[Tensor, Tensor]:
        """The middles of all bins that hold values, [m] float32 in rising order, and their counts [m] int64.

        The middles of the outermost bins are brought inside [low, high].
        """
        middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
        values, counts = torch.cat([-middles.flip(0), middles]), self._ordered()
        held = counts > 0
        return values[held].clamp(self.low, self.high).float(), counts[held]

    def quantile(self, share: float) -> float:
        """The value that a `share` (0 to 1) of all values does not exceed, within one bin; 0 and 1 are exact."""
        return _quantile(self._ordered(), share, -BINS, self.width, self.low, self.high)

    def magnitude_quantile(self, share: float) -> float:
        """The quantile of the magnitudes, within one bin; 1 is exact."""
        return _quantile(self.magnitudes(), share, 0, self.width, 0.0, self.absmax)

    def _ordered(self) -> Tensor:
        """Counts [2 * BINS] int64 in the order of the values."""
        return torch.cat([self.counts[1].flip(0), self.counts[0]]).cpu()


def _quantile(counts: Tensor, share: float, first: int, width: float, low: float, high: float) -> float:
    """Quantile of values in bins `first`, `first` + 1, ... of a width, interpolated linearly as in `torch.quantile`.

    Values are taken as spread evenly over their bin, and to lie in [low, high], the last one at `high`.
    """
    upto = counts.cumsum(0)
    total = int(upto[-1]) if upto.numel() else 0
    if not total:
        raise CalibrationError("a histogram without values has no quantiles: it needs calibration data")

    def ranked(rank: int) -> float:
        if rank == 0 and first < 0:
            return low
        if rank == total - 1:
            return high
        index = int(torch.searchsorted(upto, rank, right=True))
        count = int(counts[index])
        inside = (rank - int(upto[index]) + count + 0.5) / count
        return min(max((first + index + inside) * width, low), high)

    where = share * (total - 1)
    rank = int(where)
    below, above = ranked(rank), ranked(min(rank + 1, total - 1))
    return below + (above - below) * (where - rank)
