"""Training with weights spread over processes: FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks for it.

Packed tensors are frozen parameters, and torch's `fully_shard` takes them as they are: each process holds a part of the
rows of every tensor, whatever its dtype, and a block's tensors are put together while the block computes. What is
different from other models is refused or settled here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from ..errors import SpecError
from ..gathered import whole

if TYPE_CHECKING:
    from .request import Plan

# In place of what the launcher says. Every process reads all weights: the others' would be empty, and the model is
# measured, and writes text, before it is sharded. Checkpoints to go on from are written and read by each process.
_SETTLED = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
_DEFAULTS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}  # block by block; accelerate's is the whole at once


def is_sharded() -> bool:
    """Whether the launcher asked for FSDP, and processes were started that can share weights."""
    return _says("ACCELERATE_USE_FSDP") and dist.is_available() and dist.is_initialized()


def _says(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def check(plan: Plan) -> Plan:
    """A plan that can be carried out with sharded weights. Raises SpecError that names what cannot."""
    if not is_sharded():
        return plan
    reason = _why_not_launched() or _why_not_device(plan) or _why_not_recipe(plan)
    if reason is not None:
        raise SpecError(f"FSDP was asked for (accelerate launch --use_fsdp), and {reason}")
    if plan.train is not None and plan.train.optimizer == "auto":
        return replace(plan, train=plan.train.model_copy(update={"optimizer": "adamw"}))
    return plan


def _why_not_launched() -> str | None:
    """What the launcher says that cannot work, or None."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        return f"version {version} cannot hold packed weights, integers without gradients: add --fsdp_version 2"
    for variable, reason in _UNTRIED.items():
        if _says(variable):
            return reason
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        return (
            f"--mixed_precision {precision} would cast the scales of quantized weights: use --mixed_precision no, "
            "and say the dtype in the recipe (train: {dtype: bfloat16})"
        )
    if ignored := os.environ.get("FSDP_IGNORED_MODULES"):
        return f"gradients of what --fsdp_ignored_modules leaves out ({ignored}) are not added up: leave the option out"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        return "compiled blocks were not tried with it: use --dynamo_backend no"
    return None


_UNTRIED = {
    "FSDP_OFFLOAD_PARAMS": (
        "parts that wait on the CPU were not tried with packed weights: use --fsdp_offload_params false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "its activation checkpointing gives layers other names: use --fsdp_activation_checkpointing false, and say "
        "train: {checkpointing: true} in the recipe"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "other ways to split a model were not tried with it: leave --use_parallelism_config out"
    ),
}


def _why_not_device(plan: Plan) -> str | None:
    """Why weights cannot be spread over the devices, or None."""
    if plan.device.type == "cpu" and torch.accelerator.is_available():
        return "it spreads weights over the GPUs of this machine: leave --device cpu out, or hide them from it"
    return None


def _why_not_recipe(plan: Plan) -> str | None:
    """What the recipe says that cannot work, or None."""
    work, at = plan.workflow, plan.recipe.at
    if work.qat is not None:
        return (
            f"training through quantization ({at('qat')}) finds scales from whole weights in every step: start it "
            "without --use_fsdp, which trains copies of the model"
        )
    if work.lora is not None and work.lora.pooled:
        return (
            f"pooled adapters ({at('lora', 'pooled')}) are kept constant within groups by hooks that sharded "
            "parameters do not call: start it without --use_fsdp"
        )
    if plan.train is not None and plan.train.optimizer.endswith("8bit"):
        return (
            f"optimizer {plan.train.optimizer} ({at('train', 'optimizer')}) takes no parts of parameters: write "
            "optimizer: adamw, whose states are sharded, too"
        )
    return None


@contextmanager
def settled() -> Iterator[None]:
    """Settle what the launcher left open, or said otherwise, as long as a recipe is carried out."""
    if not is_sharded():
        yield
        return
    said = dict(os.environ)
    os.environ.update(_SETTLED)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in (*_SETTLED, *_DEFAULTS):
            if name in said:
                os.environ[name] = said[name]
            else:
                os.environ.pop(name, None)


def waits_to_be_sharded(plan: Plan) -> bool:
    """Whether a model may be too large for the device of one process: none is measured there as a whole."""
    return is_sharded() and plan.train is not None and plan.evaluate is None


def begin(device: torch.device) -> None:
    """Make accelerate shard on the CPU, too: told of several processes there it would train copies, and not say so.

    To be called between the Trainer's arguments, which forget it, and the Trainer.
    """
    if not is_sharded() or device.type != "cpu":
        return
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = Accelerator(cpu=True).state  # every Accelerator of the process has the same
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def megabytes(model: nn.Module) -> dict[str, float] | None:
    """Megabytes (10^6) of all parameters of a sharded model, and of what this process holds of them; else None."""
    parameters = list(model.parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return None
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {"whole_mb": size / 1e6, "held_mb": sum(map(_held, parameters)) / 1e6}


def _held(parameter: Tensor) -> int:
    """Bytes in the memory of this process; parts are as long as the longest, so that all take the same."""
    if isinstance(parameter, DTensor):
        return int(parameter.to_local().untyped_storage().nbytes())
    return parameter.numel() * parameter.element_size()


def saved_whole(model: Any) -> dict[str, Tensor] | None:
    """What PEFT saves of a sharded model, put together, on every process; None for a model that is not sharded."""
    if megabytes(model) is None:
        return None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = tuple(f"{name}." for name in _tables(model))
    state = model.state_dict()
    return {name: whole(state[name]) for name in state if name in trained or name.startswith(tables)}


def _tables(model: Any) -> list[str]:
    """Names of the embeddings and of the head, which PEFT saves along with adapters on them."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is table for table in found)]
