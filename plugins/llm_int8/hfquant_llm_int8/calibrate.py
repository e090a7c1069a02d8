"""Calibration: a fixed set of outlier columns, so that results do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.errors import SpecError


@torch.no_grad()
def find_outliers(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], threshold: float = 6.0
) -> dict[str, list[int]]:
    """Run a full-precision model and note the input columns of each linear layer that reach `threshold`.

    `batches`: token ids [B, L] int64, or dicts of the model's inputs; every position counts, so leave padding out.
    Returns sorted columns by module name, [] where none reached it: the `outliers` of the method "llm_int8". Modules
    with a matrix `weight` that are no embeddings count as linear. Raises SpecError if there are none or no batches.
    """
    if not threshold > 0:
        raise SpecError(f"threshold is a magnitude above 0, got {threshold!r}")
    reached: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x: Tensor = (*inputs, *named.values())[0]
            large = (x.abs() >= threshold).flatten(0, -2).any(0).cpu()
            reached[name] = reached[name] | large if name in reached else large

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in _linears(model)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not reached:
        raise SpecError("find_outliers saw no linear layer run: give batches, and a model that is not quantized yet")
    return {name: large.nonzero().flatten().tolist() for name, large in reached.items()}


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that own a matrix called "weight": `nn.Linear` and the likes of GPT-2's `Conv1D`."""
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found.append((name, module))
    return found
