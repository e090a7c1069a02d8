"""How long is a step of QLoRA training, and how much memory does it take, next to bitsandbytes?

The model of `decode` in NF4 with blocks of 64, adapters of rank 16 on every linear layer of its blocks, autocast to
bfloat16, one sequence, no checkpointing. Both models take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from hfquant.backend import load_all

from .decode import prompt_of
from .findings import Findings
from .models import BNB, PROJECTIONS, build
from .setting import Setting
from .timing import clock_of
from .weights import kernel_of

OURS = "nf4 g64"


def step_of(name: str, setting: Setting) -> tuple[Callable[[], None], list[Any], str]:
    """What runs one step, the losses it has seen (tensors), and the kernels of the quantized layers."""
    base = build(name, setting)
    base.config.use_cache = False
    kernel = kernel_of(base) if name != BNB else "bitsandbytes"
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, losses = prompt_of(setting, setting.sizes.llama.train), []

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    return step, losses, kernel


def run(setting: Setting, findings: Findings) -> None:
    """Both, in turns."""
    load_all()
    clock = clock_of(setting)
    steps: dict[str, tuple[Callable[[], None], list[Any], str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in (OURS, BNB):
        with findings.row(model=name) as line:
            rows[name], others = line, clock.memory()
            made = step_of(name, setting)
            line["kernel"] = made[2]
            made[0]()  # compiles, and allocates the state of the optimizer
            line["peak_bytes"] = clock.peak_memory(made[0]) - others
            steps[name] = made
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in setting.while_time(findings, "steps", range(setting.sizes.steps)):
        for name, (step, _, _) in steps.items():
            took[name].append(clock.seconds(step))
    for name, values in took.items():
        losses = [float(loss) for loss in steps[name][1]]
        rows[name] |= {"seconds": median(values) if values else None, "losses": [losses[0], losses[-1]]}
        rows[name]["learns"] = losses[-1] < losses[0]
    findings.put()
