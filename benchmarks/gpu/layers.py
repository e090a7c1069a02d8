"""How fast is one layer, for few rows and many, next to bfloat16, to other packages, and to what the GPU can do?

Every call has another weight and another input, and all weights together are far larger than the caches. "of copy":
bytes of weight, input and result in a second over those of a plain copy; "of product": operations in a second over
those of a large product in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfquant import reference
from hfquant.backend import load_all

from . import peers
from .bounds import bound, distance
from .findings import Findings
from .peers import BF16, PEERS, Peer, Ready, Shape
from .setting import Setting
from .timing import Contender, how_many, race, rotated
from .weights import FORMATS, Format, kernel_of, layer_of, random_input, random_packed, size_of

EVERYWHERE = (
    "int4 g128",
    "nf4 g64",
    "llm.int8",
    "fp8 rows",
    "fp8 tiles",
)  # measured on all shapes, others on the first
EXTRA = {"llm.int8": (512,)}  # more rows
INPUTS = 4


@dataclass(frozen=True)
class Ours:
    """Layers with weights of their own, the bytes of one, and the kernel that runs them."""

    layers: list[Any]
    size: int
    kernel: str

    @classmethod
    def of(cls, shape: Shape, format: Format, setting: Setting) -> Ours:
        """Weights with the same values in different places."""
        tensors, spec = random_packed(shape, format, setting.device)
        size = size_of(tensors)
        count = 1 if setting.only_compile else how_many(size, setting.sizes.distinct)
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count)]
        layers = [layer_of(each, spec) for each in copies]
        return cls(layers, size, kernel_of(layers[0]))

    def unbound(self) -> Ours:
        """The same weights in layers that have not found out yet what they launch."""
        again = [layer_of(dict(zip(each.spec.names, each.packed(), strict=True)), each.spec) for each in self.layers]
        return replace(self, layers=again)

    def ready(self, xs: list[Tensor]) -> Callable[[int], Tensor]:
        """What is timed."""
        x, layer = rotated(xs), rotated(self.layers)
        return lambda number: layer(number)(x(number))

    def agrees(self, x: Tensor, setting: Setting) -> dict[str, Any]:
        """Whether what was measured is right."""
        layer = self.layers[0]
        exact = reference.linear(x.float(), layer.packed(), None, layer.spec)
        found, most = distance(layer(x), exact), bound(layer, x.dtype, setting.is_gpu)
        return {"distance": found, "bound": most, "agrees": found <= most}


def plan(setting: Setting) -> Iterator[tuple[Shape, str]]:
    """Shapes and formats: those with a bar first."""
    for name in EVERYWHERE:
        for shape in setting.sizes.shapes:
            yield shape, name
    for name in FORMATS:
        if name not in EVERYWHERE:
            yield setting.sizes.shapes[0], name


def rows_of(name: str, setting: Setting) -> list[int]:
    """Numbers of rows of the input."""
    more = EXTRA.get(name, ()) if setting.is_gpu else ()
    return sorted({*setting.sizes.rows, *more})


def built(name: str, shape: Shape, setting: Setting) -> tuple[dict[str, tuple[Ready, Peer]], dict[str, str]]:
    """The peers of a format that can be built here, and why the others cannot."""
    ready: dict[str, tuple[Ready, Peer]] = {}
    missing: dict[str, str] = {}
    wanted = {} if setting.only_compile else {BF16: Peer(peers.dense), **PEERS.get(name, {})}
    for label, peer in wanted.items():
        try:
            ready[label] = peer.make(shape, setting), peer
        except Exception as problem:
            missing[label] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    return ready, missing


def derived(line: dict[str, Any], size: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """What follows from the seconds of a row: how many times as fast as others, and shares of what the GPU can do."""
    ours = line["runs"].get("ours", {})
    if "seconds" not in ours:
        return {}
    (n, k), m, seconds = line["shape"], line["rows"], ours["seconds"]
    moved, operations = size + 2 * m * (n + k), 2 * m * n * k
    found = {
        "bytes_per_second": moved / seconds,
        "flops_per_second": operations / seconds,
        "times": {label: run["seconds"] / seconds for label, run in line["runs"].items() if "seconds" in run},
    }
    found["times"].pop("ours")
    if ceilings:
        found["of_copy"] = found["bytes_per_second"] / ceilings["bytes_per_second"]
        found["of_product"] = found["flops_per_second"] / ceilings["flops_per_second"]
    return found


def measure(setting: Setting, findings: Findings, name: str, shape: Shape, ceilings: dict[str, float]) -> None:
    """One format and shape, all numbers of rows."""
    ours = Ours.of(shape, FORMATS[name], setting)
    others, missing = built(name, shape, setting)
    for m in setting.while_time(findings, f"{name}, {shape}", rows_of(name, setting)):
        with findings.row(format=name, shape=shape, rows=m, kernel=ours.kernel, missing=missing) as line:
            xs = [random_input(m, shape[1], setting.device, seed=seed) for seed in range(INPUTS)]
            count = how_many(ours.size, setting.sizes.distinct, m)
            contenders = {"ours": Contender(ours.ready(xs), count)}
            for label, (ready, peer) in others.items():
                try:
                    contenders[label] = Contender(ready(xs), min(count, 8) if peer.syncs else count, peer.syncs)
                except Exception as problem:
                    line["missing"] = {**line["missing"], label: f"{type(problem).__name__}: {problem}"}
            line["bytes"], line["runs"] = ours.size, race(setting, contenders, setting.sizes.rounds)
            line |= derived(line, ours.size, ceilings)
            if not setting.only_compile:
                line |= ours.agrees(xs[0], setting)


@torch.no_grad()
def run(setting: Setting, findings: Findings, ceilings: dict[str, float]) -> None:
    """All formats and shapes."""
    load_all()
    for shape, name in setting.while_time(findings, "formats", setting.share_of(plan(setting))):
        measure(setting, findings, name, shape, ceilings)
