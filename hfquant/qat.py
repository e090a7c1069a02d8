"""Quantization-aware training: a model that computes what its quantized form will, while its own weights train.

`prepare_qat` changes, in place, the forward pass of the modules that a config would quantize. Names, parameters, hooks
and the state dict stay: optimizers, checkpoints and gradient checkpointing see an ordinary model. Source: LLM-QAT (Liu
et al. 2023, arXiv:2305.17888), for every recipe that needs no calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .columns import wants_producers
from .config import HfQuantConfig
from .coverage import survey
from .errors import SpecError, UnsupportedError
from .experts import RoutedExperts, expert_projections
from .input_ranges import INPUT_RANGES, searches_dynamic
from .qtensor import Outliers
from .quantize import choose_columns, for_table, needs
from .recipe import Recipe
from .spec import InputSpec
from .stats import Stats
from .straight_through import fake_input, fake_weight
from .swap import packed_modules

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Fake:
    """How a module is going to be quantized: its `name` in the model, its `kind` as of a `Target`, the recipe."""

    name: str
    kind: str
    recipe: Recipe


class FakeQuantized(nn.Module):
    """Mixed into the class of a module whose weights are seen as they will be after quantization."""

    original: type[nn.Module]
    fake: Fake

    def extra_repr(self) -> str:
        """What the original class says, and the grid."""
        return f"{super().extra_repr()}, fake={self.fake.recipe.scheme.weight.grid}".removeprefix(", ")


class FakeMatrix(FakeQuantized):
    """y = x W^T + b of a linear layer, or GPT-2's transposed one, as `QLinear` on the reference kernel computes it."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., N] in the dtype of `input` [..., K], under autocast in its dtype."""
        w = self.weight.T.contiguous() if self.fake.kind == "conv1d" else self.weight
        seen, outliers = fake_weight(w, self.fake.recipe, Stats(self.fake.name))
        return _linear(input, seen, self.bias, self.fake.recipe.scheme.input, outliers)


class FakeTable(FakeQuantized):
    """Rows of an embedding table [V, H]; all of it is quantized with every call."""

    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings [..., H] of token ids `input` [...] int64."""
        seen, _ = fake_weight(self.weight, self.fake.recipe, Stats(self.fake.name))
        return F.embedding(input, seen, self.padding_idx)


class FakeExperts(FakeQuantized, RoutedExperts):
    """Fused experts, run one after the other; each is quantized as a matrix of its own when it has tokens."""

    _columns: dict[str, Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of `RoutedExperts`; every expert keeps the 16-bit columns that any of them asks for, as `QExperts` do."""
        recipe, self._columns = self.fake.recipe, {}
        if recipe.columns.name != "none":
            with torch.no_grad():
                for projection in expert_projections(self):
                    count = len(self._parameters[projection])  # type: ignore[arg-type]
                    each = ((self._matrix(projection, e), self._stats(projection, e)) for e in range(count))
                    self._columns[projection] = torch.cat([choose_columns(w, recipe, s) for w, s in each]).unique()
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _matrix(self, projection: str, expert: int) -> Tensor:
        """The weight [N, K] of one expert."""
        w: Tensor = self._parameters[projection][expert]  # type: ignore[index]
        return w.T.contiguous() if self.is_transposed else w

    def _stats(self, projection: str, expert: int) -> Stats:
        return Stats(f"{self.fake.name}.{projection}[{expert}]", grid_is_given=True)

    def _project(self, projection: str, x: Tensor, expert: int, token: Tensor) -> Tensor:
        w, stats = self._matrix(projection, expert), self._stats(projection, expert)
        seen, outliers = fake_weight(w, self.fake.recipe, stats, self._columns.get(projection))
        return _linear(x, seen, self._bias_of(projection, expert), self.fake.recipe.scheme.input, outliers)


def _linear(x: Tensor, seen: Tensor, bias: Tensor | None, given: InputSpec | None, outliers: Outliers | None) -> Tensor:
    """y [..., N] = x [..., K] @ seen^T + bias, with `x` quantized as `given`: then in float32, autocast or not."""
    if given is None:
        return F.linear(x, seen, bias)
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    with torch.autocast(device, enabled=False):
        y = F.linear(fake_input(x, given, outliers), seen, None if bias is None else bias.float())
    return y.to(x.dtype)


_CLASSES = {"linear": FakeMatrix, "conv1d": FakeMatrix, "embedding": FakeTable, "experts": FakeExperts}


@cache
def _fake_class(kind: str, original: type[nn.Module]) -> type[FakeQuantized]:
    """One class for each class of modules."""
    return type(f"Fake{original.__name__}", (_CLASSES[kind], original), {"original": original})


def fake_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantized]]:
    """The modules of `model` that `prepare_qat` changed, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantized):
            yield name, module


def prepare_qat(model: Model, config: HfQuantConfig) -> Model:
    """Let `model` compute what it will after quantization by `config`; returns it, changed in place.

    What is quantized is what `from_pretrained` would quantize: linear layers, GPT-2's transposed ones, fused experts,
    and embeddings if the config says so. Weights keep their dtype (load the model in float32) and get straight-through
    gradients; until `finish_qat` each forward pass quantizes them again.

    Raises UnsupportedError for recipes that calibrate or transform, and for models that are quantized already;
    SpecError for a model that is prepared already, or without a module that `config` quantizes.
    """
    if reason := why_not(config.recipe):
        raise UnsupportedError(f"method {config.method!r} cannot be trained through: {reason}")
    if next(packed_modules(model), None):
        raise UnsupportedError(
            f"{type(model).__name__} is quantized, and codes do not train: prepare the model in full precision, or "
            "train adapters on this one"
        )
    if next(fake_modules(model), None):
        raise SpecError(f"{type(model).__name__} is prepared already: call finish_qat before another config")
    targets, coverage = survey(model, config.modules_to_not_convert, config.embeddings)
    if not targets:
        raise SpecError(f"nothing in {type(model).__name__} is quantized by {config.method!r}: {coverage.line()}")
    for target in targets:
        module = model.get_submodule(target.name)
        recipe = for_table(config.recipe) if target.kind == "embedding" else config.recipe
        module.__class__ = _fake_class(target.kind, type(module))  # type: ignore[arg-type]  # see to_packed_experts
        module.fake = Fake(target.name, target.kind, recipe)  # type: ignore[assignment]
    return model


def finish_qat(model: Model) -> Model:
    """Undo `prepare_qat`: the ordinary model with the trained weights, in place.

    Saved and quantized with the same config, at the dtype that it was trained in, it computes what it computed while it
    was trained. Raises SpecError for a model that was not prepared.
    """
    found = [module for _, module in fake_modules(model)]
    if not found:
        raise SpecError(f"{type(model).__name__} is not prepared: prepare_qat(model, config) comes first")
    for module in found:
        module.__class__ = module.original  # type: ignore[assignment]
        vars(module).pop("_columns", None)
        del module.fake
    return model


def why_not(recipe: Recipe) -> str | None:
    """Reason why weights cannot be trained through a recipe, and what to do, or None."""
    given = recipe.scheme.input
    if recipe.transforms:
        names = ", ".join(step.name for step in recipe.transforms)
        return f"it rewrites the model before it is quantized ({names}): leave transforms out (transform=None)"
    if recipe.attention is not None:
        return "it quantizes the operands of attention's products: leave them alone (attention=False)"
    if given is not None and not given.dynamic:
        return "static ranges of inputs come from calibration, and inputs change in training: use dynamic ranges"
    if read := needs(recipe):
        return (
            f"its stages read calibration data ({', '.join(sorted(read))}), which changes with the weights: use a "
            'method that rounds to nearest, such as "int4"'
        )
    if wants_producers(recipe.columns.name):
        return "its 16-bit columns are chosen by the layers before, which change in training: leave outliers out"
    if given is not None and searches_dynamic(INPUT_RANGES.get(recipe.input_range.name)):
        return f"the input range {recipe.input_range.name!r} is a search on calibration data: use 'absmax'"
    return None
