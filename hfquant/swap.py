"""Replace the modules of a model by their packed forms, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .attention import CHILD, Operands, use
from .config import HfQuantConfig
from .coverage import Target, aliases
from .errors import FormatError
from .experts import QExperts, expert_projections, to_packed_experts, to_plain_experts
from .nn import PackedModule, QEmbedding, QLinear, adopt
from .quantize import choose_columns, for_table, pack, pack_empty, quantize_linear
from .recipe import Recipe
from .spec import Scheme
from .stats import Stats


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule | QExperts]]:
    """All packed modules of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule | QExperts):
            yield name, module


def swap_in(
    model: nn.Module,
    targets: Iterable[Target],
    recipe: Recipe,
    config: HfQuantConfig | None = None,
    wait: bool = False,
) -> None:
    """Replace each target by a packed module with empty tensors on the meta device.

    `config`: has what is recorded of single weights. `wait`: keep full-precision placeholders beside them, for weights
    that arrive unquantized.
    """
    for target in targets:
        module = model.get_submodule(target.name)
        if target.kind == "experts":
            names = {leaf: f"{target.name}.{leaf}" for leaf in expert_projections(module)}
            facts = {leaf: _facts(model, name, recipe, config) for leaf, name in names.items()}
            _swap_experts(module, facts, wait)
        else:
            made = for_table(recipe) if target.kind == "embedding" else recipe
            _swap_matrix(model, target, module, _facts(model, target.name, made, config), wait)


def swap_in_operands(model: nn.Module, records: Any, inside: str = "", held: Iterable[str] = ()) -> None:
    """Give attention modules what is recorded of their operands, with empty scales; only those in module `inside`.

    `held`: modules that a checkpoint has tensors for. Raises FormatError for a record that fits no module and for
    operands without a record, UnsupportedError for a model whose attention is its own.
    """
    if not isinstance(records, dict):
        raise FormatError(f"config.json: 'attention' of quantization_config is a mapping, got {records!r}")
    known = {f"{alias}.{CHILD}" for name in records for alias in aliases(model, name)}
    if lost := sorted(name for name in held if f".{name}".endswith(f".{CHILD}") and name not in known):
        raise FormatError(
            f"the files hold {lost[0]}.scale, which config.json does not account for: the files do not belong together"
        )
    named = {alias: module for name, module in model.named_modules() for alias in aliases(model, name)}
    mine = {name: record for name, record in records.items() if f"{name}.".startswith(inside)}
    for name, record in mine.items():
        if name not in named:
            raise FormatError(f"config.json: {type(model).__name__} has no module {name!r} with quantized attention")
        named[name].add_module(CHILD, Operands.parse(record))
    if records:
        use(model)


@dataclass(frozen=True)
class _Facts:
    """What is known of a weight in advance.

    `recipe`: with the numbers of this one. `outliers`: how many columns are in 16 bit; `rotated`: whether its codes are
    in the Hadamard basis of its input.
    """

    recipe: Recipe
    outliers: int = 0
    rotated: bool = False


def _facts(model: nn.Module, name: str, recipe: Recipe, config: HfQuantConfig | None) -> _Facts:
    """What is recorded of a weight, under any of the names it may have in a checkpoint."""
    if config is None:
        return _Facts(recipe)
    names = aliases(model, name)
    own = next((config.schemes[alias] for alias in names if alias in config.schemes), None)
    if own is not None:
        recipe = replace(recipe, scheme=Scheme.from_dict(own))
    outliers = next((config.outlier_columns[alias] for alias in names if alias in config.outlier_columns), 0)
    return _Facts(recipe, outliers, any(alias in config.rotated for alias in names))


def _swap_matrix(model: nn.Module, target: Target, old: nn.Module, facts: _Facts, wait: bool) -> None:
    weight = old.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype
    new: PackedModule
    if isinstance(old, nn.Embedding):
        new = QEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, dtype)
        shape = (old.num_embeddings, old.embedding_dim)
    else:
        rows, cols = reversed(weight.shape) if target.kind == "conv1d" else weight.shape
        shape = (rows, cols)
        bias = old._parameters.get("bias")
        new = QLinear(cols, rows, bias, dtype)
    new.kind = target.kind
    new.hold(*pack_empty(shape, facts.recipe, dtype, facts.outliers, facts.rotated))
    if wait:
        new._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    mark_initialized(new)
    parent, _, leaf = target.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, adopt(new, old))


def _swap_experts(module: nn.Module, facts: dict[str, _Facts], wait: bool) -> None:
    projections = expert_projections(module)
    weights = {projection: module._parameters[projection] for projection in projections}
    first = weights[projections[0]]
    assert first is not None
    experts = to_packed_experts(module, first.dtype)
    for projection, weight in weights.items():
        assert weight is not None
        count, rows, cols = weight.shape
        shape = (cols, rows) if experts.is_transposed else (rows, cols)
        found = facts[projection]
        packed, spec = pack_empty(shape, found.recipe, weight.dtype, found.outliers, found.rotated)
        experts.hold(projection, {key: t.expand(count, *t.shape) for key, t in packed.items()}, spec)
        if not wait:
            del experts._parameters[projection]
    mark_initialized(experts)


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising a packed module, which would dequantize every weight."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def quantize_into(
    module: PackedModule | QExperts, leaf: str, w: Tensor, recipe: Recipe, stats: Stats
) -> dict[str, Tensor]:
    """Quantize the full-precision weight that `module` waits for under `leaf`, and drop its placeholder.

    Returns the packed tensors by parameter name; `module` learns their description but does not hold them yet.
    """
    module._parameters.pop(leaf)
    if isinstance(module, PackedModule):
        if module.kind == "conv1d":
            w = w.T
        recipe = for_table(recipe) if module.kind == "embedding" else recipe
        packed, spec = pack(quantize_linear(w.contiguous(), recipe, stats), recipe)
        module.hold({name: value.to("meta") for name, value in packed.items()}, spec)
        return packed
    packed, spec = _quantize_experts(module, w, recipe, stats)
    module.hold(leaf, {name: value.to("meta") for name, value in packed.items()}, spec)
    return {f"{leaf}_{name}": value for name, value in packed.items()}


def _quantize_experts(module: QExperts, w: Tensor, recipe: Recipe, stats: Stats) -> tuple[dict[str, Tensor], Any]:
    """Quantize a fused weight [E, N, K] (or transposed) expert by expert and stack the packed tensors.

    Stacks need one shape, so every expert keeps the 16-bit columns that any of them asks for.
    """
    matrices = [matrix.contiguous() for matrix in (w.transpose(1, 2) if module.is_transposed else w)]
    labels = [f"{stats.name}[{expert}]" for expert in range(len(matrices))]
    names = [Stats(label, stats.producer_std, grid_is_given=True) for label in labels]
    chosen = [choose_columns(matrix, recipe, name) for matrix, name in zip(matrices, names, strict=True)]
    columns = torch.cat(chosen).unique()
    parts, spec = [], None
    for matrix, name in zip(matrices, names, strict=True):
        packed, spec = pack(quantize_linear(matrix, recipe, name, columns), recipe)
        parts.append(packed)
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}, spec


def swap_out(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every packed module by an ordinary one with dequantized weights in `dtype`, None for its own."""
    for name, module in list(packed_modules(model)):
        wanted = dtype or module.dtype
        if isinstance(module, QExperts):
            to_plain_experts(module, wanted)
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adopt(_restore(module, wanted), module))


def _restore(module: PackedModule, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(module.qtensor().dequantize(dtype))
    new: nn.Module
    with torch.device("meta"):
        if isinstance(module, QEmbedding):
            new = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        elif module.kind == "conv1d":
            new = Conv1D(weight.shape[0], weight.shape[1])
            weight = nn.Parameter(weight.T.contiguous())
        else:
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=module._parameters["bias"] is not None)
    new.register_parameter("weight", weight)
    if (bias := module._parameters.get("bias")) is not None:
        new.register_parameter("bias", nn.Parameter(bias.to(dtype)))
    return new
