"""The method "fpq": floating-point weights and inputs of few bits, in formats that are searched for."""

from __future__ import annotations

from typing import Any

from hfquant.blocks import Blocks
from hfquant.errors import SpecError
from hfquant.presets import group_blocks, step
from hfquant.recipe import Recipe, Step
from hfquant.spec import InputSpec, Scheme, TensorSpec

from .space import Space, float_grid, usual
from .weights import LOSSES

GRANULARITIES = ("tensor", "token", "group")


def fpq(
    *,
    bits: int = 4,
    act_bits: int = 16,
    group_size: int = -1,
    search: str = "joint",
    format: str | None = None,
    act_format: str | None = None,
    rounds: int = 3,
    preshift: bool = True,
    inputs: str = "tensor",
    rounder: str | dict[str, Any] = "nearest",
    attention: bool = False,
    loss: str = "output",
) -> Recipe:
    """Weights of `bits` bits, 3 to 8, and inputs of `act_bits`, 16 for inputs that stay as they are.

    Each layer gets the format, such as E2M1 or E3M0, and the largest value of each output channel that change its
    outputs least; inputs get a format and one largest value. Searching needs calibration data. `group_size`: weights in
    a row that share a scale, -1 for all of them. `search`: "joint", "paper" for the candidates of the paper, or
    "minmax" for the usual format without clipping. `format`, `act_format`: one format for all layers instead of a
    search, such as "e3m0", or "e1m2" for integers; as wide as `bits`, or `act_bits`. `rounds`: how often inputs and
    weights are searched in turns. `preshift`: input channels may be shifted by powers of two, which are folded into the
    layers before. `inputs`: "tensor" for one largest value, found by calibration, "token" or "group" (of 32 columns)
    for ranges that are found at run time. `rounder`: "nearest", or "gptq" and its options. `attention`: the operands of
    attention's products have `act_bits` too. `loss`: "output" for the squared error of a layer's output, "fisher" for
    the same weighed by what it does to the model's answer. Raises SpecError for options that make no sense.
    """
    _check(search, rounds, preshift, inputs, attention, loss)
    weight = TensorSpec(chosen("format", format, "bits", bits), group_blocks(None, group_size, -1))
    ranged = Step("fpq", {**_options(search, weight, format is not None), "loss": loss})
    if act_bits == 16:
        if act_format is not None or attention:
            asked = f"act_format={act_format!r}" if act_format is not None else "attention=True"
            raise SpecError(f"{asked} is for quantized inputs: give act_bits too")
        return Recipe(Scheme(weight), ranged, step(rounder))
    blocks = {"tensor": Blocks(-1, -1), "token": Blocks(1, -1), "group": Blocks(1, 32)}[inputs]
    tensor = TensorSpec(chosen("act_format", act_format, "act_bits", act_bits), blocks)
    given = InputSpec(tensor, dynamic=inputs != "tensor")
    found = Step("fpq", {**_options(search, tensor, act_format is not None), "rounds": rounds})
    shifts = (Step("fpq_shift"),) if preshift else ()
    scheme, operands = Scheme(weight, given), given if attention else None
    return Recipe(scheme, ranged, step(rounder), transforms=shifts, input_range=found, attention=operands)


def chosen(option: str, name: str | None, width: str, bits: int) -> str:
    """The format that was asked for, or the usual one of so many bits. Raises SpecError if their widths differ."""
    if name is None:
        return usual(bits)
    if float_grid(name).bits != bits:
        raise SpecError(f"{option}={name!r} has {float_grid(name).bits} bits, {width} is {bits}: give the same")
    return name


def _options(search: str, spec: TensorSpec, fixed: bool) -> dict[str, Any]:
    return {"search": search, "names": [spec.grid]} if fixed or search == "minmax" else {"search": search}


def _check(search: str, rounds: int, preshift: bool, inputs: str, attention: bool, loss: str) -> None:
    Space(("e2m1",), search)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise SpecError(f"rounds is a whole number, at least 1, got {rounds!r}")
    if loss not in LOSSES:
        raise SpecError(f"loss is one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    for name, value in (("preshift", preshift), ("attention", attention)):
        if not isinstance(value, bool):
            raise SpecError(f"{name} is True or False, got {value!r}")
    if inputs not in GRANULARITIES:
        raise SpecError(f"inputs is one of {', '.join(map(repr, GRANULARITIES))}, got {inputs!r}")
