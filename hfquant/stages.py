"""Which statistics of a block are gathered together, and what experts without tokens are lent."""

from __future__ import annotations

from collections.abc import Iterator

from .matrices import Group
from .stats import HESSIAN

_STATISTICS = 1 << 31  # bytes of statistics of experts that are gathered in one pass


def lend_histograms(stage: list[Group]) -> None:
    """Experts that no token reached get the static input range of all the others."""
    counted = [group.stats.histogram for group in stage if group.stats is not None and group.stats.histogram]
    pooled = counted[0].copy() if counted else None
    for histogram in counted[1:]:
        assert pooled is not None
        pooled.merge(histogram)
    for group in stage:
        if group.stats is not None and group.stats.histogram is not None and not group.stats.tokens:
            group.stats.histogram = pooled


def stages(groups: list[Group], needs: frozenset[str]) -> Iterator[list[Group]]:
    """Groups whose statistics are gathered in one pass: one after the other.

    The experts of a layer go together, as far as their statistics fit into memory.
    """
    stage: list[Group] = []
    for group in groups:
        if stage and not _together(stage, group, needs):
            yield stage
            stage = []
        stage.append(group)
    if stage:
        yield stage


def _together(stage: list[Group], group: Group, needs: frozenset[str]) -> bool:
    first, new = stage[0].matrices[0], group.matrices[0]
    size = 8 * group.features**2 if HESSIAN in needs else 0
    experts = first.module is new.module and first.parameter == new.parameter
    return experts and size * (len(stage) + 1) <= _STATISTICS
