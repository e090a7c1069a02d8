"""The method "w8a8": 8-bit integer weights and inputs, smoothed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import Blocks
from .errors import SpecError
from .presets import step
from .recipe import Recipe, Step
from .smooth import check_options
from .spec import InputSpec, Scheme, TensorSpec

_CHANNEL = TensorSpec("int8", Blocks(1, -1))  # one float32 scale for each output channel, or each token
_TENSOR = TensorSpec("int8", Blocks(-1, -1))


def w8a8(
    *,
    alpha: float = 0.5,
    layers: str = "norm",
    dynamic: bool = True,
    input_range: str | dict[str, Any] | None = None,
    range: str | dict[str, Any] = "absmax",
    transform: str | dict[str, Any] | list[str | dict[str, Any]] | None = "smoothquant",
) -> Recipe:
    """Weights in int8 with a scale per output channel, inputs in int8; needs calibration data to smooth.

    `dynamic`: each token's range is found at run time; False takes one range for all inputs of a layer, found by
    calibration with `input_range`: "mse" if it is None, "absmax", "percentile" or "kl". `transform`: "smoothquant" with
    `alpha` and `layers` (see there), None, or any other transforms. Raises SpecError for options that make no sense.
    """
    check_options(alpha, layers)
    if not isinstance(dynamic, bool):
        raise SpecError(f"dynamic is True or False, got {dynamic!r}")
    chosen = transform if isinstance(transform, list) else [] if transform is None else [transform]
    smooth = Step("smoothquant", {"alpha": alpha, "layers": layers})
    steps = tuple(smooth if item == "smoothquant" else step(item) for item in chosen)
    if smooth not in steps and (alpha, layers) != (0.5, "norm"):
        raise SpecError("alpha and layers belong to the transform 'smoothquant', which is not among the transforms")
    given = InputSpec(_CHANNEL) if dynamic else InputSpec(_TENSOR, dynamic=False)
    if dynamic and input_range is not None:
        raise SpecError("input_range is for static ranges, those of each token are its absmax: give dynamic=False")
    found = Step("absmax") if dynamic else step(input_range or "mse")
    return Recipe(Scheme(_CHANNEL, given), step(range), transforms=steps, input_range=found)


BUILTIN: dict[str, Callable[..., Recipe]] = {"w8a8": w8a8}
