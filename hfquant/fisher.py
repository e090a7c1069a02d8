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
from .errors import CalibrationError, UnsupportedError
from .matrices import tokens

_SEQUENCES, _ROWS = 8, 64  # the sample of attention's products: sequences, and rows of queries of each
_IGNORED = -100  # the label of a position that does not count
_FLOOR = 0.01  # of the mean: outputs whose gradient happens to vanish still count

Batch = Mapping[str, Any]


@dataclass(eq=False)
class Importance:
    """What is kept of f[t, n] = (dL/dO[t, n])^2 of each layer's output O, for all calibration tokens t but padding.

    `tokens`: by layer, for each batch the sum over outputs [T]. `outputs`: by layer, the mean over tokens [N].
    Their product over the mean of all is the matrix of rank one that is nearest to f among those with its marginals.
    `products`: by attention module and product, for the batches of the sample the f [b, H, rows, k] `queries` keeps.
    """

    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    products: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def of_tokens(self, names: Iterable[str], number: int) -> Tensor:
        """Weights [T], 1 on average over all batches, of the tokens of batch `number` for layers that read one input.

        Tokens are those that are no padding; all count alike where none has an effect.
        """
        known = [self.tokens[name] for name in names]
        found = torch.stack([batches[number] for batches in known]).sum(0)
        mean = torch.stack([torch.cat(batches).mean() for batches in known]).sum()
        return (found / mean + _FLOOR) / (1 + _FLOOR) if bool(mean > 0) else torch.ones_like(found)

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


def importance(
    model: nn.Module, batches: Sequence[Batch], names: Iterable[str], masks: Sequence[Tensor | None]
) -> Importance:
    """One pass back through the model for each batch, over the layers `names` and attention's products.

    L is the model's own loss where batches have labels, and else minus the log-likelihood of labels that are drawn from
    what the model predicts, which makes f an estimate of the Fisher information. `masks`: which positions [B, L] of
    each batch are no padding, None for all. Raises UnsupportedError for a model that predicts no classes, and
    CalibrationError for one that overflows.
    Source: Li et al. 2021, "BRECQ", section 3.1; Liu et al. 2023, "LLM-FP4", appendix A.
    """
    found = Importance()
    drawn = torch.Generator().manual_seed(0)
    modules = {name: model.get_submodule(name) for name in names}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for number, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
            listener = _listener(model, found, sequences(number, len(batches)))
            with torch.enable_grad(), _noted(modules, found, mask), listening(listener):
                _loss(model, model(**batch), batch, drawn).backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    for name, sums in found.outputs.items():
        sums /= sum(map(len, found.tokens[name]))
    return found


@contextmanager
def _noted(modules: Mapping[str, nn.Module], found: Importance, mask: Tensor | None) -> Iterator[None]:
    """Note the gradients of the outputs of `modules`; what has none, because nothing depends on it, has f = 0."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            squares = tokens(gradient, mask, name).float().square()
            sums[name] += squares.sum(-1).cpu()
            found.outputs[name] += squares.sum(0).cpu()

        return hook

    def watched(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = _differentiable(output)
            count, width = tokens(output.detach(), mask, name).shape
            sums.setdefault(name, torch.zeros(count))
            found.outputs.setdefault(name, torch.zeros(width))
            output.register_hook(note(name))
            return output

        return hook

    hooks = [module.register_forward_hook(watched(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name in modules:
        found.tokens.setdefault(name, []).append(sums.get(name, torch.zeros(0)))


def _listener(model: nn.Module, found: Importance, wanted: int) -> Listener:
    names = {module: name for name, module in model.named_modules()}

    def listener(module: nn.Module, product: int, value: Tensor) -> Tensor:
        if not wanted:
            return value
        kept, value = found.products.setdefault((names[module], product), []), _differentiable(value)
        place = len(kept)
        kept.append(torch.zeros_like(queries(value, wanted), dtype=torch.float32, requires_grad=False))

        def hook(gradient: Tensor) -> None:
            kept[place] = queries(gradient, wanted).float().square()

        value.register_hook(hook)
        return value

    return listener


def _differentiable(value: Tensor) -> Tensor:
    """The same with a gradient, and no leaf, as some models write into it."""
    return value + torch.zeros((), dtype=value.dtype, requires_grad=True)


def _loss(model: Any, output: Any, batch: Batch, drawn: torch.Generator) -> Tensor:
    """Summed over samples and positions, so that each has the gradient of its own answer."""
    logits: Any = getattr(output, "logits", None)
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    classes = isinstance(logits, Tensor) and logits.dim() in (2, 3) and logits.shape[-1] > 1 and kind != "regression"
    if not classes:
        raise UnsupportedError(
            'loss="fisher" weighs errors by their effect on predicted classes or tokens, and this model predicts none: '
            'use loss="output"'
        )
    if getattr(output, "loss", None) is not None:
        return _finite(output.loss) * _answers(model, logits, batch)
    rows = logits.reshape(-1, logits.shape[-1]).float()
    mask = batch.get("attention_mask")
    if mask is not None and logits.dim() == 3 and mask.shape == logits.shape[:2]:
        rows = rows[mask.bool().flatten()]
    if kind == "multi_label_classification":
        labels = torch.bernoulli(_finite(rows.detach().sigmoid()).cpu(), generator=drawn)
        return F.binary_cross_entropy_with_logits(rows, labels.to(rows), reduction="sum")
    chances = _finite(rows.detach().softmax(-1)).cpu()
    labels = torch.multinomial(chances, 1, generator=drawn)[:, 0]
    return F.cross_entropy(rows, labels.to(rows.device), reduction="sum")


def _answers(model: Any, logits: Tensor, batch: Batch) -> int:
    """Over how many samples, or positions, a model's own loss is the mean."""
    labels = batch.get("labels")
    if labels is None or logits.dim() == 2 or labels.shape != logits.shape[:2]:
        return logits.shape[0]
    shifted = labels[:, 1:] if model.can_generate() else labels  # a position's label is the token after it
    return int((shifted != _IGNORED).sum())


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            "the model's answer is NaN or infinite for some of the calibration data: the model overflows on it, or a "
            "batch has no label. Load it in bfloat16 or float32 (dtype=...), or look at the data"
        )
    return value
