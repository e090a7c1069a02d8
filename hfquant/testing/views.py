"""The blocks of a model as transforms see them, for tests of transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..blockview import BlockView
from ..chain import calls, find_chain, first_call
from ..config import HfQuantConfig
from ..coverage import survey
from ..matrices import Group, trace, watch
from ..recipe import Recipe
from ..stats import InputStats


def block_views(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    recipe: Recipe | None = None,
    skip: list[str] | None = None,
) -> Iterator[BlockView]:
    """A view of each block of a float32 `model` in turn; what is done to one shows in the inputs of the next.

    The model's `inputs`, without padding, are the probe and all calibration data. `recipe`: int4 if it is None. `skip`:
    modules that are not going to be quantized, None for the default.
    """
    recipe = recipe or HfQuantConfig("int4").recipe
    targets = {target.name for target in survey(model, skip, False)[0]}
    chain = find_chain(model)
    with torch.no_grad():
        call, hidden = first_call(model, chain, inputs)
        tupled = isinstance(call.output(chain.holder[0], hidden), tuple)
        every, hidden = calls(model, chain, inputs, tupled)
    for name, block, call in zip(chain.names(), chain.holder, every, strict=True):
        with torch.no_grad():
            groups = trace(name, block, targets, lambda: call.run(block, hidden))  # noqa: B023
            view = BlockView(name, block, groups, recipe, call, hidden, lambda *_: None, {})
            view.gather = _gatherer(view)
        yield view
        with torch.no_grad():
            hidden = view.output()


def _gatherer(view: BlockView) -> Any:
    @torch.no_grad()
    def gather(groups: list[Group], needs: frozenset[str]) -> None:
        for group in groups:
            group.stats = InputStats(group.features, needs, group.name)

        def seen(group: Group, x: torch.Tensor) -> None:
            assert group.stats is not None
            group.stats.add(group.basis(x))

        with watch(groups, seen, lambda: None, stop=False):
            view.output()

    return gather
