"""How long calls take: on a GPU as CUDA graphs, so that Python and launches are not measured, on a CPU by the clock.

A call gets a number and runs on the weight and the input of that number, so that calls one after the other do not find
anything in a cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from .setting import Setting

Call = Callable[[int], object]
T = TypeVar("T")

COMPUTING = 256  # rows from which on weights are read so rarely that a few different ones are enough
FEW, MANY = 4, 64  # different weights


def how_many(size: int, distinct: float, rows: int = 1) -> int:
    """How many weights of `size` bytes to go through so that they are `distinct` bytes together, 2 to 64."""
    wanted = max(2, min(MANY, math.ceil(distinct / max(1, size))))
    return min(wanted, FEW) if rows >= COMPUTING else wanted


def rotated(things: Sequence[T]) -> Callable[[int], T]:
    """The things in turns."""
    return lambda number: things[number % len(things)]


@dataclass(frozen=True)
class Contender:
    """`call` and how many of them make one round. `syncs`: it waits for the GPU, so that no graph can hold it."""

    call: Call
    count: int
    syncs: bool = False


class Clock:
    """Measures on a CPU. Its subclass does on a GPU what only exists there."""

    def prepare(self, call: Call, count: int, syncs: bool) -> tuple[Callable[[], object], str]:
        """What runs `count` calls, which have all run once before, and how it does that."""

        def run() -> None:
            for number in range(count):
                call(number)

        run()
        return run, "loop"

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds that the device is busy with it."""
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def finish(self) -> None:
        """Wait until the device has done everything."""

    def memory(self) -> int:
        """Bytes that tensors take now, 0 where nobody counts them."""
        return 0

    def peak_memory(self, run: Callable[[], object]) -> int:
        """Largest number of bytes that tensors took while it ran."""
        run()
        return 0


class GpuClock(Clock):
    """Measures on a GPU."""

    def prepare(self, call: Call, count: int, syncs: bool) -> tuple[Callable[[], object], str]:
        run, how = super().prepare(call, count, syncs)  # compiles, and fills what is found out once
        torch.cuda.synchronize()
        if syncs:
            return run, how
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as problem:  # then its launches are part of what is measured
            return run, f"loop, no graph can hold it: {problem}"
        return graph.replay, "graph"

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_memory(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())


def clock_of(setting: Setting) -> Clock:
    """The clock of a device."""
    return GpuClock() if setting.is_gpu else Clock()


def race(setting: Setting, contenders: Mapping[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of a call of each contender: medians of rounds in which they take turns, and how they were run.

    A contender that cannot run says why in "error". `only_compile`: each runs once, nothing is measured.
    """
    clock = clock_of(setting)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        try:
            if setting.only_compile:
                contender.call(0)
                clock.finish()
            else:
                runs[name], how = clock.prepare(contender.call, contender.count, contender.syncs)
                found[name] = {"how": how}
        except Exception as problem:
            found[name] = {"error": f"{type(problem).__name__}: {problem}"}
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1 if runs else 0):
        for name, run in runs.items():
            seconds = clock.seconds(run)
            if turn:  # the first round is one more to warm up
                took[name].append(seconds / contenders[name].count)
    for name, values in took.items():
        found[name] |= {"seconds": median(values), "spread": (max(values) - min(values)) / median(values)}
    return found
