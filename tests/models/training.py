"""What the training scripts have in common: two optimizers, their learning rates, the end of a step, the export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .muon import Muon

MUON_LR = 0.02
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 100
CLIP_NORM = 1.0


def muon_and_adamw(
    model: nn.Module, matrices: Iterable[nn.Parameter], adam_lr: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Return Muon for the 2-D weights ``matrices`` and AdamW for the other parameters; vectors do not decay."""
    matrices = list(matrices)
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=adam_lr,
            betas=betas,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], step: int, fraction: float) -> None:
    """Linear warmup over ``WARMUP_STEPS``, then linear decay to zero at the end of the run."""
    scale = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - fraction)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def descend(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor) -> float:
    """Do the optimizers' step for ``loss``, whose value is returned; gradients are clipped, and gone afterwards."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def export(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Write a bfloat16 Hugging Face model directory, with the tokenizer if there is one."""
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
