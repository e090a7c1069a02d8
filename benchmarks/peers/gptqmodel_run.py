"""Quantize a model with GPTQModel: GPTQ with group-aware reordering (its default) or with activation order."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with its default of half the cores it fails on two cores

from exchange import finish, read_job, timed  # before torch: it limits the threads

# isort: split
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT
from torch import Tensor, nn

METHODS = ("gptq", "gptq-act-order")
BATCH = 8


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """The weights of packed layers, with the float16 scales they are packed with, in float32 arithmetic."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            found[f"{name}.weight"] = module.dequantize_weight().T
    return found


def main() -> None:
    """Quantize, time, write."""
    job = read_job(METHODS, __doc__)
    act_order = job.method == "gptq-act-order"
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=act_order,
        act_group_aware=not act_order,
        static_groups=act_order,  # groups stay contiguous, as in the other packages
        format=FORMAT.GPTQ_V2,  # in the first version zero points lie one lower than `dequantize_weight` takes them
        device="cpu",
        offload_to_disk=False,
    )
    peer = GPTQModel.load(str(job.model), config, dtype=job.dtype)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in job.tokens]
    run = lambda: peer.quantize(rows, calibration_sort=None, batch_size=BATCH, backend=BACKEND.GPTQ_TORCH)  # noqa: E731
    _, times = timed(run)
    names = ("desc_act", "act_group_aware", "static_groups", "damp_percent", "mse", "true_sequential")
    settings = {"method": job.method, "batch": BATCH, **{name: getattr(config, name) for name in names}}
    finish(job, peer.model, dequantized(peer.model), times, ("gptqmodel",), settings)


if __name__ == "__main__":
    main()
