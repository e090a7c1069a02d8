"""What the layers of a model see, gathered while it runs: layers that read one tensor share its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration_state import Batch, head, mask_of
from ..chain import no_cache
from ..matrices import Enough, Group, Matrix, Source, first_tensor, identity, watch
from ..stats import HESSIAN, InputStats

MEMORY = 1 << 31  # bytes of second moments that are gathered in one pass over the batches


def as_batches(batches: Sequence[Any]) -> list[Batch]:
    """Batches as keywords of the model; a tensor of token ids [B, L] int64 is its `input_ids`."""
    return [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]


def gathered(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    batches: Sequence[Batch],
    needs: frozenset[str],
    memory: int = MEMORY,
) -> Iterator[dict[str, InputStats]]:
    """The statistics of the inputs of `layers`, by name, of as many layers at a time as `memory` bytes hold.

    `widths`: features K of each input. The model runs over all batches once for each part, in the order of calls, and
    a later part sees what was changed in the layers before. Layers that no batch reaches have no tokens.
    """
    with no_cache(model):
        groups = _groups(model, layers, batches[0])
        part: list[Group] = []
        held = 0
        for group in groups:
            size = 8 * widths[group.name] ** 2 if HESSIAN in needs else 0
            if part and held + size > memory:
                yield _pass(model, part, widths, batches, needs)
                part, held = [], 0
            part.append(group)
            held += size
        yield _pass(model, part, widths, batches, needs)


def _groups(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> list[Group]:
    """Layers that are called with the same tensors, however often; in the order of calls, those never called last."""
    seen: dict[str, list[Source]] = {}
    alive: list[Tensor] = []  # so that no two inputs have the same address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            alive.append(first_tensor(args, kwargs))
            seen.setdefault(name, []).append(identity(alive[-1]))

        return hook

    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(**head(batch))
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[Any, Group] = {}
    for name in [*seen, *(name for name in layers if name not in seen)]:
        key = tuple(seen.get(name, [])) or name
        group = found.setdefault(key, Group(seen.get(name, [(0, 0, 0)])[0]))
        group.matrices.append(Matrix(name, layers[name], "weight", True))
    return list(found.values())


def _pass(
    model: nn.Module,
    groups: list[Group],
    widths: Mapping[str, int],
    batches: Sequence[Batch],
    needs: frozenset[str],
) -> dict[str, InputStats]:
    """The statistics of some groups, from all batches."""
    for group in groups:
        group.stats = InputStats(widths[group.name], needs, group.name)

    def seen(group: Group, x: Tensor) -> None:
        assert group.stats is not None
        group.stats.add(x)

    for batch in batches:
        mask = mask_of(batch)
        with torch.no_grad(), suppress(Enough), watch(groups, seen, lambda: mask, stop=False):  # noqa: B023
            model(**batch)
    return {matrix.name: group.stats for group in groups for matrix in group.matrices if group.stats is not None}
