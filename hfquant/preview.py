"""What a quantization would give, from a model's configuration alone: no weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .calibration_state import Settings
from .config import HfQuantConfig
from .coverage import Target, survey
from .errors import HfQuantError
from .estimate import estimate
from .experts import expert_projections
from .quantize import works_on_blocks
from .recipe import Recipe
from .report import Report, sizes, versions
from .source import dtype_named, empty_model, original_config, stored_dtype
from .swap import swap_in

logger = logging.get_logger(__name__)


def preview(
    src: str | Path,
    config: HfQuantConfig,
    dtype: str = "auto",
    revision: str | None = None,
    settings: Settings | None = None,
) -> Report:
    """The report of quantizing `src`, before doing it: same sizes and coverage.

    For methods that work on blocks it has an estimate of the memory and the time, made by timing a few small matrices.
    Outlier columns are counted by their share, so a method that finds them in the weights shows none. Raises SpecError,
    and CalibrationError for calibration data that is not there.
    """
    model_config = original_config(src, revision)
    chosen = dtype_named(dtype) or stored_dtype(src, model_config, revision)
    model = empty_model(model_config, chosen)
    targets, coverage = survey(model, config.modules_to_not_convert, config.embeddings)
    calibrated = works_on_blocks(config.recipe)
    expected = _estimate(model, targets, config, settings) if calibrated and targets else None
    config = config.copy()
    config.outlier_columns = _outlier_counts(model, targets, config.recipe)
    swap_in(model, targets, config.recipe, config)
    return Report(
        config.method,
        config.options,
        str(src),
        str(chosen).removeprefix("torch."),
        **sizes(model, coverage),
        versions=versions(config.plugins),
        calibration=config.calibration if calibrated else None,
        estimate=expected,
        recipe=config.recipe_file,
    )


def _estimate(
    model: nn.Module, targets: list[Target], config: HfQuantConfig, settings: Settings | None
) -> dict[str, Any] | None:
    """Memory and time, or None, with a warning, for a model whose code cannot do without values."""
    try:
        return estimate(model, targets, config, settings).to_dict()
    except HfQuantError:
        raise
    except Exception as error:  # whatever the model's own code raises
        logger.warning(
            "no estimate of memory and time: %s cannot be run without its weights (%s: %s)",
            *(type(model).__name__, type(error).__name__, error),
        )
        return None


def _outlier_counts(model: nn.Module, targets: list[Target], recipe: Recipe) -> dict[str, int]:
    """Number of 16-bit columns of each target, for steps that keep a `fraction` of the input columns."""
    fraction = recipe.columns.options.get("fraction")
    if fraction is None:
        return {}
    counts = {}
    for target in targets:
        module = model.get_submodule(target.name)
        for projection in expert_projections(module):
            shape = module._parameters[projection].shape  # type: ignore[union-attr]
            inputs = shape[1] if getattr(module, "is_transposed", False) else shape[2]
            counts[f"{target.name}.{projection}"] = math.ceil(fraction * inputs)
        if target.kind != "experts":
            weight = module._parameters["weight"]
            assert weight is not None
            inputs = weight.shape[0] if target.kind == "conv1d" else weight.shape[1]
            counts[target.name] = math.ceil(fraction * inputs)
    return counts
