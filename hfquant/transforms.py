"""Transforms: rewrites of a block of the model that leave its function as it is and make it easier to quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .tables import Table


@dataclass(frozen=True)
class Transform:
    """A rewrite of the model, block by block.

    `block(view, **options)` is called with the `BlockView` of each block before its weights are quantized; what it
    changes is verified by the view and undone if the block's output moved. `outside(view, **options)` is called once,
    before the first block, with everything that is not in a block (embeddings, last norm, output layer). `needs`: the
    statistics, some of `stats.NEEDS`, that `view.collect` is going to be asked for.
    """

    block: Callable[..., None]
    outside: Callable[..., None] | None = None
    needs: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, view: Any, **options: Any) -> None:
        """Rewrite one block."""
        self.block(view, **options)


TRANSFORMS: Table[Transform] = Table("transform")
