"""The matrices of a block of the model, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .errors import CalibrationError
from .experts import RoutedExperts, expert_projections, why_not_experts
from .hadamard import hadamard
from .stats import InputStats

Seen = Callable[["Group", Tensor], None]
Source = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight W [N, K] of y = x W^T + b, wherever it lies: a linear layer, GPT-2's transposed one, one of the experts.

    `name`: in the model, "…experts.gate_up_proj[3]" for an expert. `target`: whether it is going to be quantized; a
    router, which is not, still has to follow when its input is scaled.
    """

    name: str
    module: nn.Module
    parameter: str
    target: bool
    transposed: bool = False
    expert: int | None = None

    def values(self) -> Tensor:
        """The weight [N, K] itself, not a copy: a change in place changes the model."""
        found = self.module._parameters[self.parameter]
        assert found is not None
        weight = found.data if self.expert is None else found.data[self.expert]
        return weight.T if self.transposed else weight

    def release(self) -> None:
        """Forget the weight of a layer that was replaced in the model, which may be as large as all the others."""
        if self.expert is None:
            self.module._parameters.clear()

    def bias(self) -> Tensor | None:
        """The bias [N] itself, or None."""
        name = "bias" if self.expert is None else f"{self.parameter}_bias"
        found = self.module._parameters.get(name)
        if found is None:
            return None
        return found.data if self.expert is None else found.data[self.expert]


@dataclass(eq=False)
class Group:
    """Matrices that read the same input tensor, in the order in which they are called.

    `source`: identity of that tensor; the experts of a layer are groups of their own, as each sees other tokens, but
    their first projections share the source with the router. `stats`: what the last collection saw. `rotated`: the
    weights are going to be quantized in the Hadamard basis of their input.
    """

    source: Source
    matrices: list[Matrix] = field(default_factory=list)
    stats: InputStats | None = None
    rotated: bool = False

    def basis(self, x: Tensor) -> Tensor:
        """The tokens `x` [T, K] in the basis that the weights are quantized in."""
        return hadamard(x) if self.rotated else x

    @property
    def name(self) -> str:
        """The first matrix' name."""
        return self.matrices[0].name

    @property
    def features(self) -> int:
        """Width K of the input."""
        return self.matrices[0].values().shape[1]

    @property
    def targets(self) -> list[Matrix]:
        """The matrices to quantize."""
        return [matrix for matrix in self.matrices if matrix.target]


class OpenExperts(RoutedExperts):
    """Mixed into the class of an experts module: its own weights, and a look at the input of each projection."""

    seen: Callable[[str, int, Tensor, Tensor], None]

    def _project(self, projection: str, x: Tensor, expert: int, token: Tensor) -> Tensor:
        self.seen(projection, expert, x, token)
        weight = self._parameters[projection][expert]  # type: ignore[index]
        y = x @ weight if self.is_transposed else x @ weight.T
        bias = self._bias_of(projection, expert)
        return y if bias is None else y + bias


@contextmanager
def opened(module: nn.Module, seen: Callable[[str, int, Tensor, Tensor], None]) -> Iterator[None]:
    """Run the experts of `module` one by one and call `seen(projection, expert, x, token)` before each projection."""
    original = type(module)
    module.__class__ = type(f"Open{original.__name__}", (OpenExperts, original), {})
    module.seen = seen  # type: ignore[assignment]
    try:
        yield
    finally:
        module.__class__ = original
        vars(module).pop("seen", None)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a bank of experts that `opened` can run."""
    return bool(expert_projections(module)) and why_not_experts(module) is None


def find_matrices(name: str, module: nn.Module, targets: Collection[str]) -> list[Matrix]:
    """The matrices that `module` (its name in the model is `name`) owns, none for embeddings and convolutions.

    `targets`: names of the modules that are to be quantized.
    """
    if is_experts(module):
        banks = {projection: module._parameters[projection] for projection in expert_projections(module)}
        turned = bool(module.is_transposed)
        return [
            Matrix(f"{name}.{projection}[{expert}]", module, projection, name in targets, turned, expert)
            for projection, bank in banks.items()
            for expert in range(len(bank))  # type: ignore[arg-type]
        ]
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return []
    return [Matrix(name, module, "weight", name in targets, type(module).__name__ == "Conv1D")]


def trace(prefix: str, block: nn.Module, targets: Collection[str], run: Callable[[], Any]) -> list[Group]:
    """The groups of a block in the order of their calls, found by running it once.

    Matrices of the same input are recognised by the identity of the tensor, whatever the architecture calls them. A
    matrix that is not called is in no group.
    """
    order: list[tuple[Source, Matrix]] = []
    alive: list[Tensor] = []  # so that no two inputs have the same address
    owners = _owners(prefix, block, targets)

    def note(matrices: list[Matrix]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            alive.append(x)
            order.extend((identity(x), matrix) for matrix in matrices)

        return hook

    hooks = []
    for module, matrices in owners:
        first = matrices if not is_experts(module) else [m for m in matrices if m.parameter != "down_proj"]
        hooks.append(module.register_forward_pre_hook(note(first), with_kwargs=True))
        order_after = [m for m in matrices if m not in first]
        if order_after:
            hooks.append(module.register_forward_hook(_note_inner(order, order_after)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return _grouped(order)


def _note_inner(order: list[tuple[Source, Matrix]], matrices: list[Matrix]) -> Callable[..., None]:
    """Hook that notes the second projections of experts, each with an input of its own."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        order.extend(((id(matrix), 0, 0), matrix) for matrix in matrices)

    return hook


def _owners(prefix: str, block: nn.Module, targets: Collection[str]) -> list[tuple[nn.Module, list[Matrix]]]:
    named = ((f"{prefix}.{name}".strip("."), module) for name, module in block.named_modules())
    found = ((module, find_matrices(name, module, targets)) for name, module in named)
    return [(module, matrices) for module, matrices in found if matrices]


def _grouped(order: list[tuple[Source, Matrix]]) -> list[Group]:
    groups: dict[Any, Group] = {}
    placed: set[Matrix] = set()
    for source, matrix in order:
        if matrix in placed:  # a layer that is called twice belongs to its first call
            continue
        placed.add(matrix)
        key = (source, matrix.expert)
        groups.setdefault(key, Group(source)).matrices.append(matrix)
    return list(groups.values())


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module was called with."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def identity(x: Tensor) -> Source:
    """What tells a tensor from others, as long as it is alive."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel()


class Enough(Exception):
    """Ends a forward pass of which the rest is not needed."""


@contextmanager
def watch(groups: list[Group], seen: Seen, mask: Callable[[], Tensor | None], stop: bool) -> Iterator[None]:
    """While the block runs, call `seen(group, x [T, K])` with the tokens that reach each group.

    `mask()`: which positions [B, L] of the running batch are no padding, None for all. `stop`: raise `Enough` when
    every group has been reached.
    """
    hooks, closing = [], []
    missing: set[int] = set()
    waiting = [group for group in groups if group.matrices[0].expert is None]
    banks = {id(g.matrices[0].module): g.matrices[0].module for g in groups if g.matrices[0].expert is not None}

    def reached(key: int) -> None:
        missing.discard(key)
        if stop and not missing:
            raise Enough

    def linear(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen(group, tokens(first_tensor(args, kwargs), mask(), group.name))
            reached(id(group))

        return hook

    missing.update([*map(id, waiting), *banks])
    for group in waiting:
        hooks.append(group.matrices[0].module.register_forward_pre_hook(linear(group), with_kwargs=True))
    for bank in banks.values():
        closing.append(opened(bank, _expert_hook(groups, bank, seen, mask)))
        hooks.append(bank.register_forward_hook(lambda module, args, output: reached(id(module))))
    try:
        for opening in closing:
            opening.__enter__()
        yield
    finally:
        for opening in closing:
            opening.__exit__(None, None, None)
        for hook in hooks:
            hook.remove()


def _expert_hook(
    groups: list[Group], bank: nn.Module, seen: Seen, mask: Callable[[], Tensor | None]
) -> Callable[[str, int, Tensor, Tensor], None]:
    by_projection = {
        (matrix.parameter, matrix.expert): group
        for group in groups
        for matrix in group.matrices[:1]
        if matrix.module is bank
    }

    def hook(projection: str, expert: int, x: Tensor, token: Tensor) -> None:
        group = by_projection.get((projection, expert))
        if group is not None:
            keep = mask()
            seen(group, x if keep is None else x[keep.flatten()[token]])

    return hook


def tokens(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The tokens [T, K] of an input [..., K] that are no padding by `mask` [B, L].

    Raises CalibrationError where positions cannot be told from the shape.
    """
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or (x.dim() == 2 and x.shape[0] == mask.shape[0] != mask.numel()):  # one vector a sample
        return flat
    if flat.shape[0] != mask.numel():
        raise CalibrationError(
            f"{name} sees {tuple(x.shape)}, the batch has positions {tuple(mask.shape)}: padding cannot be told from "
            "tokens there. Give data without padding (packing=True)"
        )
    return flat[mask.flatten()]
