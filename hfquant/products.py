"""The operands of attention's products are quantized: their formats and ranges, found like those of layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CHILD, PRODUCTS, Operands, note_callers
from .fisher import Importance, queries, sequences
from .histogram import Histogram
from .input_ranges import INPUT_RANGES, InputChoice, SeenInput, rounds_of, searches_dynamic
from .matrices import Enough, Group
from .recipe import Recipe
from .reference import as_seen
from .spec import InputSpec

Forward = Callable[[int], Any]
"""Runs the block on a batch."""

NO_PRODUCT = (
    "attention operands stay unquantized: the block has no attention product, nothing in it calls transformers' "
    "attention interface"
)
"""Remark about a block without `Product`: hybrid models have blocks with a convolution or a state instead."""


@dataclass(eq=False)
class Product:
    """An attention module of a block; `after`: identities of the groups of matrices that are called after it."""

    name: str
    module: nn.Module
    after: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Operand:
    """What calibration saw of an operand: the histogram of all values, and some of it, [b, H, rows, k] float32."""

    hist: Histogram
    parts: list[Tensor] = field(default_factory=list)

    @property
    def sample(self) -> Tensor:
        """All parts, with the axes of batch and heads joined: [b * H, rows, k]."""
        return _joined(self.parts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [b, H, rows, k] below each other, [sum of b * H, rows, k]; shorter ones are filled up with zeros."""
    rows, width = max(part.shape[-2] for part in parts), max(part.shape[-1] for part in parts)
    padded = [F.pad(part, (0, width - part.shape[-1], 0, rows - part.shape[-2])) for part in parts]
    return torch.cat(padded).flatten(0, 1)


def find_products(name: str, block: nn.Module, groups: Sequence[Group], run: Callable[[], Any]) -> list[Product]:
    """The attention modules of a block, called `name` in the model, found by running it once."""
    names = {module: f"{name}.{leaf}".strip(".") for leaf, module in block.named_modules()}
    found: dict[nn.Module, Product] = {}
    with note_callers() as callers:

        def called(group: Group) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple) -> None:
                for caller in callers:
                    found.setdefault(caller, Product(names[caller], caller)).after.add(id(group))

            return hook

        hooks = [group.matrices[0].module.register_forward_pre_hook(called(group)) for group in groups]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
    return [found.get(caller) or Product(names[caller], caller) for caller in callers if caller in names]


def quantize_products(
    product: Product,
    recipe: Recipe,
    forward: Forward,
    masks: Sequence[Tensor | None],
    log: list[str],
    fisher: Importance | None = None,
) -> dict[str, Any]:
    """Find what both products of an attention module see from now on; returns the record of it.

    `masks`: which positions [B, L] of each batch are no padding. `log` gets a remark for the report. `fisher`: how much
    the elements of the products count.
    """
    operands = Operands()
    operands.to(next((p.device for p in product.module.parameters()), torch.device("cpu")))
    product.module.add_module(CHILD, operands)
    for number, pair in enumerate(PRODUCTS):
        seen = _look(operands, pair, forward, masks, product.name)
        counts = None if fisher is None else _joined(fisher.of_product(product.name, number))
        for name, choice in _choose(seen, recipe, product.name, counts).items():
            operands.choose(name, InputSpec(choice.tensor, choice.params is None), choice.params)
    log.append(f"{product.name}: " + ", ".join(f"{name} {spec.tensor.grid}" for name, spec in operands.specs.items()))
    return operands.record()


def _look(
    operands: Operands, pair: tuple[str, str], forward: Forward, masks: Sequence[Tensor | None], name: str
) -> dict[str, Operand]:
    """What all batches show of the operands of one product; passes end with them."""
    seen = {operand: Operand(Histogram(f"{name} ({operand})")) for operand in pair}
    for number, keep in enumerate(masks):
        wanted = sequences(number, len(masks))

        def watch(operand: str, x: Tensor) -> None:
            if operand not in seen:
                return
            _add(seen[operand], operand, x.float(), keep, wanted)  # noqa: B023
            if operand == pair[1]:
                raise Enough

        with _watched(operands, watch), suppress(Enough):
            forward(number)
    return seen


@contextmanager
def _watched(operands: Operands, watcher: Callable[[str, Tensor], None]) -> Iterator[None]:
    operands.watcher = watcher
    try:
        yield
    finally:
        operands.watcher = None


def _add(operand: Operand, name: str, x: Tensor, keep: Tensor | None, wanted: int) -> None:
    """Count `x` [B, H, rows, k] of a batch, and keep `wanted` of its sequences."""
    axis = 3 if name == "value" else 2  # where the tokens are
    if keep is not None and keep.shape == (x.shape[0], x.shape[axis]):
        operand.hist.add(x.movedim(axis, 1)[keep])
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = keep.shape
        x = x * keep.reshape(shape)
    else:
        operand.hist.add(x)
    if wanted > 0:
        operand.parts.append((queries(x, wanted) if name in ("query", "probability") else x[:wanted]).clone())


def _choose(
    seen: dict[str, Operand], recipe: Recipe, name: str, counts: Tensor | None = None
) -> dict[str, InputChoice]:
    """The formats and ranges of both operands, each for what was found for the other, in turns.

    `counts` [b * H, rows, columns]: how much the elements of the product count.
    """
    given, step = recipe.attention, recipe.input_range
    assert given is not None
    find = INPUT_RANGES.get(step.name)
    if given.dynamic and not searches_dynamic(find):
        return {operand: InputChoice(given.tensor) for operand in seen}
    samples = _aligned({operand: found.sample for operand, found in seen.items()})
    chosen: dict[str, InputChoice] = {}
    for _ in range(rounds_of(find, step.options)):
        before = dict(chosen)
        for mine, other in _both_ways(seen):
            exact, choice = samples[other], chosen.get(other)
            quantized = exact if choice is None else as_seen(exact, choice.tensor, choice.params)
            hist = seen[mine].hist
            turned = counts if counts is None or mine == next(iter(seen)) else counts.mT
            sample = samples[mine]
            looked = SeenInput(f"{name} ({mine})", hist, sample, hist.absmax, (exact,), (quantized,), importance=turned)
            chosen[mine] = find(looked, given, **step.options)
        if all(operand in before and choice.same(before[operand]) for operand, choice in chosen.items()):
            break
    return chosen


def _aligned(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Samples with as many heads: keys and values that several heads share are repeated."""
    most = max(len(sample) for sample in samples.values())
    return {operand: sample.repeat_interleave(most // len(sample), 0) for operand, sample in samples.items()}


def _both_ways(names: Iterable[str]) -> list[tuple[str, str]]:
    left, right = names
    return [(left, right), (right, left)]
