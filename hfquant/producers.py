"""Which layer produces the input of each linear layer, for any architecture.

The producer is read off the autograd graph of one forward pass without data: the nearest linear layer behind an input.
Behind a residual stream that is the layer that wrote to it last; behind attention it is the value projection. The
views, splits and repeats between the two say which of its rows makes which input, also for grouped heads and fused
projections.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedError
from .experts import expert_projections
from .valueless import Answering

_CONSUMERS = (nn.Linear, Conv1D)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCERS = (*_CONSUMERS, *_CONVOLUTIONS, nn.Embedding)

# Backward nodes that only move elements (a mean moves equal elements into one); they are replayed on row numbers.
# All others are followed where they keep the shape, as activations, norms and sums do element by element.
_MOVES = frozenset(
    f"{name}Backward0"
    for name in [
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Transpose",
        "T",
        "Permute",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Repeat",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Slice",
        "Select",
        "Cat",
        "Stack",
        "Mean",
        "Roll",
        "ConstantPadNd",
    ]
)
WITHOUT = "quantize without proxy outliers (outliers=0)"

Edge = tuple[Any, int]  # a backward node, and the number of one of its forward outputs
Hop = tuple[Any, int, int]  # a backward node, the output it is entered by, and the input it is left by


@dataclass(frozen=True)
class Producer:
    """The layer `name` makes the input of another one; `rows` [K] int64: which of its outputs is which input."""

    name: str
    rows: Tensor


def producers(model: PreTrainedModel) -> dict[str, Producer]:
    """The layer behind the input of each linear layer, by name; one fed by none, or by several at once, is left out.

    Runs the model once on dummy inputs, on the device it is on (the meta device costs nothing). A layer that is called
    several times counts with its first call. Raises UnsupportedError as `producer_std` does.
    """
    for name, module in model.named_modules():
        if expert_projections(module):
            raise UnsupportedError(
                f"proxy outliers: {name} holds fused experts, whose inputs have no single producer; {WITHOUT}"
            )
    inputs, outputs = _trace(model)
    found = {name: _find(edge, outputs, model) for name, edge in inputs.items()}
    return {name: producer for name, producer in found.items() if producer is not None}


def _trace(model: PreTrainedModel) -> tuple[dict[str, Edge], dict[Any, str]]:
    """Run the model: where in the graph the input of each linear layer is, and which node is which layer's output."""
    inputs: dict[str, Edge] = {}
    outputs: dict[Any, str] = {}

    def note_input(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        if x.grad_fn is not None:
            inputs.setdefault(name, (x.grad_fn, x.output_nr))

    def note_output(name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        outputs[y.grad_fn] = name

    with _traceable(model) as hooks:
        for name, module in model.named_modules():
            if isinstance(module, _CONSUMERS):
                hooks.append(module.register_forward_pre_hook(partial(note_input, name), with_kwargs=True))
            if isinstance(module, _PRODUCERS):
                hooks.append(module.register_forward_hook(partial(note_output, name)))
        try:
            with torch.enable_grad(), Answering(False):  # no model warns
                model(**_dummy_inputs(model))
        except Exception as error:
            raise UnsupportedError(
                f"proxy outliers need a model that runs on dummy inputs without data; {type(model).__name__} stopped "
                f"with {type(error).__name__}: {error}. Instead, {WITHOUT}"
            ) from error
    return inputs, outputs


@contextmanager
def _traceable(model: nn.Module) -> Iterator[list[Any]]:
    """Gradients on, dropout off, attention spelled out; at the end all is as before and the listed hooks are gone."""
    parameters = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    attention = [(c, vars(c)[_ATTENTION]) for c in configs.values() if _ATTENTION in vars(c)]
    hooks: list[Any] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for config, _ in attention:
            setattr(config, _ATTENTION, "eager")
        model.eval()
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in parameters.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        for config, name in attention:
            setattr(config, _ATTENTION, name)


_ATTENTION = "_attn_implementation_internal"  # where a transformers config keeps the kernel; its setter reaches further


def _dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest inputs that show every layer: token ids, or an image of the size in the model's config."""
    device = model.device
    if model.main_input_name != "pixel_values":
        return {name: value.to(device) for name, value in model.dummy_inputs.items()}
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
    return {"pixel_values": torch.zeros(1, config.num_channels, *size, dtype=model.dtype, device=device)}


def _find(start: Edge, outputs: dict[Any, str], model: nn.Module) -> Producer | None:
    """The producer behind `start`: the nearest linear layer or convolution, else the largest embedding table.

    Tables come last because the first residual sum leaves them as near as the layer that writes to it, and the
    largest one because tables of positions and segments are added to the vocabulary's.
    """
    tables: list[tuple[int, str, list[Hop], Any]] = []
    for node, path in _walk(start, outputs):
        module = model.get_submodule(outputs[node])
        if not isinstance(module, nn.Embedding):
            return _producer(start, node, path, outputs[node], module)
        tables.append((module.num_embeddings, outputs[node], path, node))
    if not tables:
        return None
    _, name, path, node = max(tables, key=lambda table: table[0])
    return _producer(start, node, path, name, model.get_submodule(name))


def _walk(start: Edge, stops: dict[Any, str]) -> Iterator[tuple[Any, list[Hop]]]:
    """Nodes of `stops` that feed `start`, nearest first, each with the path to it."""
    back: dict[Edge, tuple[Edge, int] | None] = {start: None}
    queue = deque([start])
    while queue:
        edge = queue.popleft()
        if edge[0] in stops:
            yield edge[0], _path(edge, back)
            continue
        node, output = edge
        for number, following in enumerate(node.next_functions):
            if following[0] is None or following in back:
                continue
            if node.name() not in _MOVES and _shape(following) != _shape((node, output)):
                continue
            back[following] = (edge, number)
            queue.append(following)


def _path(edge: Edge, back: dict[Edge, tuple[Edge, int] | None]) -> list[Hop]:
    """The hops from the start of a walk to `edge`."""
    hops: list[Hop] = []
    while (step := back[edge]) is not None:
        edge, number = step
        hops.append((*edge, number))
    return hops[::-1]


def _shape(edge: Edge) -> tuple[int, ...]:
    """Shape of a forward output of a node."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def _producer(start: Edge, node: Any, path: list[Hop], name: str, module: nn.Module) -> Producer | None:
    """The layer at the end of `path` if each input comes from exactly one of its rows, else None.

    The moves on the path form a linear map from the producer's output to the consumer's input. Backward nodes compute
    its transpose, so the derivative of that computation is the map itself; it is applied to row numbers and to ones.
    """
    with torch.enable_grad():
        leaf = torch.zeros(_shape(start), dtype=torch.float64, device="cpu", requires_grad=True)
        moved = leaf
        for hop in path:
            moved = _replay(hop, moved)
    shape = _shape((node, 0))
    axis = 1 if isinstance(module, _CONVOLUTIONS) else len(shape) - 1
    sizes = [-1 if number == axis else 1 for number in range(len(shape))]
    numbers = torch.arange(shape[axis], dtype=torch.float64, device="cpu").view(sizes).expand(shape)
    carried = [
        torch.autograd.grad(moved, leaf, value, retain_graph=True) for value in (numbers, numbers.new_ones(shape))
    ]
    rows, sources = (value.flatten(0, -2) for (value,) in carried)
    single = (sources - 1).abs() < 1e-6  # a mean over positions rounds
    counts = single.sum(0)  # positions that do not come from this layer, such as a class token, do not count
    mean = (rows * single).sum(0) / counts
    if not counts.all() or ((rows - mean).abs() * single).max() > 1e-6 * shape[axis]:
        return None
    return Producer(name, mean.round().long())


def _replay(hop: Hop, grad: Tensor) -> Tensor:
    """One backward node on float64 values on the CPU; nodes that work element by element pass them on."""
    node, output, number = hop
    if node.name() not in _MOVES:
        return grad
    count = len(node._input_metadata)  # of forward outputs
    grads = [torch.zeros(_shape((node, other)), dtype=grad.dtype, device="cpu") for other in range(count)]
    grads[output] = grad
    result = node(*grads)
    return result[number] if isinstance(result, tuple) else result
