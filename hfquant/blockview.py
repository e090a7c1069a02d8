"""What a transform sees of a block: its matrices, statistics of their inputs, and whether its function still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Call, Chain, first_call, no_cache, stubs
from .errors import CalibrationError
from .matrices import Group, Matrix, Source, identity
from .norms import Norm, find_norms
from .recipe import Recipe

TOLERANCE = 1e-4  # relative change of a block's output in float32 beyond which a rewrite did not preserve it


@dataclass
class Trial:
    """Outcome of a rewrite: `error` is the relative change of the block's output, `held` whether it was kept."""

    what: str
    error: float = 0.0
    held: bool = False


@dataclass(eq=False)
class BlockView:
    """One block of the model, in float32 while transforms work on it.

    `name`: in the model. `groups`: its matrices by the input they read, in the order of their calls. `gather(groups,
    needs)` fills their `stats` from all calibration data. `call` and `probe` [b, l, H]: how to run the block, and a few
    hidden states that enter it. `shared`: what a transform remembers from block to block. `notes`: remarks for the
    report. `skip`: modules that the user wants left alone, which still follow when their input changes.
    """

    name: str
    module: nn.Module
    groups: list[Group]
    recipe: Recipe
    call: Call
    probe: Tensor
    gather: Callable[[list[Group], frozenset[str]], None]
    shared: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = self.output()

    def output(self) -> Tensor:
        """The block's output [b, l, H] for the probe."""
        return self.call.run(self.module, self.probe)

    def collect(self, *needs: str) -> None:
        """Fill the `stats` of every group from all calibration data, with the block as it is now."""
        self.gather(self.groups, frozenset(needs))

    def readers(self, group: Group) -> list[Group]:
        """All groups that read the very tensor that `group` reads: a router's and its experts', for example."""
        return [other for other in self.groups if other.source == group.source]

    def moved(self) -> float:
        """Relative change of the block's output against what it was before any rewrite: root mean square over tokens.

        Each token counts alike, as a few that are a thousand times as large as the others are common.
        """
        size = self.expected.norm(dim=-1).clamp_min(torch.finfo(self.expected.dtype).tiny)
        change = ((self.output() - self.expected).norm(dim=-1) / size).square().mean().sqrt()
        return float(change) if torch.isfinite(change) else torch.inf

    @contextmanager
    def attempt(self, what: str, tensors: Sequence[Tensor], tolerance: float = TOLERANCE) -> Iterator[Trial]:
        """Rewrite `tensors` of the block in place; if its output moved they get their values back.

        The trial that is yielded says afterwards whether the rewrite was kept.
        """
        before = [tensor.clone() for tensor in tensors]
        trial = Trial(what)
        self.trials.append(trial)
        try:
            yield trial
            trial.error = self.moved()
            trial.held = trial.error <= tolerance
        finally:
            if not trial.held:
                for tensor, values in zip(tensors, before, strict=True):
                    tensor.copy_(values)


@dataclass(eq=False)
class OutsideView:
    """Everything of a model that is not in a block.

    `embeddings`: the tables whose rows are added up to the hidden states that enter the first block; `norm`: what
    reads the hidden states that leave the last one, None if nothing does so first; `readers`: the matrices that read
    the norm's output; `tied`: whether one of them is one of the tables. `passage(leaving)`: the hidden states
    [b, l, H] that enter the first block for a few tokens, and the model's output for `leaving` [b, l, H], which None
    lets be the same. `untied`: names of matrices that a transform took apart from the tables.
    """

    model: nn.Module
    embeddings: list[nn.Embedding]
    norm: Norm | None
    readers: list[Matrix]
    tied: bool
    passage: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    shared: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)


@torch.no_grad()
def outside_view(model: nn.Module, chain: Chain, batch: Mapping[str, Any], tupled: bool | None = None) -> OutsideView:
    """Look at what is around the blocks of `model` by running it on `batch`.

    `tupled`: whether blocks answer with a tuple; the first one is run to find out if that is None.
    """
    call, entering = first_call(model, chain, batch)
    if tupled is None:
        tupled = isinstance(call.output(chain.holder[0], entering), tuple)
    last = len(chain.holder) - 1
    ends: list[Source] = []

    def passage(leaving: Tensor | None) -> tuple[Tensor, Tensor]:
        entered: list[Tensor] = []

        def answer(index: int, call: Call, hidden: Tensor) -> Any:
            entered.append(hidden)
            if index < last:
                return (hidden,) if tupled else hidden
            out = hidden.clone() if leaving is None else leaving
            ends.append(identity(out))
            return (out,) if tupled else out

        with stubs(chain, answer), no_cache(model):
            output = _main(model(**batch))
        return entered[0], output

    with _called(model, entering.shape[-1]) as embeddings, stubs(chain, lambda index, call, hidden: hidden):
        norms, _ = find_norms("", model, lambda: passage(None))
    norm = next((norm for norm in norms if norm.source == ends[0]), None)
    readers = norm.readers if norm is not None else []
    tables = {table.weight.data_ptr() for table in embeddings}
    tied = any(matrix.values().data_ptr() in tables for matrix in readers)
    return OutsideView(model, embeddings, norm, readers, tied, passage)


def _main(output: Any) -> Tensor:
    """The first tensor of a model's output that is no loss."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return next(value for value in values if isinstance(value, Tensor) and value.dim() > 1)


@contextmanager
def _called(model: nn.Module, width: int) -> Iterator[list[nn.Embedding]]:
    """Note the embeddings of a `width` that are called."""
    found: list[nn.Embedding] = []

    def note(module: nn.Module, args: tuple) -> None:
        if isinstance(module, nn.Embedding) and module not in found:
            found.append(module)

    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    hooks = [module.register_forward_pre_hook(note) for module in tables]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Let the floating-point parameters of a block be float32 for a while; unchanged ones come back bit for bit."""
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters() if parameter.is_floating_point()}
    parameters = dict(block.named_parameters())
    for name in dtypes:
        parameters[name].data = parameters[name].data.float()
    try:
        yield
    finally:
        for name, dtype in dtypes.items():
            parameters[name].data = _narrowed(parameters[name].data, dtype, name)


def _narrowed(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in a dtype of fewer bits. Raises CalibrationError if a transform made them too large for it."""
    narrow = values.to(dtype)
    if torch.isfinite(values).all() and not torch.isfinite(narrow).all():
        raise CalibrationError(
            f"a transform made values of {name} too large for {dtype}: quantize in bfloat16 or float32 (dtype=...), or "
            "leave the transform out"
        )
    return narrow
