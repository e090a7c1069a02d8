"""Adapters: stock PEFT on a quantized model, started as the recipe says."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from transformers import set_seed

from ..calibration_state import Tick
from ..lora.check import named_targets
from ..lora.init import LayerInit, initialize
from ..lora.pooled import tie_groups
from ..recipe_file import LoraSection
from ..report import total_bytes
from .request import Plan
from .rows import Rows


def lora_config(section: LoraSection, training: bool) -> LoraConfig:
    """PEFT's configuration of the adapters that a recipe asks for."""
    return LoraConfig(
        r=section.rank,
        lora_alpha=2 * section.rank if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        target_parameters=list(section.experts) or None,
        use_rslora=section.rslora,
        use_dora=section.dora,
        task_type="CAUSAL_LM",
        inference_mode=not training,
    )


def size_of(adapted: PeftModel) -> dict[str, Any]:
    """Parameters of adapters, trained or not, and their megabytes (10^6 bytes)."""
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False).values()
    return {"parameters": sum(tensor.numel() for tensor in tensors), "mb": total_bytes(tensors) / 1e6}


def start(adapted: PeftModel, plan: Plan, rows: Rows, tick: Tick) -> list[LayerInit]:
    """Let adapters begin with what quantization lost, as the recipe says; what was found for each layer."""
    section = plan.workflow.lora
    assert section is not None and plan.config is not None
    how = plan.config.data
    batches = rows.batches(how.samples, how.batch_size) or None
    rounds = section.iterations if section.init == "loftq" else None
    return initialize(adapted, plan.model, section.init, iterations=rounds, batches=batches, tick=tick)


def attach(model: Any, plan: Plan) -> PeftModel:
    """Attach the adapters of a plan to a model; what is not an adapter is frozen.

    Raises SpecError if a name that the recipe gives reaches nothing, UnsupportedError for layers whose adapters could
    not be merged as the recipe says.
    """
    section = plan.workflow.lora
    assert section is not None
    if plan.train is not None and plan.train.checkpointing:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(plan.seed)  # adapters start with random numbers
    adapted = get_peft_model(model, lora_config(section, plan.train is not None))
    named_targets(adapted, section.targets)
    if section.experts:
        named_targets(adapted, section.experts)
    if section.pooled:
        tie_groups(adapted)
    return adapted
