"""How near to the limits of the machine are the CPU kernels, and how far from other packages?

One layer at a time, bfloat16 inputs and results: for each shape and format a set of distinct weights of one gigabyte,
so that no cache holds them, and in every round one call of each contender in turn: a plain read of as many bytes as the
weight has ("read"), torch's bfloat16 product, ours, and what else is installed that computes the same. Figures are
medians. "of read" is the time of the plain read over ours: 1 means that nothing but memory limits the kernel.
Writes results/cpu_linear_ISA.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import facts, result_of
from torch import Tensor
from torch.nn import functional as F

from hfquant import cpu
from hfquant.blocks import Blocks
from hfquant.layouts import default_layout
from hfquant.quantize import pack_empty
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
MAIN = (4096, 14336)
SET = 1.0e9  # bytes of distinct weights
ROUNDS = {1: 40, 4: 40, 16: 30, 128: 10, 512: 7}
INT8 = InputSpec(TensorSpec("int8", Blocks(1, -1)))

Call = Callable[[int], object]
"""Run the contender on its weight number i."""


def formats() -> dict[str, tuple[Scheme, tuple[int, ...]]]:
    """Name, numbers, and the numbers of tokens that are measured."""
    found: dict[str, tuple[Scheme, tuple[int, ...]]] = {}
    for group in (32, 64, 128):
        blocks = Blocks(1, group)
        found[f"int4 g{group}"] = Scheme(TensorSpec("int4", blocks, scale="bfloat16")), tuple(ROUNDS)
        found[f"uint4 g{group}"] = Scheme(TensorSpec("uint4", blocks, True, "bfloat16")), (1, 4, 16)
    double = TensorSpec("nf4", Blocks(1, 64), scale=TensorSpec("dyn8", Blocks(1, 256)))
    found["nf4 g64"] = Scheme(TensorSpec("nf4", Blocks(1, 64), scale="bfloat16")), tuple(ROUNDS)
    found["nf4 g64 double"] = Scheme(double), (1, 4, 16)
    for grid in ("fp4", "e2m1", "e1m2", "e3m0"):
        found[f"{grid} g64"] = Scheme(TensorSpec(grid, Blocks(1, 64), scale="bfloat16")), (1,)
    for grid in ("int3", "int8", "e4m3", "int6"):
        blocks = Blocks(1, 64 if grid in ("int3", "int6") else -1)
        found[f"{grid} g64" if blocks.cols > 0 else f"{grid} rows"] = (
            Scheme(TensorSpec(grid, blocks, scale="bfloat16")),
            (1, 16, 512) if grid == "int8" else (1,),
        )
    rows = TensorSpec("int8", Blocks(1, -1))
    found["w8a8"] = Scheme(rows, INT8), (1, 16, 128, 512)
    found["llm.int8"] = Scheme(rows, InputSpec(INT8.tensor, split=6.0)), (1, 512)
    return found


def ours(scheme: Scheme, shape: tuple[int, int], tokens: Tensor) -> tuple[Call, int]:
    """Our kernel on a set of weights, and the bytes of one."""
    layout = default_layout(scheme.weight)
    empty, spec = pack_empty(shape, Recipe(scheme, layout=layout), torch.bfloat16)
    size = sum(tensor.numel() * tensor.element_size() for tensor in empty.values())
    some = {name: random_like(tensor) for name, tensor in empty.items()}
    weights = [[tensor.clone() for tensor in some.values()] for _ in range(max(2, int(SET / size)))]
    bound = [cpu.bind(packed, spec) for packed in weights]
    return lambda i: bound[i % len(bound)](tokens, weights[i % len(bound)], None), size


def random_like(tensor: Tensor) -> Tensor:
    """Random codes, scales that are not."""
    generator = torch.Generator().manual_seed(0)
    if tensor.dtype == torch.uint8:
        return torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
    return (torch.rand(tensor.shape, generator=generator) * 0.01 + 0.001).to(tensor.dtype)


def dense(shape: tuple[int, int], tokens: Tensor) -> Call:
    """torch's product in bfloat16."""
    weights = dense_set(shape)
    return lambda i: F.linear(tokens, weights[i % len(weights)])


@lru_cache(maxsize=1)
def dense_set(shape: tuple[int, int]) -> list[Tensor]:
    """A gigabyte of bfloat16 weights."""
    some = torch.randn(shape, dtype=torch.bfloat16)
    return [some.clone() for _ in range(max(2, int(SET / some.numel() / 2)))]


def torch_int4(shape: tuple[int, int], tokens: Tensor, group: int = 64) -> Call:
    """torch's packed 4-bit product, the one behind torchao's weight-only method on CPUs."""
    n, k = shape
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // group, n, 2).to(torch.bfloat16)
    weights = [packed.clone() for _ in range(max(2, int(SET / packed.numel())))]
    return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, weights[i % len(weights)], group, scales)


def torch_int8(shape: tuple[int, int], tokens: Tensor) -> Call:
    """torch's product of bfloat16 inputs and int8 weights."""
    some, scales = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]).to(torch.bfloat16)
    weights = [some.clone() for _ in range(max(2, int(SET / some.numel())))]
    return lambda i: torch._weight_int8pack_mm(tokens, weights[i % len(weights)], scales)


def onednn_int8(shape: tuple[int, int], tokens: Tensor) -> Call:
    """oneDNN's integer product of prepacked weights; its inputs are integers already."""
    n, _ = shape
    pack, multiply = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
    some = torch.randint(-127, 128, shape, dtype=torch.int8)
    x = torch.randint(0, 255, tokens.shape, dtype=torch.uint8)
    weights = [pack(some, x.shape) for _ in range(max(2, int(SET / some.numel())))]
    scales, zeros = torch.rand(n), torch.zeros(n, dtype=torch.int64)

    def run(i: int) -> object:
        given = (x, 0.1, 127, weights[i % len(weights)], scales, zeros, None)
        return multiply(*given, 1.0, 0, torch.bfloat16, "none", [], "")

    return run


def bitsandbytes(shape: tuple[int, int], tokens: Tensor, kind: str) -> Call:
    """A layer of bitsandbytes, as it runs after its first call."""
    import copy

    import bitsandbytes as bnb

    n, k = shape
    values = torch.randn(shape, dtype=torch.bfloat16)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    else:
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.eval()
    size = n * k // (2 if kind == "nf4" else 1)
    layers = [copy.deepcopy(layer) for _ in range(max(2, int(SET / size)))]
    for each in layers:
        each(tokens)
    return lambda i: layers[i % len(layers)](tokens)


PEERS: dict[str, dict[str, Callable[[tuple[int, int], Tensor], Call]]] = {
    "int4 g64": {"torch int4": torch_int4},
    "nf4 g64": {"bitsandbytes nf4": lambda shape, x: bitsandbytes(shape, x, "nf4")},
    "int8 rows": {"torch int8": torch_int8},
    "w8a8": {"oneDNN int8": onednn_int8},
    "llm.int8": {"bitsandbytes int8": lambda shape, x: bitsandbytes(shape, x, "int8")},
}


@lru_cache(maxsize=1)
def one_gigabyte() -> Tensor:
    """What is read for comparison."""
    return torch.ones(int(SET) // 8, dtype=torch.int64)


def measured(name: str, scheme: Scheme, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Milliseconds of every contender for one format, shape and number of tokens."""
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1))
    if name == "llm.int8":
        x[:, ::200] *= 10  # half a percent of outlier columns
    x = x.to(torch.bfloat16)
    calls: dict[str, Call] = {}
    calls["ours"], size = ours(scheme, shape, x)
    words = one_gigabyte()
    step, library = size // 8, cpu.library()
    assert isinstance(library, cpu.Library)
    places = max(1, words.numel() // step)
    calls["read"] = lambda i: library.read(words[i % places * step :][:step])
    calls["bf16"] = dense(shape, x)
    for peer, make in PEERS.get(name, {}).items():
        try:
            calls[peer] = make(shape, x)
        except (ImportError, RuntimeError, AttributeError) as error:
            print(f"{peer} does not run here: {str(error).splitlines()[0]}", flush=True)
    found: dict[str, list[float]] = {contender: [] for contender in calls}
    for turn in range(ROUNDS[tokens] + 2):
        for contender, call in calls.items():
            started = time.perf_counter()
            call(turn)
            if turn >= 2:
                found[contender].append(time.perf_counter() - started)
    seconds = {contender: median(values) for contender, values in found.items()}
    line = {"format": name, "shape": shape, "tokens": tokens, "bytes": size}
    line["milliseconds"] = {contender: 1e3 * value for contender, value in seconds.items()}
    line["of_read"] = seconds["read"] / seconds["ours"]
    line["times"] = {contender: value / seconds["ours"] for contender, value in seconds.items() if contender != "ours"}
    return line


def plan(quick: bool) -> Iterator[tuple[str, Scheme, tuple[int, int], int]]:
    """What is measured: everything on the main shape, 4-bit formats for one token on all."""
    for name, (scheme, tokens) in formats().items():
        for shape in SHAPES:
            for count in tokens:
                wanted = name in PEERS and shape == SHAPES[0] if quick else count == 1 or shape != SHAPES[2]
                if wanted:
                    yield name, scheme, shape, count


@torch.no_grad()
def main(quick: bool) -> None:
    """Measure, print, write; `quick`: one shape and the formats that others have too, printed only."""
    target = result_of("cpu_linear")  # or an error, before anything takes time
    lines = []
    for name, scheme, shape, tokens in plan(quick):
        line = measured(name, scheme, shape, tokens)
        lines.append(line)
        times = "  ".join(f"{contender} {value:.2f}" for contender, value in line["times"].items())
        print(
            f"{name:14s} {shape[0]:5d} x {shape[1]:5d}  {tokens:3d}  {line['milliseconds']['ours']:8.3f} ms  {times}",
            flush=True,
        )
    if quick:
        return
    library = cpu.library()
    assert isinstance(library, cpu.Library)
    result = {**facts(str(__doc__), __file__), "isa": library.isa, "set": SET, "rows": lines}
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result))
    plot(result, target.with_suffix(".png"))


def markdown(result: dict[str, Any]) -> str:
    """The table as text."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about = " ".join(str(__doc__).split("\n\n")[1].split()).partition(" Writes ")[0]
    out = ["# CPU kernels, one layer at a time", "", "Made by `benchmarks/cpu_linear.py`; do not edit.", "", about, ""]
    out += [f"![times as fast as bfloat16 by the number of tokens](cpu_linear_{result['isa']}.png)", ""]
    out += ["| format | weight | tokens | ms | of read | times bf16 | times others |", "|---|---|---|---|---|---|---|"]
    for line in result["rows"]:
        others = [f"{n} {v:.1f}" for n, v in line["times"].items() if n not in ("read", "bf16")]
        shape = f"{line['shape'][0]} × {line['shape'][1]}"
        figures = f"{line['milliseconds']['ours']:.2f} | {line['of_read']:.2f} | {line['times']['bf16']:.2f}"
        out.append(f"| {line['format']} | {shape} | {line['tokens']} | {figures} | {', '.join(others)} |")
    machine = result["machine"]
    ending = f"{machine['processor']}, {machine['threads']} threads, {result['isa']}; {versions}."
    return "\n".join([*out, "", ending, ""])


def plot(result: dict[str, Any], target: Path) -> None:
    """Times bfloat16 by the number of tokens, on the main shape."""
    try:
        import matplotlib
    except ImportError:  # the extra "plot"
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("int4 g64", "nf4 g64", "int8 rows", "w8a8"):
        lines = [line for line in result["rows"] if line["format"] == name and tuple(line["shape"]) == SHAPES[0]]
        axes.plot([line["tokens"] for line in lines], [line["times"]["bf16"] for line in lines], "o-", label=name)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="times as fast as bfloat16", title="4096 × 4096")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, the formats that others have too; prints only")
    main(parser.parse_args().quick)
