"""What a block of a model computes, found by running it on the meta device: sizes and operations, no values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .chain import Chain, calls, first_call
from .experts import expert_projections
from .matrices import find_matrices, first_tensor, is_experts
from .settled import find_ends
from .valueless import Answering


@dataclass
class Reading:
    """Matrices [N, K] that are quantized and read the same input.

    `features`: K. `rows`: N of each. `tokens`: how many of a batch reach it. `before`: operations of the block for a
    batch until the input is there. `part`: name of the child of the block that the first of them is in, `ends`: whether
    what that child gives back is what the first of them gives. `copies`: inputs of this kind, one for each expert.
    """

    features: int
    rows: list[int]
    tokens: float
    before: float
    part: str
    ends: bool = False
    copies: int = 1


@dataclass
class BlockWork:
    """A block, for one batch. `flops`: of a whole pass. `bytes`: of its parameters. `widest`: features of its widest
    activation. `readings`: in the order in which the block computes them.
    """

    flops: float
    bytes: int
    widest: int
    readings: list[Reading] = field(default_factory=list)

    def gathering(self) -> float:
        """Operations of a pass up to each reading, one after the other; what is settled is not run again."""
        if not self.readings:
            return 0.0
        settled = self.settled()
        first = [reading for reading in self.readings if reading.part == self.readings[0].part]
        total = sum(reading.before for reading in first)
        later = [reading.before - settled for reading in self.readings[len(first) :]]
        if later and first[-1].ends:
            total += settled - first[-1].before  # the matrix at the end of the part, on its own
        elif later:
            later[0] += settled  # all of the part, for the last time
        return total + sum(later)

    def settled(self) -> float:
        """Operations of the part of the block that is quantized first, 0 if nothing comes after it."""
        later = (r.before for r in self.readings if r.part != self.readings[0].part)
        return next(later, 0.0)


def block_works(model: Any, chain: Chain, targets: Collection[str], batch: Mapping[str, Any]) -> list[BlockWork]:
    """The work of every block of `model`, which lies on the meta device like the `batch`.

    Blocks of the same shapes are run once. Raises what the model raises if it cannot run without values.
    """
    with torch.no_grad(), Answering(True):  # masks mask nothing
        return _block_works(model, chain, targets, batch)


def _block_works(model: Any, chain: Chain, targets: Collection[str], batch: Mapping[str, Any]) -> list[BlockWork]:
    call, hidden = first_call(model, chain, batch)
    with _without_experts(chain.holder[0], lambda module, tokens: None):
        tupled = isinstance(call.output(chain.holder[0], hidden), tuple)
    every, hidden = calls(model, chain, batch, tupled)
    known: dict[Any, BlockWork] = {}
    found = []
    for name, block, how in zip(chain.names(), chain.holder, every, strict=True):
        chosen = frozenset(target.removeprefix(f"{name}.") for target in targets if target.startswith(f"{name}."))
        key = (chosen, *((leaf, tuple(p.shape)) for leaf, p in block.named_parameters()))
        if key not in known:
            known[key] = _trace(block, chosen, lambda: how.run(block, hidden))  # noqa: B023 - run at once
        found.append(known[key])
    return found


def _trace(block: nn.Module, targets: frozenset[str], run: Callable[[], Any]) -> BlockWork:
    """Run a block and note its inputs and operations."""
    names = {module: name for name, module in block.named_modules()}
    owned = {module: find_matrices(name, module, ()) for module, name in names.items() if not is_experts(module)}
    shapes = {module: matrices[0].values().shape for module, matrices in owned.items() if matrices}
    found: dict[int, Reading] = {}
    alive: list[Tensor] = []  # so that no two inputs have the same id
    firsts: dict[int, nn.Module] = {}
    extra = [0.0]
    widest = [0]

    def part(module: nn.Module) -> str:
        return names[module].split(".")[0]

    def linear(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows, features = shapes[module]
        widest[0] = max(widest[0], rows, features)
        if names[module] in targets:
            x = first_tensor(args, kwargs)
            alive.append(x)
            done = counter.get_total_flops() + extra[0]
            reading = found.setdefault(id(x), Reading(features, [], x.numel() / features, done, part(module)))
            reading.rows.append(rows)
            firsts.setdefault(id(x), module)

    def experts(module: Any, x: Tensor) -> None:
        count, share = _routing(module, block)
        for projection in expert_projections(module):
            bank = module._parameters[projection]
            rows, features = bank.shape[1:] if not module.is_transposed else bank.shape[1:][::-1]
            widest[0] = max(widest[0], rows, features)
            done = counter.get_total_flops() + extra[0]
            tokens = x.numel() / x.shape[-1] * share
            if names[module] in targets:
                reading = Reading(features, [rows], tokens / count, done, part(module), copies=count)
                found[id(bank)] = reading
            extra[0] += 2 * tokens * rows * features

    with ExitStack() as stack:
        for module in shapes:
            stack.callback(module.register_forward_pre_hook(linear, with_kwargs=True).remove)
        stack.enter_context(_without_experts(block, experts))
        ends = stack.enter_context(find_ends(block))
        counter = stack.enter_context(FlopCounterMode(display=False))
        run()
    last = {end for end, _ in ends.values()}
    for key, module in firsts.items():
        found[key].ends = module in last
    size = sum(p.numel() * p.element_size() for p in block.parameters())
    return BlockWork(counter.get_total_flops() + extra[0], size, widest[0], list(found.values()))


def _routing(module: nn.Module, block: nn.Module) -> tuple[int, float]:
    """Number of experts, and how many of them each token is sent to."""
    count = int(next(iter(module._parameters[name].shape[0] for name in expert_projections(module))))  # type: ignore[union-attr]
    config = getattr(module, "config", None)
    places = [config, *block.modules()]
    named = (getattr(place, name, None) for place in places for name in ("num_experts_per_tok", "top_k"))
    return count, float(next((value for value in named if isinstance(value, int)), count))


@contextmanager
def _without_experts(block: nn.Module, seen: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Let experts answer without being run: which of them a token goes to depends on its value."""
    banks = [module for module in block.modules() if is_experts(module)]

    def stand_in(module: nn.Module) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = first_tensor(args, kwargs)
            seen(module, x)
            return torch.empty_like(x)

        return forward

    try:
        for bank in banks:
            bank.forward = stand_in(bank)
        yield
    finally:
        for bank in banks:
            vars(bank).pop("forward", None)
