"""Ways out of a training: what is saved, and what is made of the adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .. import processes
from ..calibration_state import Tick
from ..config import HfQuantConfig
from ..lora.adapters import save_base
from ..lora.pooled import merge_exact
from ..staging import staged
from .base import load_base, quantized, remove
from .request import Plan
from .sharded import saved_whole

NEAREST = "nearest"


def replace_base(model: PeftModel, base: Path) -> None:
    """Save the quantized model under adapters that it was quantized again for, in the place of what it was."""
    with staged(base) as folder:
        save_base(model, folder)
        for file in base.iterdir():
            if not (folder / file.name).exists() and "safetensors" not in file.name:
                shutil.copy(file, folder)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)


def save_adapter(model: PeftModel, folder: Path, base: Path | str) -> None:
    """Save the adapters; `base`: where the model they belong to will be found."""
    state = saved_whole(model)
    if processes.rank() == 0:
        model.save_pretrained(str(folder), state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the report's card takes its place
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}, indent=2))
    processes.barrier()


def merge(base: Path, adapter: Path, plan: Plan, config: HfQuantConfig, folder: Path, tick: Tick) -> None:
    """Merge adapters in float32 and write the quantized model to `folder`.

    Adapters change weights by less than a step of the grid, which rounding to nearest would undo. A method that rounds
    to nearest keeps its scales, and codes are chosen so that what the adapter does survives (`requantize`). A method
    with a rounding of its own is run again, on the dequantized model: that is what the adapters were trained on.
    """
    tick("merging", 0.0)
    if config.recipe.rounder.name == NEAREST:
        if processes.rank() == 0:
            _merged(load_base(base, plan, torch.float32), adapter).to(plan.dtype).save_pretrained(folder)
        processes.barrier()
        return
    full = folder.with_name("dequantized")
    if processes.rank() == 0:
        _merged(load_base(base, plan, torch.float32).dequantize(), adapter).save_pretrained(full)
    processes.barrier()
    quantized(full, plan, config, folder, tick)
    remove(full)


def _merged(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)


def merge_pooled(base: Path, adapter: Path, plan: Plan, folder: Path) -> None:
    """Move adapters that read one number of each group into the zero points, and write the model to `folder`."""
    if processes.rank() == 0:
        model = PeftModel.from_pretrained(load_base(base, plan), str(adapter))
        merge_exact(model).save_pretrained(folder)
    processes.barrier()
