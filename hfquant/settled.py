"""The part of a block that is quantized first runs once, and not again: its output is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .chain import Stub
from .hidden import HiddenStates
from .matrices import Group, first_tensor

After = tuple[None, ...] | None
"""What follows the first value that a module gives back: None if it gives a tensor alone, otherwise only None."""

Ends = dict[nn.Module, tuple[nn.Module, After]]
"""The children of a block whose output is what a module inside them gives, with that module."""


class Settled:
    """What the first part of a block, most often its attention, gives back for each batch.

    It is settled when no matrix up to its end is going to change. Its output is then kept while the statistics of the
    layers after it are gathered. Where the part ends with a matrix, that one's input is kept a pass earlier already,
    and the output follows from it: nothing before the matrix runs a second time. Only what is no larger than the
    hidden states is kept, in `outputs`.
    """

    def __init__(self, block: nn.Module, groups: list[Group], ends: Ends, outputs: HiddenStates) -> None:
        """`groups`: of the matrices of `block` that are quantized, in the order of their calls."""
        self.block, self.outputs = block, outputs
        self.name, self.part = _first_part(block, groups)
        inside = set(self.part.modules())
        mine = [group for group in groups if any(matrix.module in inside for matrix in group.targets)]
        self._open = {id(group) for group in mine}
        self._end: nn.Module | None = None
        self.after: After = None
        if self.part in ends:
            self._end, self.after = ends[self.part]
        if self._end is not None and [matrix.module for matrix in mine[-1].matrices] != [self._end]:
            self._end = None
        self._last = {id(group) for group in mine[-1:]}

    def finish(self, stage: Iterable[Group]) -> None:
        """The matrices of some groups have their final values, as have all that are called before them."""
        self._open -= {id(group) for group in stage}
        if self._end is not None and not self._open:
            for number in self.outputs.numbers():
                self.outputs[number] = self._end(self.outputs[number])
            self._end = None

    def is_known(self, numbers: Iterable[int]) -> bool:
        """Whether the output of the part for all these batches is kept, so that it is not going to run again."""
        return not self._open and all(number in self.outputs for number in numbers)

    @contextmanager
    def instead(self, number: int, entering: Tensor, keep: bool) -> Iterator[None]:
        """While the block runs on the hidden states `entering` of a batch, answer for the part that is settled.

        If its output is not known yet, `keep` it.
        """
        if not self._open and self.name and number in self.outputs:
            setattr(self.block, self.name, Stub(self.part, lambda call, hidden: self._answer(number)))
            try:
                yield
            finally:
                setattr(self.block, self.name, self.part)
            return
        hook = self._watch(number, entering.numel()) if keep else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _answer(self, number: int) -> Any:
        output = self.outputs[number].clone()  # blocks may write into it
        return output if self.after is None else (output, *self.after)

    def _watch(self, number: int, size: int) -> RemovableHandle | None:
        """Note the output of the part when the block runs, or the input of the matrix at its end."""

        def note(value: Tensor) -> None:
            if value.numel() <= size:
                self.outputs[number] = value.clone()

        def entered(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            note(first_tensor(args, kwargs))

        def left(module: nn.Module, args: tuple, output: Any) -> None:
            if plain := _plain(output):
                first, self.after = plain
                note(first)

        if not self._open:
            return self.part.register_forward_hook(left)
        if self._end is not None and self._open == self._last:
            return self._end.register_forward_pre_hook(entered, with_kwargs=True, prepend=True)
        return None


@contextmanager
def find_ends(block: nn.Module) -> Iterator[Ends]:
    """Note the ends of the children of a block while it runs."""
    found: Ends = {}
    latest: list[tuple[nn.Module, Any]] = []

    def leaf(module: nn.Module, args: tuple, output: Any) -> None:
        latest[:] = [(module, output)]

    def child(module: nn.Module, args: tuple, output: Any) -> None:
        plain = _plain(output)
        if plain and latest and plain[0] is latest[0][1]:
            found[module] = (latest[0][0], plain[1])

    parts = [part for part in block.children() if next(part.children(), None) is not None]
    leaves = [module for part in parts for module in part.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(leaf) for module in leaves]
    hooks += [part.register_forward_hook(child) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _plain(output: Any) -> tuple[Tensor, After] | None:
    """The only tensor that a module gave back, and what follows it; None if there are others."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    if not isinstance(first, Tensor) or any(value is not None for value in rest):
        return None
    return first, (None,) * len(rest) if isinstance(output, tuple) else None


def _first_part(block: nn.Module, groups: list[Group]) -> tuple[str, nn.Module]:
    """The child of `block`, with its name, that the first matrix lies in; the block itself if there is none."""
    first = groups[0].targets[0].module if groups else None
    found = ((name, child) for name, child in block.named_children() if any(m is first for m in child.modules()))
    return next(found, ("", block))
