"""Which channels of which module scale which input columns, found by scaling them and looking, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blockview import BlockView
from .matrices import Group, Matrix, Source, first_tensor, watch

NEAREST = 6  # producers tried for a group: what lies further back is mixed by matrices in between
UNTOUCHED = -1  # the column does not depend on the producer
_DEAD = -2  # the column is 0 for every token of the probe
_LEVELS = 256  # factors that are told apart in one run; more channels take a second run
_SAME = 1e-3  # relative deviation from a constant ratio that is rounding
_STEADY = (1e-5, 1e-4, 1e-3, 1e-2)  # relative spread of a derivative over the tokens that may be rounding
_TOKENS = 8  # at which derivatives are compared


@dataclass(frozen=True, eq=False)
class Producer:
    """A module whose output channels can be scaled: a norm, a linear layer, or the first projections of experts.

    `matrices`: none for a norm, one for each expert of a bank. `size`: number of channels.
    """

    name: str
    module: nn.Module
    matrices: tuple[Matrix, ...]
    size: int

    @property
    def is_bank(self) -> bool:
        """Whether it stands for all experts of a layer, each with channels of its own."""
        return bool(self.matrices) and self.matrices[0].expert is not None

    @contextmanager
    def scaled(self, factor: Tensor) -> Iterator[None]:
        """Let its channels be `factor` [size] times as large, differentiably, without touching a parameter."""
        if self.is_bank:
            with _scaled_bank(self.module, self.matrices[0], factor):
                yield
            return
        handle = self.module.register_forward_hook(lambda module, args, output: output * factor)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _scaled_bank(module: nn.Module, matrix: Matrix, factor: Tensor) -> Iterator[None]:
    own = module._parameters
    names = [name for name in (matrix.parameter, f"{matrix.parameter}_bias") if own.get(name) is not None]
    before = {name: own[name] for name in names}
    try:
        for name, value in before.items():
            assert value is not None
            aligned = factor[:, None] if value.dim() == 3 and not matrix.transposed else factor
            own[name] = value * aligned  # type: ignore[assignment]
        yield
    finally:
        own.update(before)


class Probing:
    """Runs of a block on its probe with some channels scaled, and what its groups read then.

    `leaders`: of the groups that read one tensor the first, in the order of calls.
    """

    def __init__(self, view: BlockView) -> None:
        self.view = view
        sources: dict[Source, Group] = {}
        for group in view.groups:
            sources.setdefault(group.source, group)
        self.leaders = list(sources.values())
        self.order: list[Any] = []  # producers and leaders as they are reached
        self.inputs = self._first_run()
        self.followed: dict[Producer, dict[Group, Tensor]] = {}

    def producers(self, leader: Group) -> list[Producer]:
        """Producers that may scale the input of a group, the nearest first."""
        if is_inner(leader):
            module = leader.matrices[0].module
            return [p for p in self.order if isinstance(p, Producer) and p.is_bank and p.module is module]
        before = self.order[: self.order.index(leader)]
        return [p for p in reversed(before) if isinstance(p, Producer) and not p.is_bank][:NEAREST]

    def columns(self, producer: Producer, leader: Group) -> Tensor | None:
        """The channel [K] int64 of the producer that each column of the group's input is proportional to.

        `UNTOUCHED` where it does not depend on the producer; None if it depends in any other way.
        """
        if producer not in self.followed:
            self.followed[producer] = self._follow(producer, torch.ones(producer.size, dtype=torch.bool))
        found = self.followed[producer].get(leader)
        return self._fused_columns(producer, leader) if found is None and producer.matrices else found

    def _fused_columns(self, producer: Producer, leader: Group) -> Tensor | None:
        """The same for a weight of which some rows act in another way, such as those of q and k beside those of v.

        A gate that hardly moves is steady up to some precision as well: what makes most columns is right.
        """
        spread = self._spread_of_slopes(producer, leader)
        if spread is None:
            return None
        found: list[Tensor] = []
        tried: set[int] = set()
        for limit in _STEADY:
            rows = spread <= limit
            count = int(rows.sum())
            if count and count not in tried:
                columns = self._follow(producer, rows).get(leader)
                found += [] if columns is None else [columns]
            tried.add(count)
        return max(found, key=lambda columns: int((columns >= 0).sum()), default=None)

    # Runs of the block.

    def _first_run(self) -> dict[Group, Tensor]:
        """What every leader reads; notes the order of calls."""
        with ExitStack() as stack:
            for name, module in self.view.module.named_modules():
                handle = module.register_forward_hook(self._noting(f"{self.view.name}.{name}".strip("."), module))
                stack.callback(handle.remove)
            inputs = self._run(note=True)
        for leader in self.leaders:
            if is_inner(leader):
                self._note_bank(leader)
        return inputs

    def _noting(self, name: str, module: nn.Module) -> Callable[..., None]:
        weight = module._parameters.get("weight")
        own = [m for group in self.view.groups for m in group.matrices if m.module is module and m.expert is None]

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            known = any(isinstance(item, Producer) and item.module is module for item in self.order)
            if known or not isinstance(output, Tensor) or weight is None or not (own or weight.dim() == 1):
                return
            size = own[0].values().shape[0] if own else weight.numel()
            if size > 1 and output.shape[-1] == size:
                self.order.append(Producer(name, module, tuple(own), size))

        return hook

    def _note_bank(self, leader: Group) -> None:
        """The producer of the second projections of an experts module: all its first ones."""
        module = leader.matrices[0].module
        if any(isinstance(item, Producer) and item.module is module for item in self.order):
            return
        first = [m for g in self.view.groups for m in g.matrices if m.module is module and not is_inner(g)]
        if first:
            name = first[0].name.rpartition("[")[0]
            self.order.append(Producer(name, module, tuple(first), first[0].values().shape[0]))

    def _run(self, note: bool = False) -> dict[Group, Tensor]:
        """Run the block; what every leader reads, [T, K]."""
        found: dict[Group, Tensor] = {}

        def reading(leader: Group) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if leader not in found:
                    x = first_tensor(args, kwargs)
                    found[leader] = x.reshape(-1, x.shape[-1])
                    if note:
                        self.order.append(leader)

            return hook

        def seen(group: Group, x: Tensor) -> None:
            found[group] = x

        with ExitStack() as stack:
            for leader in self.leaders:
                if not is_inner(leader):
                    module = leader.matrices[0].module
                    stack.callback(module.register_forward_pre_hook(reading(leader), with_kwargs=True).remove)
            inner = [leader for leader in self.leaders if is_inner(leader)]
            if inner:
                stack.enter_context(watch(inner, seen, lambda: None, stop=False))
            self.view.output()
        return found

    def _follow(self, producer: Producer, rows: Tensor) -> dict[Group, Tensor]:
        """For every group whose input is proportional to the channels `rows` [size] bool of a producer: to which."""
        total: dict[Group, Tensor] = {leader: torch.zeros(leader.features, dtype=torch.int64) for leader in self.inputs}
        channel = torch.arange(producer.size)
        place = 1
        while place < producer.size:
            digit = channel // place % _LEVELS
            factor = torch.exp2(0.25 + digit * (2 / (_LEVELS - 1))).where(rows, 1)
            with producer.scaled(factor.to(self.view.probe.device)):
                now = self._run()
            for leader in list(total):
                read = _digits(self.inputs[leader], now.get(leader))
                if read is None:
                    del total[leader]
                else:
                    total[leader] = torch.where(read < 0, read, total[leader] + place * read)
            place *= _LEVELS
        settled = {leader: _without_dead(columns, producer.size) for leader, columns in total.items()}
        return {leader: columns for leader, columns in settled.items() if columns is not None}

    def _spread_of_slopes(self, producer: Producer, leader: Group) -> Tensor | None:
        """How far d log|x| / d log f_i varies over the tokens, [size], for the factor f_i of each row of a weight.

        It is the same for every token where a row does nothing but scale columns of x: infinite where it is never
        positive. None if derivatives cannot be had.
        """
        try:
            with torch.enable_grad():
                factor = torch.ones(producer.size, device=self.view.probe.device, requires_grad=True)
                with producer.scaled(factor):
                    x = self._run().get(leader)
                if x is None or len(x) < 2:
                    return None
                some = x[torch.linspace(len(x) // 2, len(x) - 1, _TOKENS).long().unique()]
                alive = (some != 0).all(0)
                weights = torch.linspace(1, 2, int(alive.sum()), device=x.device)
                sums = (some[:, alive].abs().log() * weights).sum(1)
                slopes = torch.stack([torch.autograd.grad(part, factor, retain_graph=True)[0] for part in sums])
        except RuntimeError:  # an operation without a derivative
            return None
        if len(slopes) < 2:
            return None
        low, high = slopes.amin(0), slopes.amax(0)
        return torch.where(low > _SAME, (high - low) / high, torch.inf).cpu()


def is_inner(group: Group) -> bool:
    """Whether a group is the second projection of an expert, whose input nobody else reads."""
    return group.matrices[0].expert is not None and group.matrices[0].parameter == "down_proj"


def _digits(before: Tensor, after: Tensor | None) -> Tensor | None:
    """Which factor each column [K] of the input was multiplied by, None if any was not multiplied by one."""
    if after is None or after.shape != before.shape:
        return None
    a, b = before.cpu().double(), after.cpu().double()
    usable = (a + b).isfinite().all(1)  # padding may give what it likes
    if int(usable.sum()) < 2:
        return None
    a, b = a[usable], b[usable]
    power = a.square().sum(0)
    alive = power > 0
    if not torch.equal(b.square().sum(0) > 0, alive):
        return None
    ratio = (a * b).sum(0) / power.where(alive, 1)
    off = (b - ratio * a).norm(dim=0) > _SAME * b.norm(dim=0)
    untouched = (ratio - 1).abs() <= _SAME
    level = (ratio.clamp_min(1e-6).log2() - 0.25) * ((_LEVELS - 1) / 2)
    digit = level.round()
    wrong = alive & (off | (~untouched & (((level - digit).abs() > 0.1) | (digit < 0) | (digit >= _LEVELS))))
    if wrong.any():
        return None
    return digit.long().where(~untouched, UNTOUCHED).where(alive, _DEAD)


def _without_dead(columns: Tensor, size: int) -> Tensor | None:
    """Settle the columns that are 0 in the whole probe; None if none is scaled, or if they cannot be told."""
    scaled, dead = columns >= 0, columns == _DEAD
    if not scaled.any():
        return None
    identity = torch.arange(columns.numel())
    if size == columns.numel() and torch.equal(columns[scaled], identity[scaled]):
        return torch.where(dead, identity, columns)
    if dead.any() and columns[scaled].unique().numel() < int(scaled.sum()):
        return None  # a channel with several columns may have dead ones too
    return torch.where(dead, UNTOUCHED, columns)
