"""The quantized model that adapters are trained on: made once, kept on the disk, loaded for training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import api, processes
from ..calibration_state import Tick
from ..config import HfQuantConfig
from ..quantize import works_on_blocks
from ..report import REPORT_NAME
from ..source import load_model
from .request import Plan
from .rows import Rows
from .sharded import waits_to_be_sharded

BASE = "base"
"""Folder of the quantized model beside its adapters."""


def config_of(plan: Plan, rows: Rows) -> HfQuantConfig:
    """How to quantize, with samples to calibrate on if the recipe names none of its own."""
    config = plan.config
    assert config is not None
    if not config.needs_data or config.data.data is not None:
        return config
    return HfQuantConfig.from_recipe(plan.recipe.path, data=rows.calibration(config.data.samples))


def quantized(source: str | Path, plan: Plan, config: HfQuantConfig, folder: Path, tick: Tick) -> dict[str, Any]:
    """Quantize the model `source` into `folder`, unless an earlier run did; the report that lies there.

    Of several processes all calibrate together; a method without calibration is the first one's work.
    """
    finished = processes.of_first((folder / REPORT_NAME).exists())  # all take the same way, or they wait for each other
    dtype = name_of(plan.dtype)
    if not finished and works_on_blocks(config.recipe):
        api.quantize(source, config, folder, dtype=dtype, tick=tick)
    elif not finished and processes.rank() == 0:
        tick("quantizing", 0.0)
        api.quantize(source, config, folder, dtype=dtype)
    processes.barrier()
    return report_in(folder)


def report_in(folder: Path) -> dict[str, Any]:
    """The report of the quantized model in a folder."""
    found: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
    return found


def load_base(source: str | Path, plan: Plan, dtype: torch.dtype | None = None) -> Any:
    """A model, quantized or not, in `dtype`, by default that of the training, and on its device.

    What is going to be sharded over GPUs stays on the CPU until then, as it may be too large for one of them.
    """
    place = {} if plan.device.type == "cpu" or waits_to_be_sharded(plan) else {"device_map": {"": plan.device}}
    return load_model(source, dtype=name_of(dtype or plan.dtype), **place)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as `from_pretrained` and reports spell it."""
    return str(dtype).removeprefix("torch.")


def remove(folder: Path) -> None:
    """Remove a folder that is not needed any more, once for all processes."""
    processes.barrier()
    if processes.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    processes.barrier()
