"""Training through quantization: all weights are trained while the model computes with their quantized values."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import api, processes
from ..calibration_state import Tick
from ..config import HfQuantConfig
from ..qat import finish_qat, prepare_qat
from ..report import REPORT_NAME, strict_json, total_bytes
from ..source import copy_companions, load_model, stored_dtype
from .base import load_base, report_in
from .request import Plan
from .rows import Rows
from .training import train

EXACT = torch.float32
"""The dtype in which weights are trained: small updates are lost in a shorter one."""


def train_through(
    plan: Plan, config: HfQuantConfig, rows: Rows, folder: Path, tick: Tick
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train the original model through its quantization and save it to `folder`; facts, and the losses by step."""
    section = plan.workflow.qat
    assert section is not None
    student = prepare_qat(load_base(plan.model, plan, EXACT), config)
    if plan.train is not None and plan.train.checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher = load_base(plan.model, plan, EXACT) if section.distill else None
    told = train(student, rows, plan, folder.with_name("trainer"), tick, teacher)
    if processes.rank() == 0:
        finish_qat(student).save_pretrained(folder)
        copy_companions(plan.model, folder)
    processes.barrier()
    return told


def quantize_trained(trained: Path, plan: Plan, config: HfQuantConfig, folder: Path) -> dict[str, Any]:
    """Quantize what was trained into `folder`; its report.

    In the dtype that it was trained in, or other codes would come out; what is not quantized is stored as it was.
    """
    if processes.rank() == 0:
        exact = folder.with_name("exact")
        report = api.quantize(trained, config, exact, dtype="float32", overwrite=True)
        model = load_model(exact, dtype="float32").to(stored_dtype(plan.model, plan.model_config))
        model.save_pretrained(folder)
        report = replace(report, mb_after=total_bytes(model.parameters()) / 1e6, output=str(plan.out))
        (folder / REPORT_NAME).write_text(strict_json(report.to_dict()) + "\n")
        shutil.rmtree(exact)
    processes.barrier()
    return report_in(folder)
