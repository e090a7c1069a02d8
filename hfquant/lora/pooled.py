"""QA-LoRA: stock LoRA adapters whose merge into a quantized weight is exact, because it moves zero points and no code.

An adapter adds s B A to a weight (code - zero) * scale. Where A [r, K] is constant within each group of columns that
share a scale, s B A is one number for each row and group, and adding it changes that zero point by -s B A_g / scale:
a real number, so that zero points become real numbers (ADR 0015). Such an A sees no more of an input than its sums
over groups. Source: QA-LoRA (Xu et al. 2023), which pools the input and trains [r, groups]; here A keeps its shape, so
that PEFT trains, saves and loads the adapter as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import HfQuantConfig
from ..errors import SpecError, UnsupportedError
from ..experts import QExperts
from ..grids import IntGrid
from ..layouts import LAYOUTS, packed_spec
from ..nn import PackedModule, QLinear
from ..quantize import bits_per_weight
from ..spec import PackedSpec, TensorSpec
from ..swap import packed_modules
from .groups import Groups, keep_constant

logger = logging.getLogger(__name__)

ZEROS = "float32"  # of merged zero points: 16 bits would be less than what the adapter computed


def tie_groups(model: nn.Module, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Make the A matrices of LoRA adapters constant within groups of their quantized layers, and keep them so.

    To be called after `get_peft_model`, and again after loading an adapter to train it further. A new adapter (B = 0)
    takes the values of one column of each group, which are distributed as PEFT chose; of a trained one, columns are
    averaged. From then on gradients are averaged over groups before they are accumulated, and A after each step of any
    torch optimizer, as steps may differ in the last bit from one column to the next: in where the vectors of a
    processor end, or in the order in which processes are added up. Columns kept in 16 bit get no part of the adapter:
    A is 0 there. What replaces the parameters afterwards (FSDP) is not followed, which `merge_exact` finds.

    `adapter_names`: None for the active ones. Layers that are not quantized are left alone. Returns the names of the
    tied layers. Raises UnsupportedError with the reasons if an adapter of some layer could not be merged exactly.
    """
    layers = _checked(model, adapter_names)
    if not layers:
        raise SpecError("there is no adapter on a quantized linear layer: attach one with peft.get_peft_model first")
    for found in layers:
        groups = Groups.of(found.base)
        for adapter in found.adapters:
            weight = found.layer.lora_A[adapter].weight
            fresh = not bool(found.layer.lora_B[adapter].weight.any())
            with torch.no_grad():
                weight.copy_(groups.chosen(weight) if fresh else groups.averaged(weight))
            keep_constant(weight, groups)
    return [found.name for found in layers]


def merge_exact(model: Any, adapter_names: Sequence[str] | None = None) -> Any:
    """Merge adapters that `tie_groups` keeps constant within groups into zero points, and return the base model.

    `model`: a PeftModel, used up by the call. Codes and scales stay as they are; zero points become float32, and signed
    integers unsigned ones with the same codes. Logits are those of the adapter up to rounding in float32. Adapters on
    layers that are not quantized are merged as PEFT does it. `adapter_names`: None for the active ones; others are
    dropped. Raises UnsupportedError, before anything is changed, if a layer cannot be merged exactly, naming it.
    """
    if not hasattr(model, "merge_and_unload"):
        raise SpecError(f"merge_exact takes a PeftModel, got a {type(model).__name__}: use PeftModel.from_pretrained")
    layers = _checked(model, adapter_names)
    _refuse([f"{found.name}: {reason}" for found in layers if (reason := _why_not_constant(found))])
    before, after = merged_bits(model, adapter_names)
    with torch.no_grad():
        zeros = [_merged_zeros(found) for found in layers]
    for found, zero in zip(layers, zeros, strict=True):
        _move_zeros(found.base, zero)
        for adapter in found.adapters:
            if found.layer.lora_bias[adapter]:
                found.base.bias.data += found.layer.lora_B[adapter].bias * found.layer.scaling[adapter]
            del found.layer.lora_A[adapter]  # what PEFT would merge
    merged = model.merge_and_unload(adapter_names=None if adapter_names is None else list(adapter_names))
    config = getattr(getattr(merged, "config", None), "quantization_config", None)
    if isinstance(config, HfQuantConfig):
        for name, module in packed_modules(merged):
            if isinstance(module, PackedModule):
                config.note(name, module.spec)
    logger.info("adapters merged into zero points: %.3f bits per weight, %.3f before", after, before)
    return merged


def merged_bits(model: nn.Module, adapter_names: Sequence[str] | None = None) -> tuple[float, float]:
    """Bits per weight of the layers with adapters, as they are and as `merge_exact` will store them."""
    weights, before, after = 0, 0.0, 0.0
    for found in _checked(model, adapter_names):
        spec = found.base.spec
        held = dict(zip(spec.names, found.base.packed(), strict=True))
        rows, columns = spec.scheme.weight.blocks.counts(spec.shape)
        merged = {**held, "zero": torch.empty(rows, columns, dtype=torch.float32, device="meta")}
        size = spec.shape[0] * spec.shape[1]
        weights += size
        before += size * bits_per_weight(held, spec.shape)
        after += size * bits_per_weight(merged, spec.shape)
    return before / max(1, weights), after / max(1, weights)


def why_not_exact(base: nn.Module) -> str | None:
    """Reason why no adapter can be merged into the zero points of a quantized module, or None; of its numbers alone."""
    if not isinstance(base, QLinear):
        return "only linear layers have groups along the adapter's A: leave it out of target_modules"
    spec = base.spec
    weight = spec.scheme.weight
    if spec.scheme.input is not None:
        return "it quantizes its input, which the adapter sees as it is: use a method for weights alone, such as int4"
    if spec.rotated:
        return "its codes are in a rotated basis, where A is not constant within groups: quantize without the rotation"
    if not isinstance(weight.numbers(), IntGrid):
        return f"levels of {weight.grid} are not evenly spaced, so that a shift is no zero point: use an integer grid"
    if weight.blocks.sides(spec.shape)[0] != 1:
        return "its rows share zero points: use groups inside of rows (group_size)"
    if any(isinstance(tensor, DTensor) or tensor.is_meta for tensor in base._parameters.values() if tensor is not None):
        return "its tensors are offloaded or split over processes: load the model in one process without offloading"
    return LAYOUTS.get(spec.layout).why_not(with_real_zeros(weight))


def with_real_zeros(spec: TensorSpec) -> TensorSpec:
    """The same integers, unsigned: code i stays code i."""
    return replace(spec, grid=f"uint{spec.numbers().bits}", zero=ZEROS)


@dataclass(frozen=True)
class _Adapted:
    """A quantized layer, PEFT's layer around it, and the adapters in question."""

    name: str
    layer: Any
    base: Any
    adapters: list[str]


def _adapted(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[_Adapted]:
    """PEFT's layers around quantized modules."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(base := layer.get_base_layer(), PackedModule | QExperts):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            held = getattr(layer, "lora_A", {}) if type(layer) is LoraLinear else wanted
            yield _Adapted(name, layer, base, [adapter for adapter in wanted if adapter in held])


def _checked(model: nn.Module, adapter_names: Sequence[str] | None) -> list[_Adapted]:
    """The layers in question. Raises UnsupportedError if some of them cannot be merged exactly."""
    if isinstance(adapter_names, str):
        raise SpecError(f"adapter_names is a list of names or None, got {adapter_names!r}")
    layers = list(_adapted(model, adapter_names))
    owners: dict[int, str] = {}
    reasons = []
    for found in layers:
        shared = owners.setdefault(id(found.base), found.name)
        reason = _why_not(found)
        if reason is None and shared != found.name:
            reason = f"its weight is that of {shared}, too, which has an adapter of its own: do not replicate layers"
        if reason is not None:
            reasons.append(f"{found.name}: {reason}")
    _refuse(reasons)
    return [found for found in layers if found.adapters]


def _refuse(reasons: list[str]) -> None:
    if reasons:
        shown = [*reasons[:8], *([f"and {len(reasons) - 8} more"] if len(reasons) > 8 else [])]
        raise UnsupportedError("adapters of these layers cannot be merged into zero points exactly", shown)


def _why_not(found: _Adapted) -> str | None:
    """Reason why the adapters of a layer cannot be merged exactly, were they constant within groups, or None."""
    layer = found.layer
    if not found.adapters:
        return None
    if reason := why_not_exact(found.base):
        return reason
    if type(layer) is not LoraLinear:
        return f"it has a {type(layer).__module__.split('.')[-2]} adapter: use LoraConfig"
    if layer.merged_adapters:
        return f"{', '.join(layer.merged_adapters)} was merged, which rounded the weight: load the base model again"
    for adapter in found.adapters:
        if adapter in layer.lora_variant:
            return f"{adapter} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__}): use plain LoRA"
        if layer.lora_bias[adapter] and found.base.bias is None:
            return f"{adapter} has a bias (lora_bias) and the layer none to add it to: train without lora_bias"
    return None


def _why_not_constant(found: _Adapted) -> str | None:
    """Reason why A is no change of zero points, or None."""
    groups = Groups.of(found.base)
    for adapter in found.adapters:
        a = found.layer.lora_A[adapter].weight.detach()
        off = float((a - groups.chosen(a)).abs().max())
        if off != 0:  # NaN, too
            return (
                f"A of {adapter} differs by up to {off:.3g} within groups: call tie_groups before training. Called "
                "now, it averages what was trained, which changes the adapter"
            )
    return None


def _merged_zeros(found: _Adapted) -> Tensor:
    """Zero points [R, C] float32 with the adapters in them. Raises UnsupportedError if they are beyond float32."""
    q, groups = found.base.qtensor(), Groups.of(found.base)
    grid = q.spec.numbers()
    change = torch.zeros(q.spec.blocks.counts(q.shape), dtype=torch.float64, device=q.codes.device)
    for adapter in found.adapters:
        a, b = found.layer.lora_A[adapter].weight, found.layer.lora_B[adapter].weight
        change += found.layer.scaling[adapter] * (b.double() @ groups.first(a).double())
    old = grid.zero_code if q.zero is None else q.zero.double()
    zero = (old - change / q.scale_values().double()).float()
    if not bool(zero.isfinite().all()):
        _refuse([f"{found.name}: its zero points would not be finite: the adapter holds NaN or overflows"])
    return zero


def _move_zeros(module: QLinear, zero: Tensor) -> None:
    """Give a layer real zero points [R, C], with the codes and scales that it has."""
    old: PackedSpec = module.spec
    q = module.qtensor()
    q = replace(q, spec=with_real_zeros(q.spec), zero=zero)
    packed = LAYOUTS.get(old.layout).pack(q)
    module.hold(packed, packed_spec(packed, old.layout, old.shape, replace(old.scheme, weight=q.spec)))
