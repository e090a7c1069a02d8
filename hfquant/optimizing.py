"""`hfquant.optimize`: what makes a quantized model faster without changing what it computes, on request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .decoder import Chain, WholeLayer, whole
from .decoder_parts import Pieces, find
from .errors import SpecError
from .kernel import Kernel, choose, dtype_inside
from .nn import QLinear
from .together import Together

_SPLIT = "it is split over several processes"
_ALONE = "kernel {!r} runs one layer at a time"


@dataclass(frozen=True)
class LayerUse:
    """The quantized layers below one module, by name: which may run together, and why others do not.

    `layers`: either all products of a decoder layer, which runs as a whole, or children of a module that have inputs of
    one size: those that are called with the very same tensor, one after the other, run in one call from the second
    time on. `seen()`: for which that happened so far.
    """

    module: str
    layers: tuple[str, ...]
    declined: tuple[str, ...]
    together: Together | WholeLayer | None = None

    def seen(self) -> list[tuple[str, ...]]:
        """The layers that were called with one tensor so far, in the order of their calls."""
        if self.together is None:
            return []
        return [tuple(self.layers[number] for number in numbers) for numbers in self.together.seen()]


@torch.no_grad()
def optimize(model: nn.Module, exact: bool = False) -> list[LayerUse]:
    """Let what a quantized model computes between its attentions run in few calls, for inference.

    The decoder layers that most language models of transformers are built from run in two calls of the kernel, one
    before and one after attention: products, norms, rotary positions and the gated MLP; an MLP of another kind, such as
    experts, is called as before. Whether a layer is such a one
    is found out by running it once with made up attention, not from the name of its class. Results are the same but
    for the order of sums in a norm and the last bit of an exponential. Elsewhere, and everywhere if `exact`, layers
    that read one tensor, such as query, key and value projections, run in one call while there are few tokens, to the
    very same bits.

    Weights, names, memory and checkpoints stay the same, and so does whatever else is done with the model: under
    gradients, adapters, compilers and hooks, and where a layer was changed in a way that matters, its own code runs.
    Copies of the model are optimized too. Call it after `eval()` and after moving the model.

    Returns a row for each module with at least two quantized layers, and for each decoder layer; where nothing can be
    run together, `layers` is empty. Raises SpecError for a model without quantized linear layers.
    """
    if not any(isinstance(module, QLinear) for module in model.modules()):
        raise SpecError(f"{type(model).__name__} has no quantized linear layers to optimize: quantize it first")
    rows, chain = [], None if exact else Chain()
    for name, module in model.named_modules():
        rows += _whole(name, module, chain)
        children = {leaf: layer for leaf, child in module.named_children() if (layer := _packed(child)) is not None}
        if len(children) > 1:
            rows += _siblings(name, children)
    return rows


def _whole(name: str, module: nn.Module, chain: Chain | None) -> list[LayerUse]:
    """Let a decoder layer run as a whole, and take back that it did before."""
    if isinstance(module.__dict__.get("forward"), WholeLayer):
        del module.__dict__["forward"]
    pieces = None if chain is None else find(module)
    if chain is None or pieces is None:
        return []
    found = pieces if isinstance(pieces, str) else why_in_parts(pieces) or whole(pieces, chain)
    if isinstance(found, str):
        return [LayerUse(name, (), (found,))]
    module.__dict__["forward"] = found
    return [LayerUse(name, found.names, (), found)]


def _packed(module: nn.Module) -> QLinear | None:
    """The packed layer that a module is, or that an adapter has wrapped."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, QLinear) else None


def _siblings(name: str, children: dict[str, QLinear]) -> list[LayerUse]:
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
            rows.append(LayerUse(name, tuple(leaves), declined, together))
    return rows or [LayerUse(name, (), declined)]


def why_in_parts(pieces: Pieces) -> str | None:
    """Reason why no kernel runs the layer of `pieces` as a whole, as far as its first product tells, or None."""
    if any(product.is_cut for product in pieces.products.values()):
        return _SPLIT
    kernel = kernel_of(pieces.products["query"])
    if isinstance(kernel, str):
        return kernel
    return None if kernel.halves is not None else _ALONE.format(kernel.name)


def why_apart(layer: QLinear) -> str | None:
    """Reason why a layer cannot run together with others, or None."""
    kernel = kernel_of(layer)
    if isinstance(kernel, str):
        return kernel
    packed = layer.packed()
    device = packed[0].device
    if device.type == "meta":
        return "it is offloaded: its weights come when it is called"
    if kernel.join is None:
        return _ALONE.format(kernel.name)
    x = torch.zeros(1, layer.in_features, dtype=layer.dtype, device=device)
    _, bound = layer._binding.bound(x, packed, layer.key)
    if bound is None or kernel.join([bound], [None]) is None:
        return "its input is rotated, reordered, or taken apart first"
    return None


def kernel_of(layer: QLinear) -> Kernel | str:
    """The kernel of a layer where it is now, or the reason why it has none of its own."""
    if any(isinstance(layer._parameters[name], DTensor) for name in layer.packed_names()):
        return _SPLIT
    return choose(layer.key, layer.packed()[0].device, dtype_inside(layer.spec, layer.dtype))
