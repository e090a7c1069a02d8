"""PEFT's LoRA layers on packed ones: which there are, whether they can be given a start, and giving it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import SpecError, UnsupportedError
from ..lowrank import Factors
from ..nn import PackedModule


def active_adapter(model: Any, asked: str | None) -> str:
    """The name of the adapter to fill: `asked`, or the active one. Raises SpecError for none and for several."""
    known = getattr(model, "peft_config", None)
    if not known or not hasattr(model, "get_base_model"):
        raise SpecError(f"{type(model).__name__} has no adapters: attach one with peft.get_peft_model first")
    active = list(model.active_adapters)
    if asked is None and len(active) != 1:
        raise SpecError(f"the active adapters are {', '.join(active) or 'none'}: say which one to fill (adapter=...)")
    name = active[0] if asked is None else asked
    if name not in known:
        raise SpecError(f"there is no adapter {name!r}: there are {', '.join(known)}")
    if active != [name]:
        raise SpecError(f"adapter {name!r} is filled while it alone is active: call model.set_adapter({name!r}) first")
    return name


def adapted(model: Any, adapter: str, turns: int) -> dict[str, Any]:
    """PEFT's layers with that adapter on a packed one, by the name of the layer in the base model."""
    found: dict[str, Any] = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        if isinstance(layer.get_base_layer(), PackedModule):
            found[name] = layer
            _check_layer(name, layer, adapter, turns)
    if not found:
        raise SpecError(
            f"adapter {adapter!r} is on no quantized layer: load the model with an HfQuantConfig, and name layers that "
            "it quantizes in target_modules"
        )
    return found


def _check_layer(name: str, layer: Any, adapter: str, turns: int) -> None:
    """Raise UnsupportedError or SpecError for an adapter that cannot be filled."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise UnsupportedError(f"{name} has an adapter of another kind ({type(variant).__name__}): use LoRA or DoRA")
    if layer.merged_adapters:
        raise SpecError(f"{name} has merged adapters ({', '.join(layer.merged_adapters)}): call unmerge_adapter first")
    if layer.scaling[adapter] == 0:
        raise SpecError(f"{name}: with lora_alpha=0 the adapter does nothing: give it another")
    others = [other for other in layer.scaling if other != adapter]
    if others and turns > 1:
        raise SpecError(
            f"{name} has other adapters ({', '.join(others)}), and quantizing it again would change what they were "
            "made for: use iterations=1, which leaves the base as it is, or delete them"
        )


@contextmanager
def silenced(model: Any, adapter: str, layers: dict[str, Any]) -> Iterator[None]:
    """Run in evaluation mode, with an adapter that adds nothing until it is filled."""
    modes = {module: module.training for module in model.modules()}
    for layer in layers.values():
        layer.lora_B[adapter].weight.zero_()
        _follow_magnitude(layer, adapter)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def put_factors(layer: Any, adapter: str, factors: Factors) -> None:
    """Let an adapter add B A; directions without any start as they were made, with B = 0."""
    scale = float(layer.scaling[adapter])
    share = abs(scale) ** -0.5
    b, a = factors.b * (share if scale > 0 else -share), factors.a * share
    empty = ~factors.a.any(dim=1)
    if adapter in layer.lora_embedding_A:  # looked up: rows of A^T, so that A^T B^T is the change of the table
        rows, columns = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        rows.copy_(b.T)  # 0 where there is nothing, as PEFT starts tables
        columns[:, ~empty] = a.T[:, ~empty].to(columns)
        return
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    up.copy_(b)
    down[~empty] = a[~empty].to(down)
    if (dead := empty.to(down.device) & ~down.any(dim=1)).any():  # neither factor would ever get a gradient
        nn.init.kaiming_uniform_(fresh := torch.empty_like(down), a=5**0.5)
        down[dead] = fresh[dead]
    _follow_magnitude(layer, adapter)


def _follow_magnitude(layer: Any, adapter: str) -> None:
    """DoRA: let the magnitudes be those of the corrected weight, so that the layer computes with just that."""
    if adapter in layer.lora_variant:
        change = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        dora = layer.lora_magnitude_vector[adapter]
        base = layer.get_base_layer().weight.to(change)
        dora.weight.copy_(dora.get_weight_norm(base, change, layer.scaling[adapter]))


def save_base(model: Any, folder: str | Path, **options: Any) -> None:
    """Save the quantized model under the adapters of PEFT's `model` into `folder`; their configurations will name it.

    Needed where the base was quantized again for an adapter. `options` go to its `save_pretrained`. Save the adapters
    afterwards; `PeftModel.from_pretrained(base, adapter)` puts both together. Raises SpecError for merged adapters.
    """
    base = model.get_base_model()
    wrapped = [(n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if merged := [name for name, module in wrapped if getattr(module, "merged", False)]:
        raise SpecError(f"an adapter is merged into {merged[0]}: call unmerge_adapter first, or save the merged model")
    try:
        for name, module in wrapped:
            own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            base.set_submodule(name, own)
        base.save_pretrained(folder, **options)
    finally:
        for name, module in wrapped:
            base.set_submodule(name, module)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder)
