"""The input range "fpq": the format of a layer's input and its largest value, searched together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hfquant.input_ranges import InputChoice, SeenInput, input_params
from hfquant.reference import as_seen
from hfquant.spec import InputSpec

from .space import Space, float_grid, formats, searches_nothing, unsigned_formats


def fpq(
    seen: SeenInput,
    given: InputSpec,
    search: str = "joint",
    names: list[str] | None = None,
    lowest: float = -3.0,
    highest: float = 0.5,
    steps: int = 32,
    rounds: int = 3,
) -> InputChoice:
    """The format of an input and, if its range is static, its largest value, with the smallest error of the outputs.

    The error is that of all layers that read the input, with their weights as they are quantized at present, over the
    sample that is kept of the calibration tokens (`stats.SAMPLE`); the magnitude that candidates start from is that of
    all tokens. An input without negative values, such as the probabilities of attention, may have a format without a
    sign. `search`, `lowest`, `highest`, `steps`: the candidates, see `Space`. `rounds`: how often inputs and weights
    are searched in turns, each for what was found for the other; it ends earlier when nothing changes.
    Source: Liu et al. 2023, "LLM-FP4", algorithm 1.
    """
    if names is None and search == "joint" and never_negative(seen):
        bits = float_grid(given.tensor.grid).bits
        names = [*formats(bits), *unsigned_formats(bits)]
    space = Space.of(given.tensor.grid, seen.grid_is_given, names, search, lowest, highest, steps)
    return find(seen, given, space)[0]


vars(fpq)["searches_dynamic"] = True
vars(fpq)["rounds"] = lambda options: 1 if searches_nothing(options) else options.get("rounds", 3)


def never_negative(seen: SeenInput) -> bool:
    """Whether calibration saw values, and none below 0."""
    return seen.hist is not None and seen.hist.total > 0 and seen.hist.low >= 0


def find(seen: SeenInput, given: InputSpec, space: Space) -> tuple[InputChoice, float]:
    """The best choice and its error: the mean over tokens of the squared change of all outputs."""
    exact, quantized = (torch.cat(given, -2).float() for given in (seen.weights, seen.quantized))
    x = seen.sample.to(exact.device)
    heads = x.shape[0] if x.dim() == 3 else 1
    already = x @ (quantized - exact).mT

    def loss_of(choice: InputChoice) -> float:
        change = as_seen(x, choice.tensor, choice.params) - x
        stacked = (tensor.reshape(heads, *tensor.shape[-2:]) for tensor in (already, change, quantized.mT))
        squares = torch.baddbmm(*stacked).square()
        counted = squares if seen.importance is None else squares * seen.importance.to(squares)
        return float(counted.sum()) / max(x[..., 0].numel(), 1)

    return min((_best(seen, given, name, space, loss_of) for name in space.names), key=lambda found: found[1])


def _best(
    seen: SeenInput, given: InputSpec, name: str, space: Space, loss_of: Callable[[InputChoice], float]
) -> tuple[InputChoice, float]:
    """The best range of a format, with its error; ranges of each token, at run time, are what they are."""
    spec = replace(given.tensor, grid=name)
    if given.dynamic:
        return InputChoice(spec), loss_of(InputChoice(spec))
    peak = seen.absmax or 1.0
    tried: dict[float, tuple[InputChoice, float]] = {}

    def attempt(exponent: float) -> None:
        high = peak * 2.0**exponent
        choice = InputChoice(spec, input_params(-high, high, spec))
        tried[exponent] = choice, loss_of(choice)

    def best() -> float:
        return min(tried, key=lambda exponent: tried[exponent][1])

    for exponent in space.exponents(torch.tensor(peak), name):
        attempt(float(exponent))
    for half in space.finer():
        at = best()
        attempt(at - half)
        attempt(at + half)
    return tried[best()]
