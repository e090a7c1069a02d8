"""Adapters train what was named: checked once they are attached, and again when the first gradients are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import SpecError
from ..experts import QExperts, expert_projections
from ..gathered import whole

ALL_LINEAR = "all-linear"
_INSIDE = re.compile(r"\.base_layer(?=\.|$)")
_OUTSIDE = re.compile(r"^(module\.)?(base_model\.model\.)?")
# What experts were called before they were fused: PEFT translates these names, for the models it knows.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
_FUSED |= {"w2": "down_proj", "gate": "gate.weight"}


def named_targets(model: nn.Module, names: str | Iterable[str]) -> dict[str, list[str]]:
    """Full names of the weights that carry an adapter, for each name of a layer, a fused weight, or pattern.

    `model` has its adapters; `names` are what was asked for, `target_modules` and `target_parameters` alike: ends of
    names in a list, or as a string a regular expression or "all-linear". Raises SpecError if one of them reaches
    nothing, or only some of the weights it names while the adapter's config does not leave out any on purpose.
    """
    adapted, weights = list(_adapted(model)), list(_weights(model))
    if not adapted:
        raise SpecError("the model has no adapter yet: attach it with get_peft_model, then check what it reaches")
    found = {}
    for name in [names] if isinstance(names, str) else list(names):
        pattern = isinstance(names, str)
        reached = [weight for weight in adapted if _matches(weight, name, pattern, old=True)]
        if not reached:
            raise SpecError(_reaches_nothing(name, weights))
        missed = [weight for weight in weights if weight not in reached and _matches(weight, name, pattern)]
        if missed and not _leaves_out(model):
            raise SpecError(_reaches_some(name, reached, missed))
        found[name] = reached
    return found


def check_gradients(model: nn.Module, steps: int = 0) -> int:
    """Check, after a backward pass, that every adapter learns; returns how many parameters that are.

    `steps`: optimizer steps before that pass. At first half of the factors start at zero, which leaves the other half
    without a gradient: then one parameter of each layer must have one that is not zero, afterwards all must. Raises
    SpecError that names the parameters.
    """
    missing, broken, zero, count = [], [], [], 0
    for layer, parameters in _trained(model):
        count += len(parameters)
        missing += [name for name, p in parameters.items() if p.grad is None]
        # Of a gradient that is spread over processes the part of one of them may be zero, or nothing.
        grads = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        broken += [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
        still = [name for name, grad in grads.items() if not bool(grad.any())]
        if steps:
            zero += still
        elif parameters and len(still) == len(parameters):
            zero.append(layer)
    for names, what in ((missing, "got no gradient"), (broken, "got NaN or infinite gradients"), (zero, _ZERO)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise SpecError(f"{', '.join(names[:8])}{more}: {what}")
    if not count:
        raise SpecError("no parameter of an adapter is trained: attach one, and do not freeze it")
    return count


_ZERO = (
    "got a gradient of zero, so it learns nothing: the layer is not part of what the loss depends on, or its output "
    "is cut off from it"
)


def _adapted(model: nn.Module) -> Iterator[str]:
    """Plain full names of the weights that carry an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(True for _ in _own(module)):
            leaf = getattr(module, "parameter_name", None)
            yield plain_name(name) + (f".{leaf}" if isinstance(leaf, str) else "")


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a layer's adapters."""
    return ((name, p) for name, p in layer.named_parameters() if not name.startswith("base_layer."))


def _trained(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Layers with adapters, and their trainable parameters by full name."""
    for layer, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            trained = {f"{layer}.{name}": p for name, p in _own(module) if p.requires_grad}
            if trained:
                yield layer, trained


def _weights(model: nn.Module) -> Iterator[str]:
    """Plain full names of all weights that adapters could go on: of linear layers, embeddings and fused experts."""
    internal: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(internal) and internal and not name.startswith(f"{internal[0]}base_layer"):
            continue
        if isinstance(module, BaseTunerLayer):
            internal = (f"{name}.",)
        elif isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            yield plain_name(name)
        else:
            fused = list(module.specs) if isinstance(module, QExperts) else expert_projections(module)
            yield from (f"{plain_name(name)}.{leaf}" for leaf in fused)


def plain_name(name: str) -> str:
    """The name that a module had before adapters and wrappers of a training loop put theirs into it."""
    return _INSIDE.sub("", _OUTSIDE.sub("", name))


def _matches(weight: str, name: str, pattern: bool, old: bool = False) -> bool:
    """Whether `name` means a weight; `old`: also by what it was called before it was fused."""
    leaf = weight.rpartition(".")[2]
    if pattern:
        if name == ALL_LINEAR:
            return old or leaf in ("gate_up_proj", "down_proj", "up_proj")
        before = [weight.removesuffix(leaf) + former for former, fused in _FUSED.items() if old and fused == leaf]
        return any(re.fullmatch(name, candidate) for candidate in [weight, *before])
    head, _, last = name.rpartition(".")
    named = [name, *([f"{head}.{_FUSED[last]}".lstrip(".")] if old and last in _FUSED else [])]
    return any(weight == candidate or weight.endswith(f".{candidate}") for candidate in named)


def _leaves_out(model: nn.Module) -> bool:
    """Whether the config of some adapter restricts it to some layers."""
    holders: Iterator[Any] = (m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict))
    configs: dict[str, Any] = next((holder.peft_config for holder in holders), {})
    restricting = ("layers_to_transform", "exclude_modules")
    return any(getattr(config, option, None) for config in configs.values() for option in restricting)


def _reaches_nothing(name: str, weights: list[str]) -> str:
    known = sorted({_short(weight) for weight in weights})
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"target {name!r} reaches no weight; those of this model are {', '.join(known)}{hint}{_how(weights)}"


def _reaches_some(name: str, reached: list[str], missed: list[str]) -> str:
    some = f"target {name!r} reaches {len(reached)} weights ({reached[0]}, ...) but not {len(missed)} others that it"
    return f"{some} names ({missed[0]}, ...){_how(missed)}"


def _short(weight: str) -> str:
    """The part of a name by which a config would call it."""
    parts = weight.split(".")
    return ".".join(parts[-2:]) if parts[-1] in (*_FUSED.values(), "up_proj") and "experts" in parts else parts[-1]


def _how(weights: list[str]) -> str:
    """How fused experts are named, if there are any among them."""
    fused = sorted({_short(weight) for weight in weights if "." in _short(weight)})
    return f"; fused experts are named in target_parameters: {fused}" if fused else ""
