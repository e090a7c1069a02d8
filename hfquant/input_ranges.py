"""Input ranges: where the grid of a static input lies, found from a histogram of what calibration saw.

As for weights (`ranges.py`), a range picks bounds (low, high); scale and zero point follow from them as they will be
stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import Blocks
from .codebooks import FittedGrid
from .errors import CalibrationError, SpecError
from .histogram import Histogram
from .qtensor import InputParams
from .ranges import kl_threshold, params_from_bounds
from .scales import round_to
from .spec import InputSpec, TensorSpec
from .tables import Table

_KL_BINS = 2048
_ROUNDS = 2  # of the search for two bounds: the second one changes little


@dataclass(frozen=True, eq=False)
class SeenInput:
    """What calibration saw of the input of one or more layers, and these layers.

    `name`: of the first of them. `hist`: of all values, None where ranges are found at run time. `sample` [S, K]
    float32: some of the tokens. `absmax`: the largest magnitude of all. `weights`, `quantized`: the layers' weights
    [N, K], and what they are quantized to so far. `grid_is_given`: no other grid may be chosen, because experts that
    are stored together have one. For an operand of attention's products the "weights" are the other operand, and all
    three have the heads first: [H, S, K] and [H, N, K]. `importance` [..., S, N]: how much the errors of the outputs
    count, None for all alike.
    """

    name: str
    hist: Histogram | None
    sample: Tensor
    absmax: float
    weights: tuple[Tensor, ...] = ()
    quantized: tuple[Tensor, ...] = ()
    grid_is_given: bool = False
    importance: Tensor | None = None


@dataclass(frozen=True)
class InputChoice:
    """The numbers of an input, of as many bits as were asked for, and its range if it is static."""

    tensor: TensorSpec
    params: InputParams | None = None

    def same(self, other: InputChoice | None) -> bool:
        """Whether another choice is this one."""
        if other is None or self.tensor != other.tensor:
            return False
        mine, others = ([] if c.params is None else [c.params.scale, c.params.zero] for c in (self, other))
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(mine, others, strict=True))


class InputRange(Protocol):
    """Finds the grid of a layer's input, and its parameters where they are static.

    One that is marked with `searches_dynamic` is asked for inputs whose ranges are found at run time as well; a mark
    `rounds`, a function of the options, says how often it is asked again after the weights were quantized for it.
    """

    def __call__(self, seen: SeenInput, given: InputSpec, /, **options: Any) -> InputChoice:
        """`given` is what the recipe says about the input; `options` come from it too."""


INPUT_RANGES: Table[InputRange] = Table("input range")


def searches_dynamic(find: InputRange) -> bool:
    """Whether an input range has something to find for inputs whose ranges are found at run time: their grid."""
    return bool(getattr(find, "searches_dynamic", False))


def rounds_of(find: InputRange, options: dict[str, Any]) -> int:
    """How often inputs and weights are looked at in turns: once, or what an input range's mark `rounds` says."""
    mark = getattr(find, "rounds", None)
    return 1 if mark is None else int(mark(options))


def input_params(low: float, high: float, spec: TensorSpec) -> InputParams:
    """Grid parameters of an input whose values lie in [low, high]: those that `ranges.absmax` gives such a matrix.

    Raises SpecError for numbers that an input cannot have.
    """
    if spec.blocks != Blocks(-1, -1):
        raise SpecError(f"static input ranges hold for the whole input: use blocks (-1, -1), not {spec.blocks}")
    if isinstance(spec.numbers(), FittedGrid):
        raise SpecError(f"an input cannot have the grid {spec.grid!r}, which is fitted to values: use a fixed one")
    bounds = torch.tensor([[low]], dtype=torch.float32), torch.tensor([[high]], dtype=torch.float32)
    params = params_from_bounds(bounds[0], *bounds, spec)
    zero = None if params.zero is None else params.zero.to(torch.uint8).reshape(1)
    return InputParams(params.scale.reshape(1), zero)


def absmax(hist: Histogram, spec: TensorSpec, name: str) -> InputParams:
    """The whole range that was seen: no clipping of calibration data."""
    _check_seen(hist, name)
    return input_params(hist.low, hist.high, spec)


def percentile(hist: Histogram, spec: TensorSpec, name: str, percentile: float = 99.99) -> InputParams:
    """Clip at a percentile (0 to 100) of the magnitudes, or of the two tails when asymmetric."""
    if not 50 < percentile <= 100:
        raise SpecError(f"percentile is above 50 and at most 100, got {percentile}")
    _check_seen(hist, name)
    share = percentile / 100
    if spec.zero:
        return input_params(hist.quantile(1 - share), hist.quantile(share), spec)
    high = hist.magnitude_quantile(share)
    return input_params(-high, high, spec)


def mse(hist: Histogram, spec: TensorSpec, name: str, steps: int = 100) -> InputParams:
    """The bounds with the smallest squared error, summed over the histogram, among shares 1, ..., 1 / `steps` of the
    range that was seen.

    When asymmetric the two bounds are sought in turns. The whole range comes first, so absmax is never better.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise SpecError(f"mse needs a whole number of steps >= 2, got {steps!r}")
    _check_seen(hist, name)
    low, high = (hist.low, hist.high) if spec.zero else (-hist.absmax, hist.absmax)
    points = hist.points()
    best = input_params(low, high, spec)
    loss, chosen = squared_error(points, spec, best), (1.0, 1.0)
    for search in range(1 + 2 * _ROUNDS if spec.zero else 1):
        for candidate in _candidates(steps, chosen, search):
            params = input_params(low * candidate[0], high * candidate[1], spec)
            if (error := squared_error(points, spec, params)) < loss:
                best, loss, chosen = params, error, candidate
    return best


def _candidates(steps: int, chosen: tuple[float, float], search: int) -> list[tuple[float, float]]:
    """Shares of the two bounds to try: the same of both in the first search, then of one of them in turns."""
    shares = [step / steps for step in range(steps, 0, -1)]
    if search == 0:
        return [(share, share) for share in shares]
    return [(chosen[0], share) if search % 2 else (share, chosen[1]) for share in shares]


def squared_error(points: tuple[Tensor, Tensor], spec: TensorSpec, params: InputParams) -> float:
    """Sum of the squared quantization errors of `points`: values [m] float32, and how often each one counts [m]."""
    values, counts = points
    grid, zero = spec.numbers(), None if params.zero is None else params.zero.float()
    seen = round_to(values, params.scale, zero, grid)
    return float(((seen.double() - values.double()).square() * counts).sum())


def kl(hist: Histogram, spec: TensorSpec, name: str) -> InputParams:
    """Clip where the histogram of the magnitudes loses least information (TensorRT's entropy calibration).

    When asymmetric the same threshold holds for both signs, and the range ends earlier on a side that does not reach
    it. Needs evenly spaced levels and at least 2048 values.
    """
    grid = spec.numbers()
    if not grid.affine:
        raise SpecError(f"input range 'kl' is for evenly spaced levels, not {spec.grid!r}: use 'mse' or 'percentile'")
    _check_seen(hist, name)
    if hist.total < _KL_BINS:
        raise CalibrationError(
            f"input range 'kl' needs at least {_KL_BINS} values, the input of {name} had {hist.total}: use more "
            "calibration data, or 'mse' or 'percentile'"
        )
    one_sided = not grid.signed and hist.low >= 0
    high = _kl_bound(hist, 2 ** (grid.bits - (not one_sided)))
    return input_params(max(hist.low, -high), min(hist.high, high), spec)


def _kl_bound(hist: Histogram, levels: int) -> float:
    """Magnitude at which to clip, for so many levels from 0 to it."""
    counts, factor = kl_counts(hist)
    if counts.numel() <= levels:  # only among the smallest numbers of float32
        return hist.absmax
    edge = kl_threshold(counts.numpy(), levels) * factor * hist.width
    return min(edge, hist.absmax)


def kl_counts(hist: Histogram) -> tuple[Tensor, int]:
    """Counts [n] float64 of the magnitudes in at most 2048 bins, and how many bins of the histogram each one joins."""
    counts = hist.magnitudes().cpu().double()
    factor = -(-counts.numel() // _KL_BINS)
    padded = F.pad(counts, (0, -counts.numel() % factor))
    return padded.reshape(-1, factor).sum(1), factor


def try_out(name: str, given: InputSpec, options: dict[str, Any]) -> None:
    """Find a range for some values, so that one that cannot work raises its error before long work starts."""
    values = torch.linspace(-1, 1, 2 * _KL_BINS)
    probe = Histogram()
    probe.add(values)
    weight = torch.eye(2)
    seen = SeenInput("a trial", probe, values.reshape(-1, 2), 1.0, (weight,), (weight,))
    INPUT_RANGES.get(name)(seen, given, **options)


def _check_seen(hist: Histogram, name: str) -> None:
    """Refuse a histogram without values."""
    if hist.total == 0:
        raise CalibrationError(
            f"calibration never ran {name}, so its input has no range: use more calibration data, or leave it in full "
            "precision with modules_to_not_convert"
        )


def _of_histogram(find: Callable[..., InputParams]) -> Callable[..., InputChoice]:
    """The input range that looks at nothing but the histogram."""

    def found(seen: SeenInput, given: InputSpec, **options: Any) -> InputChoice:
        assert seen.hist is not None
        return InputChoice(given.tensor, find(seen.hist, given.tensor, seen.name, **options))

    known = list(inspect.signature(find).parameters.values())[3:]
    places = list(inspect.signature(found).parameters.values())[:2]
    vars(found)["__signature__"] = inspect.Signature([*places, *known])
    found.__doc__ = find.__doc__
    return found


BUILTIN: dict[str, Callable[..., InputChoice]] = {
    find.__name__: _of_histogram(find) for find in (absmax, percentile, mse, kl)
}
