"""Several processes that calibrate one model together: each runs its share of the data and of the layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .stats import SAMPLE, InputStats


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the one that writes."""
    return dist.get_rank() if world() > 1 else 0


def merge(stats: InputStats) -> None:
    """Make the statistics of every process those of all data."""
    if world() == 1:
        return
    counts = torch.tensor([stats.tokens], dtype=torch.int64)
    dist.all_reduce(counts)
    stats.tokens = int(counts)
    if (counted := stats.histogram) is not None:
        bounds = counted.bounds()
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        counted.reach(bounds)
        dist.all_reduce(counted.counts)
    for tensor, how in stats.tensors():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    places = _rows_of_all(stats.places[:, None])[:, 0]
    first = places.argsort(stable=True)[:SAMPLE]  # those, and in the order, that one process would have kept
    stats.sample, stats.places = _rows_of_all(stats.sample)[first], places[first]


def _rows_of_all(rows: Tensor) -> Tensor:
    """The rows [S, K], at most `SAMPLE`, of all processes below each other."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = [rows.new_zeros(SAMPLE, rows.shape[1]) for _ in counts]
    dist.all_gather(padded, torch.cat([rows, rows.new_zeros(SAMPLE - len(rows), rows.shape[1])]))
    return torch.cat([part[: int(count)] for part, count in zip(padded, counts, strict=True)])


def total(value: float) -> float:
    """Sum of a number over the processes."""
    if world() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def from_owner(owner: int, empty: dict[str, Tensor], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that process `owner` makes and the others receive; `empty` has their shapes and dtypes."""
    if world() == 1:
        return make()
    tensors = make() if rank() == owner else {name: torch.empty_like(t, device="cpu") for name, t in empty.items()}
    for name in sorted(tensors):
        tensors[name] = tensors[name].contiguous()
        dist.broadcast(tensors[name], owner)
    return tensors


def gather_notes(notes: list[Any]) -> list[Any]:
    """The notes (plain JSON types) of all processes, in their order."""
    if world() == 1:
        return notes
    mine = torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([mine.numel()]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, torch.cat([mine, torch.zeros(longest - mine.numel(), dtype=torch.uint8)]))
    texts = [bytes(part[: int(size)].tolist()) for part, size in zip(padded, sizes, strict=True)]
    return [note for text in texts for note in json.loads(text)]


def of(owner: int, value: Any) -> Any:
    """What process `owner` gives as `value`, in plain JSON types."""
    return gather_notes([value] if rank() == owner else [])[0]


def of_first(value: Any) -> Any:
    """What process 0 gives as `value`, in plain JSON types."""
    return of(0, value)


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()
