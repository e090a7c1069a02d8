"""Attention whose two products, q k^T and p v, see quantized operands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from .errors import FormatError, HfQuantError, UnsupportedError
from .gathered import check_gathered
from .nn import packed_aside
from .qtensor import InputParams
from .quantize import check_operands
from .reference import as_seen
from .spec import InputSpec

IMPLEMENTATION = "hfquant"  # name among transformers' attention implementations
CHILD = "operands"  # name of `Operands` in an attention module
PRODUCTS = (("query", "key"), ("probability", "value"))
OPERANDS = tuple(name for pair in PRODUCTS for name in pair)

# Keywords that change what attention computes; the last two choose the keys of sparse attention.
CHANGING = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")

Listener = Callable[[nn.Module, int, Tensor], Tensor]
"""Gets an attention module, which of its `PRODUCTS` it is, and the product; returns what takes its place."""

_listener: Listener | None = None


class Operands(nn.Module):
    """What the two products of an attention module see of their operands; a child of that module.

    `specs`: how each operand is quantized, those that are left out are not. `scale` [4] float32, frozen: of those with
    a static range, in the order of `OPERANDS`. `watcher`, while calibration runs, is called with each operand's name
    and its exact values.
    """

    specs: dict[str, InputSpec]
    watcher: Callable[[str, Tensor], None] | None = None

    def __init__(self, specs: Mapping[str, InputSpec] | None = None) -> None:
        super().__init__()
        self.specs = dict(specs or {})
        self.scale = nn.Parameter(torch.ones(len(OPERANDS), dtype=torch.float32), requires_grad=False)

    def forward(self, name: str, x: Tensor) -> Tensor:
        """The operand `x` [B, H, rows, k] as the product over k sees it. Rounding has the gradient of the identity."""
        if self.watcher is not None:
            self.watcher(name, x.detach())
        if name not in self.specs:
            return x
        check_gathered(self.scale, ("scale", torch.float32))
        spec, scale = self.specs[name], self.scale[OPERANDS.index(name)].reshape(1)
        seen = as_seen(x.detach().float(), spec.tensor, None if spec.dynamic else InputParams(scale)).to(x.dtype)
        return seen + (x - x.detach()) if x.requires_grad else seen  # adds 0: training sees what inference does

    def choose(self, name: str, spec: InputSpec, params: InputParams | None) -> None:
        """Quantize an operand from now on."""
        self.specs[name] = spec
        if params is not None:
            self.scale.data[OPERANDS.index(name)] = params.scale.reshape(())

    def record(self) -> dict[str, Any]:
        """Plain JSON types for `parse`."""
        return {name: spec.to_dict() for name, spec in self.specs.items()}

    @classmethod
    def parse(cls, record: Any) -> Operands:
        """Inverse of `record`, with the scale on the meta device. Raises FormatError for anything else."""
        try:
            specs = {name: check_operands(InputSpec.from_dict(spec), searched=True) for name, spec in record.items()}
        except (KeyError, TypeError, AttributeError, HfQuantError) as error:
            raise FormatError(f"config.json: the record of an attention's operands is damaged: {error!r}") from error
        if unknown := [name for name in specs if name not in OPERANDS]:
            raise FormatError(f"config.json: attention has no operand {unknown[0]!r}, only {', '.join(OPERANDS)}")
        with torch.device("meta"):
            return cls(specs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Operands:
        """Move the scale with the module but keep its dtype."""
        with packed_aside(self, ["scale"], fn):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The grid of each operand."""
        return ", ".join(f"{name}={spec.tensor.grid}" for name, spec in self.specs.items())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention for transformers' attention interface, in plain operations.

    `query` [B, H, L, D], `key`, `value` [B, H', L', D] with H a multiple of H', `attention_mask` [B, 1, L, L'] to be
    added. Returns the output [B, L, H, D] and the probabilities [B, H, L, L'].
    """
    if given := [name for name in CHANGING if kwargs.get(name) is not None]:
        raise UnsupportedError(f"{type(module).__name__} uses {given[0]}, which attention={IMPLEMENTATION!r} has not")
    seen = module._modules.get(CHILD) or (lambda name, x: x)
    heads = query.shape[1] // key.shape[1]
    query, key = seen("query", query), seen("key", key).repeat_interleave(heads, 1)
    scores = _made(module, 0, query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    probability = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    probability = seen("probability", nn.functional.dropout(probability, dropout, module.training))
    values = seen("value", value.mT).mT.repeat_interleave(heads, 1)
    return _made(module, 1, probability @ values).transpose(1, 2).contiguous(), probability


def _made(module: nn.Module, product: int, value: Tensor) -> Tensor:
    return value if _listener is None else _listener(module, product, value)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def use(model: PreTrainedModel) -> None:
    """Let a model compute attention with `attend`. Raises UnsupportedError if it cannot be told to."""
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise UnsupportedError(f"{type(model).__name__} cannot have another attention: {error}") from error
    if model.config._attn_implementation != IMPLEMENTATION or not _asks_for_attention(model):
        raise UnsupportedError(
            f"{type(model).__name__} computes attention in a way of its own, or none, so that the operands of its "
            "products cannot be quantized: leave attention out"
        )


def _asks_for_attention(model: nn.Module) -> bool:
    """Whether the code of any module knows of transformers' attention implementations.

    A model without a class called attention, such as a state space model, takes every implementation and calls none.
    """
    files = {type(module).__module__ for module in model.modules()}
    return any(isinstance(value, AttentionInterface) for name in files for value in vars(sys.modules[name]).values())


def leave(model: nn.Module) -> None:
    """Take the quantization of operands out of a model; attention is still computed by `attend`."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(CHILD), Operands):
            del module._modules[CHILD]


def freeze(model: nn.Module) -> None:
    """Scales of operands are not trained; loaders make parameters that are."""
    for module in model.modules():
        if isinstance(module, Operands):
            module.scale.requires_grad_(False)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` see, and replace, every product meanwhile."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def note_callers() -> Iterator[list[nn.Module]]:
    """The modules that call `attend` meanwhile, in the order of their calls."""
    callers: list[nn.Module] = []

    def note(module: nn.Module, product: int, value: Tensor) -> Tensor:
        if module not in callers:
            callers.append(module)
        return value

    with listening(note):
        yield callers
