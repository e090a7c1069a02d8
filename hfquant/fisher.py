"""How much each output of a layer matters to the model's answer: the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Listener, listening
from .errors import UnsupportedError
from .matrices import tokens

_SEQUENCES, _ROWS = 8, 64  # the sample of attention's products: sequences, and rows of queries of each
_FLOOR = 0.01  # of the mean: outputs whose gradient happens to vanish still count

Batch = Mapping[str, Any]


@dataclass(eq=False)
class Importance:
    """What is kept of f[t, n] = (dL/dO[t, n])^2 of each layer's output O, for all calibration tokens t.

    `tokens`: by layer, for each batch the sum over outputs, [..., 1]. `outputs`: by layer, the mean over tokens [N].
    Their product over the mean of all is the matrix of rank one that is nearest to f among those with its marginals.
    `products`: by attention module and product, for each batch the f [b, H, rows, k] of what `queries` keeps.
    """

    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    products: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def of_tokens(self, names: Iterable[str], number: int, mask: Tensor | None) -> Tensor:
        """Weights [T], 1 on average over all batches, of the tokens of batch `number` for layers that read one input.

        `mask`: which positions [B, L] are no padding.
        """
        known = [name for name in names if name in self.tokens]
        found = torch.stack([tokens(self.tokens[name][number], mask, name)[:, 0] for name in known]).sum(0)
        means = [torch.cat([batch.flatten() for batch in self.tokens[name]]).mean() for name in known]
        mean = torch.stack(means).sum()
        return (found / mean.clamp_min(torch.finfo(torch.float32).tiny) + _FLOOR) / (1 + _FLOOR)

    def of_outputs(self, name: str) -> Tensor:
        """Weights [N] of the outputs of a layer."""
        found = self.outputs[name]
        return found + _FLOOR * found.mean() if bool(found.any()) else torch.ones_like(found)

    def of_product(self, name: str, product: int) -> list[Tensor]:
        """Weights [b, H, rows, k] of the elements of one of the two products of an attention module, for its sample."""
        parts = self.products[name, product]
        mean = torch.cat([part.flatten() for part in parts]).mean()
        return [part + _FLOOR * mean if bool(mean > 0) else torch.ones_like(part) for part in parts]


def sequences(number: int, batches: int) -> int:
    """How many sequences of batch `number` are in the sample of attention's products."""
    each = -(-_SEQUENCES // batches)
    return max(0, min(each, _SEQUENCES - number * each))


def queries(x: Tensor, wanted: int) -> Tensor:
    """The sample's part of `x` [B, H, L, k], whose rows belong to queries: `wanted` sequences, some rows of each."""
    return x[:wanted, :, :: -(-x.shape[2] // _ROWS)]


def importance(model: nn.Module, batches: Sequence[Batch], names: Iterable[str]) -> Importance:
    """One pass back through the model for each batch, over the layers `names` and attention's products.

    L is the model's own loss where batches have labels, and else minus the log-likelihood of labels that are drawn from
    what the model predicts, which makes f an estimate of the Fisher information. Raises UnsupportedError for a model
    that predicts no classes. Source: Li et al. 2021, "BRECQ", section 3.1; Liu et al. 2023, "LLM-FP4", appendix A.
    """
    found = Importance()
    drawn = torch.Generator().manual_seed(0)
    modules = {name: model.get_submodule(name) for name in names}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for number, batch in enumerate(batches):
            listener = _listener(model, found, sequences(number, len(batches)))
            with torch.enable_grad(), _noted(modules, found), listening(listener):
                _loss(model(**batch), batch, drawn).backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    for name, parts in found.tokens.items():
        found.outputs[name] /= sum(part.numel() for part in parts)
    return found


@contextmanager
def _noted(modules: Mapping[str, nn.Module], found: Importance) -> Iterator[None]:
    def note(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            squares = gradient.float().square()
            found.tokens.setdefault(name, []).append(squares.sum(-1, keepdim=True))
            sums = squares.flatten(0, -2).sum(0)
            found.outputs[name] = found.outputs.get(name, torch.zeros_like(sums)) + sums

        return hook

    def watched(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = _differentiable(output)
            output.register_hook(note(name))
            return output

        return hook

    hooks = [module.register_forward_hook(watched(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _listener(model: nn.Module, found: Importance, wanted: int) -> Listener:
    names = {module: name for name, module in model.named_modules()}

    def listener(module: nn.Module, product: int, value: Tensor) -> Tensor:
        def hook(gradient: Tensor) -> None:
            kept = found.products.setdefault((names[module], product), [])
            kept.append(queries(gradient, wanted).float().square())

        value = _differentiable(value)
        value.register_hook(hook)
        return value

    return listener


def _differentiable(value: Tensor) -> Tensor:
    """The same with a gradient, and no leaf, as some models write into it."""
    return value + torch.zeros((), dtype=value.dtype, requires_grad=True)


def _loss(output: Any, batch: Batch, drawn: torch.Generator) -> Tensor:
    """Summed over samples and positions, so that each has the gradient of its own answer."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[-1] < 2:
        raise UnsupportedError(
            'loss="fisher" weighs errors by their effect on predicted classes or tokens, and this model predicts none: '
            'use loss="output"'
        )
    if getattr(output, "loss", None) is not None:
        return output.loss * logits.shape[0]
    rows = logits.reshape(-1, logits.shape[-1]).float()
    mask = batch.get("attention_mask")
    if mask is not None and logits.dim() == 3 and mask.shape == logits.shape[:2]:
        rows = rows[mask.bool().flatten()]
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=drawn)[:, 0]
    return F.cross_entropy(rows, labels, reduction="sum")
