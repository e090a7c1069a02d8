"""The chain of blocks that makes up a model, and what each block is called with besides the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .matrices import Enough


@dataclass(frozen=True)
class Chain:
    """The blocks of a model, called one after the other: `holder` is their list, `name` its name in the model."""

    name: str
    holder: nn.ModuleList

    def names(self) -> list[str]:
        """Names of the blocks in the model."""
        return [f"{self.name}.{index}" for index in range(len(self.holder))]


def find_chain(model: nn.Module) -> Chain:
    """The outermost list of modules that holds most of the model's parameters.

    Raises UnsupportedError for a model without one, or with several (an encoder and a decoder).
    """
    found: list[Chain] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{chain.name}.") for chain in found)
        if isinstance(module, nn.ModuleList) and len(module) and _size(module) and not inside:
            found.append(Chain(name, module))
    large = [chain for chain in found if _size(chain.holder) > 0.1 * max(_size(c.holder) for c in found)]
    if len(large) == 1:
        return large[0]
    kind = type(model).__name__
    if not large:
        raise UnsupportedError(f"{kind} has no list of blocks to calibrate one after the other: use a data-free method")
    names = ", ".join(chain.name for chain in large)
    raise UnsupportedError(f"{kind} has several chains of blocks ({names}): only one can be calibrated so far")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class Call:
    """How a block is called for one batch: everything but the hidden states."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None  # name of the hidden states, if they are not the first positional argument

    def output(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block gives back for `hidden`."""
        if self.keyword is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.keyword: hidden}, **self.kwargs)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states that the block makes of `hidden`."""
        output = self.output(block, hidden)
        return output[0] if isinstance(output, tuple) else output

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with floating-point tensors (masks, positions) in `dtype`."""
        return Call(_cast(self.args, dtype), _cast(self.kwargs, dtype), self.keyword)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value


class Stub(nn.Module):
    """Stands for a block, or a part of one: notes how it is called, and answers as the original would."""

    def __init__(self, original: nn.Module, answer: Callable[[Call, Tensor], Any]) -> None:
        super().__init__()
        vars(self)["original"] = original  # not a submodule
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `answer` says."""
        if args:
            return self.answer(Call(args[1:], kwargs), args[0])
        keyword = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        rest = {name: value for name, value in kwargs.items() if name != keyword}
        return self.answer(Call((), rest, keyword), kwargs[keyword])

    def __getattr__(self, name: str) -> Any:  # models ask their blocks what kind of attention they have
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


@contextmanager
def stubs(chain: Chain, answer: Callable[[int, Call, Tensor], Any]) -> Iterator[None]:
    """Put stubs in place of the blocks; `answer(index, call, hidden)` says what each gives back."""
    blocks = list(chain.holder)

    def of(index: int) -> Callable[[Call, Tensor], Any]:
        return lambda call, hidden: answer(index, call, hidden)

    try:
        for index, block in enumerate(blocks):
            chain.holder[index] = Stub(block, of(index))
        yield
    finally:
        for index, block in enumerate(blocks):
            chain.holder[index] = block


def first_call(model: nn.Module, chain: Chain, batch: Mapping[str, Any]) -> tuple[Call, Tensor]:
    """How the first block is called for a batch, and the hidden states [B, L, H] it gets."""
    found: list[tuple[Call, Tensor]] = []

    def answer(index: int, call: Call, hidden: Tensor) -> Any:
        found.append((call, hidden))
        raise Enough

    with stubs(chain, answer), no_cache(model):
        try:
            model(**batch)
        except Enough:
            return found[0]
    raise UnsupportedError(f"{type(model).__name__} never calls its blocks {chain.name}: use a data-free method")


def calls(model: nn.Module, chain: Chain, batch: Mapping[str, Any], tupled: bool) -> tuple[list[Call], Tensor]:
    """How every block is called for a batch, and the hidden states that the first one gets; no block is run.

    `tupled`: whether blocks answer with a tuple. What a block is called with besides the hidden states may differ from
    block to block (sliding windows) but never depends on what other blocks compute.
    """
    found: dict[int, Call] = {}
    start: list[Tensor] = []

    def answer(index: int, call: Call, hidden: Tensor) -> Any:
        found[index] = call
        start.append(hidden)
        if index == len(chain.holder) - 1:  # what comes after the blocks, logits above all, is not needed
            raise Enough
        return (hidden,) if tupled else hidden

    with stubs(chain, answer), no_cache(model), suppress(Enough):
        model(**batch)
    if sorted(found) != list(range(len(chain.holder))):
        raise UnsupportedError(f"{type(model).__name__} does not call every block of {chain.name}")
    return [found[index] for index in range(len(found))], start[0]


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache while calibrating: it would hold every batch, and a block that runs again would add to it."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
