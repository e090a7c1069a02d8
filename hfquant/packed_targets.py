"""Adapters that were meant for packed weights and did not reach them are refused: they would train nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .errors import UnsupportedError
from .experts import QExperts
from .nn import PackedModule


def refuse_unreached(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Raise UnsupportedError if an adapter in PEFT's `configs` names a packed weight as a parameter and is not on it.

    PEFT only warns when it finds no parameter of a name, and not even that when it finds others.
    """
    for adapter, config in configs.items():
        for wanted in sorted(getattr(config, "target_parameters", None) or ()):
            for full, module in _unreached(model):
                if full == wanted or full.endswith(f".{wanted}"):
                    raise UnsupportedError(
                        f"adapter {adapter!r} targets the parameter {full}, which is packed, and did not reach it: "
                        + _instead(full, module)
                    )


def _unreached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names of packed weights that no adapter wraps as a parameter, without what adapters put into names."""
    wrapped: set[tuple[int, str]] = set()
    for _, module in model.named_modules():
        inside = module
        while isinstance(getattr(inside, "base_layer", None), nn.Module):
            inside = inside.base_layer
        if inside is not module and isinstance(getattr(module, "parameter_name", None), str):
            wrapped.add((id(inside), module.parameter_name))
    for name, module in model.named_modules():
        leaves = [*module.specs] if isinstance(module, QExperts) else ["weight"] * isinstance(module, PackedModule)
        for leaf in leaves:
            if (id(module), leaf) not in wrapped:
                yield f"{name.replace('.base_layer', '')}.{leaf}", module


def _instead(full: str, module: nn.Module) -> str:
    if isinstance(module, QExperts):
        return (
            "adapt it with stock LoRA, leave it in full precision with modules_to_not_convert="
            f'["{full.split(".")[-2]}"], or adapt other modules'
        )
    return f'name the module in target_modules instead, "{full.split(".")[-2]}"'
