"""How fast this machine is at what a calibrated quantization does, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .histogram import Histogram
from .input_ranges import INPUT_RANGES, SeenInput, rounds_of
from .quantize import needs, quantize_linear
from .recipe import Recipe
from .stats import DRIFT, SAMPLE, InputStats, Stats

_SPENT, _RUNS = 0.06, 2  # seconds for each measurement, and the fewest runs
_ROWS = (32, 512)  # outputs of the two weights that a recipe's own stages are timed on
_COLUMNS = 128  # and their inputs


@dataclass(frozen=True)
class Throughput:
    """`forward`, `single`, `double`: operations a second of matrix products in the model's dtype, float32 and float64.

    `skinny`: of products of a few rows, as in writing text, in the model's dtype. `elements`: float32 numbers a second
    that an elementwise step makes. `column`, `element`: seconds that the stages of a recipe take for each input column
    of a weight, and on top of that for each weight. `seen`: seconds that looking for the range of an input takes for
    each weight that reads it, 0 where it follows from statistics alone.
    """

    forward: float
    single: float
    double: float
    skinny: float
    elements: float
    column: float
    element: float
    seen: float = 0.0


@torch.no_grad()
def measure(recipe: Recipe, dtype: torch.dtype, width: int, rows: int = 8) -> Throughput:
    """Time some matrix products of `width`, products of `rows` rows, and the stages of `recipe` on small weights.

    With one thread this is time of the CPU, to which other processes add nothing.
    """
    side = max(64, min(width, 1024))
    x = torch.randn(1 << 22)
    few, many = _stages(recipe)
    element = max(0.0, many - few) / (_COLUMNS * (_ROWS[1] - _ROWS[0]))
    return Throughput(
        forward=_products(dtype, 512, side),
        single=_products(torch.float32, 512, side),
        double=_products(torch.float64, side // 2, side // 2),
        skinny=_products(dtype, rows, side),
        elements=x.numel() / _fastest(lambda: x * x),
        column=max(0.0, few / _COLUMNS - element * _ROWS[0]),
        element=element,
        seen=_looking(recipe),
    )


def _looking(recipe: Recipe) -> float:
    """Seconds for each weight, for input ranges that try candidates out on the layers that read the input."""
    given, step = recipe.scheme.input, recipe.input_range
    find = INPUT_RANGES.get(step.name)
    if given is None or rounds_of(find, step.options) == 1:
        return 0.0
    x, w = torch.randn(SAMPLE, _COLUMNS), torch.randn(_ROWS[1], _COLUMNS)
    counted = Histogram()
    counted.add(x)
    seen = SeenInput("a trial", counted, x, float(x.abs().max()), (w,), (w,))
    return _fastest(lambda: find(seen, given, **step.options)) / w.numel()


def _products(dtype: torch.dtype, rows: int, side: int) -> float:
    a, b = torch.randn(rows, side).to(dtype), torch.randn(side, side).to(dtype)
    return 2 * rows * side * side / _fastest(lambda: a @ b)


def _stages(recipe: Recipe) -> list[float]:
    """Seconds for a small weight of few rows and one of many, with inputs that are noise."""
    what = needs(recipe)
    inputs = InputStats(_COLUMNS, what)
    x = torch.randn(2 * _COLUMNS, _COLUMNS)
    inputs.add(x, x if DRIFT in what else None)
    weights = [torch.randn(rows, _COLUMNS) for rows in _ROWS]
    return [_fastest(lambda: quantize_linear(w, recipe, Stats(inputs=inputs, log=[]))) for w in weights]  # noqa: B023


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: what else the machine does only ever adds to them."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    best, runs, started = float("inf"), 0, clock()
    while runs < _RUNS or clock() - started < _SPENT:
        before = clock()
        run()
        best, runs = min(best, clock() - before), runs + 1
    return best
