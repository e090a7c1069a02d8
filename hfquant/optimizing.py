"""`hfquant.optimize`: what makes a quantized model faster without changing what it computes, on request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import SpecError
from .kernel import choose, dtype_inside
from .nn import QLinear
from .together import Together


@dataclass(frozen=True)
class SiblingUse:
    """The quantized layers below one module, by name: which may run together, and why others do not.

    `layers`: they have inputs of one size; those that are called with the very same tensor, one after the other, run in
    one call from the second time on. `seen()`: for which that happened so far.
    """

    module: str
    layers: tuple[str, ...]
    declined: tuple[str, ...]
    together: Together | None = None

    def seen(self) -> list[tuple[str, ...]]:
        """The layers that were called with one tensor so far, in the order of their calls."""
        if self.together is None:
            return []
        return [tuple(self.layers[number] for number in numbers) for numbers in self.together.seen()]


@torch.no_grad()
def optimize(model: nn.Module) -> list[SiblingUse]:
    """Let quantized layers that read one tensor, such as query, key and value projections, run in one call.

    For inference with a few tokens at a time, as in decoding, where the ways to small products cost as much as they
    do; whatever else (gradients, compilers, long prompts) runs layer by layer as before. Results, weights, names,
    memory and checkpoints stay the same. Layers find each other by being called: nothing depends on the model's class,
    and layers that are changed, moved, wrapped in adapters or called apart compute their own. Copies of the model are
    optimized too.

    Returns a row for each module with at least two quantized layers; where nothing can be run together, `layers` is
    empty. Raises SpecError for a model without quantized linear layers.
    """
    rows = []
    for name, module in model.named_modules():
        children = {leaf: layer for leaf, child in module.named_children() if (layer := _packed(child)) is not None}
        if len(children) > 1:
            rows += _siblings(name, children)
    if not any(isinstance(module, QLinear) for module in model.modules()):
        raise SpecError(f"{type(model).__name__} has no quantized linear layers to optimize: quantize it first")
    return rows


def _packed(module: nn.Module) -> QLinear | None:
    """The packed layer that a module is, or that an adapter has wrapped."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, QLinear) else None


def _siblings(name: str, children: dict[str, QLinear]) -> list[SiblingUse]:
    """Join the children of module `name` that have inputs of one size."""
    reasons = {leaf: why_apart(layer) for leaf, layer in children.items()}
    declined = tuple(f"{leaf}: {reason}" for leaf, reason in reasons.items() if reason is not None)
    sizes: dict[int, list[str]] = {}
    for leaf, layer in children.items():
        layer._together = None
        if reasons[leaf] is None:
            sizes.setdefault(layer.in_features, []).append(leaf)
    rows = []
    for leaves in sizes.values():
        if len(leaves) > 1:
            together = Together()
            for number, leaf in enumerate(leaves):
                children[leaf]._together = (together, number)
            rows.append(SiblingUse(name, tuple(leaves), declined, together))
    return rows or [SiblingUse(name, (), declined)]


def why_apart(layer: QLinear) -> str | None:
    """Reason why a layer cannot run together with others, or None."""
    held = [layer._parameters[name] for name in layer.packed_names()]
    if any(isinstance(tensor, DTensor) for tensor in held):
        return "it is split over several processes"
    packed = layer.packed()
    device = packed[0].device
    if device.type == "meta":
        return "it is offloaded: its weights come when it is called"
    kernel = choose(layer.key, device, dtype_inside(layer.spec, layer.dtype))
    if kernel.join is None:
        return f"kernel {kernel.name!r} runs one layer at a time"
    x = torch.zeros(1, layer.in_features, dtype=layer.dtype, device=device)
    _, bound = layer._binding.bound(x, packed, layer.key)
    if bound is None or kernel.join([bound], [None]) is None:
        return "its input is rotated, reordered, or taken apart first"
    return None
