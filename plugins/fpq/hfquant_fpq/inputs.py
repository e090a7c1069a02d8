"""The input range "fpq": the format of a layer's input and its largest value, searched together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hfquant.input_ranges import InputChoice, SeenInput, input_params
from hfquant.qtensor import InputParams
from hfquant.reference import round_trip, static_round_trip
from hfquant.spec import InputSpec, TensorSpec

from .space import Space


def fpq(
    seen: SeenInput,
    given: InputSpec,
    search: str = "joint",
    names: list[str] | None = None,
    lowest: float = -3.0,
    highest: float = 0.5,
    steps: int = 8,
    rounds: int = 3,
) -> InputChoice:
    """The format of an input and, if its range is static, its largest value, with the smallest error of the outputs.

    The error is that of all layers that read the input, with their weights as they are quantized at present, over the
    sample that is kept of the calibration tokens (`stats.SAMPLE`); the magnitude that candidates start from is that of
    all tokens. `search`, `lowest`, `highest`, `steps`: the candidates, see `Space`. `rounds`: how often inputs and
    weights are searched in turns, each for what was found for the other; it ends earlier when nothing changes.
    Source: Liu et al. 2023, "LLM-FP4", algorithm 1.
    """
    space = Space.of(given.tensor.grid, seen.grid_is_given, names, search, lowest, highest, steps)
    return find(seen, given, space)[0]


vars(fpq)["searches_dynamic"] = True
vars(fpq)["rounds"] = lambda options: options.get("rounds", 3)


def find(seen: SeenInput, given: InputSpec, space: Space) -> tuple[InputChoice, float]:
    """The best choice and its error: the mean over tokens of the squared change of all outputs."""
    exact, quantized = torch.cat(seen.weights).float(), torch.cat(seen.quantized).float()
    x = seen.sample.to(exact.device)
    already = x @ (quantized - exact).T
    best: tuple[InputChoice, float] | None = None
    for name in space.names:
        spec = replace(given.tensor, grid=name)
        for params in _candidates(seen, given, spec, space):
            made = round_trip(x, spec) if params is None else static_round_trip(x, spec, params)
            error = torch.addmm(already, made - x, quantized.T).square().sum()
            loss = float(error) / max(len(x), 1)
            if best is None or loss < best[1]:
                best = InputChoice(spec, params), loss
    assert best is not None
    return best


def _candidates(seen: SeenInput, given: InputSpec, spec: TensorSpec, space: Space) -> list[InputParams | None]:
    """Ranges to try; None stands for those that each token has at run time."""
    if given.dynamic:
        return [None]
    peak = torch.tensor(seen.absmax or 1.0)
    highs = [float(peak * exponent.exp2()) for exponent in space.exponents(peak, spec.grid)]
    return [input_params(-high, high, spec) for high in highs]


def as_seen(x: Tensor, choice: InputChoice) -> Tensor:
    """The input `x` [T, K] float32 as a layer sees it."""
    return round_trip(x, choice.tensor) if choice.params is None else static_round_trip(x, choice.tensor, choice.params)
