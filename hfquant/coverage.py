"""Which modules of a model are quantized, which are not and why, and what share of the bytes that is."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import SpecError
from .experts import expert_projections, why_not_experts


@dataclass(frozen=True)
class Target:
    """A module to quantize; `kind` is "linear", "conv1d", "embedding" or "experts"."""

    name: str
    kind: str


@dataclass(frozen=True)
class Skip:
    """A module left in full precision: its own bytes, and the reason.

    `eligible`: it has a quantized form and was left alone by choice.
    """

    name: str
    bytes: int
    reason: str
    eligible: bool = False


@dataclass(frozen=True)
class Coverage:
    """Share of a model's parameter bytes (in the dtype it is loaded in) that is quantized."""

    total: int
    quantized: int
    skipped: tuple[Skip, ...]

    @property
    def share(self) -> float:
        """Quantized bytes over all bytes, 0 to 1."""
        return self.quantized / self.total if self.total else 0.0

    def by_reason(self) -> dict[str, tuple[int, list[str]]]:
        """Skipped bytes and module names for each reason, most bytes first."""
        groups: dict[str, list[Skip]] = defaultdict(list)
        for skip in self.skipped:
            groups[skip.reason].append(skip)
        sums = {
            reason: (sum(skip.bytes for skip in group), [s.name for s in group]) for reason, group in groups.items()
        }
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def line(self) -> str:
        """One line for people."""
        parts = []
        for reason, (size, names) in self.by_reason().items():
            what = names[0] if len(names) == 1 else f"{len(names)} modules"
            parts.append(f"{what} {size / max(self.total, 1):.1%} ({reason})")
        rest = "; kept: " + ", ".join(parts) if parts else ""
        return f"quantized {self.share:.1%} of {self.total / 1e6:.1f} MB of weights{rest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        skipped = [vars(skip) for skip in self.skipped]
        return {"total_bytes": self.total, "quantized_bytes": self.quantized, "share": self.share, "skipped": skipped}


def survey(
    model: nn.Module,
    skip: list[str] | dict[str, str] | None,
    embeddings: bool,
    held: frozenset[str] = frozenset(),
) -> tuple[list[Target], Coverage]:
    """Look at every module with parameters of its own and decide.

    `skip`: the user's modules_to_not_convert, None for the defaults, or a dict with a reason for each. `held`: modules
    in the checkpoint that this dict is from; those that it does not list are packed there. A tied weight is never a
    target: packing one end would break the tie.
    """
    reasons = _skip_reasons(model, skip, held)
    targets: list[Target] = []
    skipped: list[Skip] = []
    total = quantized = 0
    # On the meta device tied weights are still apart: the end that is filled by tying is not counted.
    seen: set[int] = {id(model.get_parameter(name)) for name in _tied_ends(model)}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        size = sum(parameter.numel() * parameter.element_size() for parameter in own)
        if not size:
            continue
        total += size
        kind, reason = _kind(module, embeddings)
        listed = None if kind is None else _listed(model, name, reasons)
        if kind is None or listed:
            skipped.append(Skip(name, size, listed or reason, eligible=kind is not None))
            continue
        targets.append(Target(name, kind))
        packed = sum(p.numel() * p.element_size() for p in own if p.dim() >= 2 and not _is_bias(module, p))
        quantized += packed
        if size > packed:
            skipped.append(Skip(f"{name}.bias", size - packed, "biases"))
    return targets, Coverage(total, quantized, tuple(skipped))


def _tied_ends(model: Any) -> list[str]:
    """Names of the parameters that are copies of others."""
    names = dict(model.named_parameters(remove_duplicate=False))
    pairs = model.all_tied_weights_keys.items()
    return [end for end, source in pairs if {end, source} <= names.keys() and names[end] is not names[source]]


def aliases(model: Any, name: str) -> list[str]:
    """The names that a module may have in a checkpoint saved with, or without, a head around the base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


def _listed(model: nn.Module, name: str, reasons: dict[str, str]) -> str | None:
    """Reason why a module is to be left alone, or None."""
    for pattern, reason in reasons.items():
        if not all(should_convert_module(alias, [pattern]) for alias in aliases(model, name)):
            return reason
    return None


def _is_bias(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter of an experts module is one of its biases [E, N]."""
    return any(p is parameter and name.endswith("_bias") for name, p in module.named_parameters(recurse=False))


def _skip_reasons(model: Any, skip: list[str] | dict[str, str] | None, held: frozenset[str]) -> dict[str, str]:
    """Pattern -> reason, for modules that are left alone by request, by default or because they are tied."""
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    reasons = {f"{key}$": "tied weights" for key in tied}
    if isinstance(skip, dict):
        reasons |= {f"{name}$": reason for name, reason in skip.items()}
        if type(model).__name__ in (model.config.architectures or []):
            return reasons  # another class may have a head of its own, which the checkpoint does not hold
    elif skip is not None:
        _check_patterns(model, skip)
        return reasons | dict.fromkeys(skip, "in modules_to_not_convert")
    defaults = [
        key for key in get_keys_to_not_convert(model) if key not in tied and held.isdisjoint(aliases(model, key))
    ]
    return reasons | {f"{key}$": "output layer, kept by default" for key in defaults}


def _check_patterns(model: Any, patterns: list[str]) -> None:
    """Raise SpecError for a pattern that matches no module: a typing error would quantize what was to be kept."""
    names = [alias for name, _ in model.named_modules() for alias in aliases(model, name)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise SpecError(f"modules_to_not_convert: {pattern!r} is no regular expression: {error}") from error
        if all(should_convert_module(name, [pattern]) for name in names):
            raise SpecError(
                f"modules_to_not_convert: {pattern!r} matches no module of {type(model).__name__}. Give a full name, "
                f"the end of one, or a regular expression that starts at the beginning, such as '.*{pattern}'"
            )


def _kind(module: nn.Module, embeddings: bool) -> tuple[str | None, str]:
    """Kind of target, or None and the reason why the module cannot be one."""
    if type(module) is nn.Linear:
        return "linear", ""
    if type(module) is Conv1D:
        return "conv1d", ""
    if type(module) is nn.Embedding:
        if not embeddings:
            return None, "embeddings, kept unless embeddings=True"
        return ("embedding", "") if module.max_norm is None else (None, "embedding with max_norm renormalises itself")
    if expert_projections(module):
        reason = why_not_experts(module)
        return (None, reason) if reason else ("experts", "")
    if all(parameter.dim() < 2 for parameter in module.parameters(recurse=False)):
        return None, "norms and other vectors"
    return None, f"{type(module).__name__} has no quantized form"
