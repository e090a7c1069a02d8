"""Does every kernel compute what the reference computes? All kinds of weights, ragged shapes, gradients, experts.

Each result is computed twice: in memory that held NaN before, and in memory that was just filled with NaN and given
back, so that what a kernel leaves out is seen. Both must be equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from hfquant import ops, reference
from hfquant.backend import load_all
from hfquant.blocks import Blocks
from hfquant.spec import PackedSpec, Scheme, TensorSpec

from . import expert_layers
from .bounds import BOUND, GRADIENT, bound, distance
from .findings import Findings
from .setting import Setting
from .weights import (
    ALL,
    E4M3_ROWS,
    FORMATS,
    INT8,
    INT8_ROWS,
    LEVELS,
    ROWS,
    Format,
    both,
    kernel_of,
    layer_of,
    random_input,
    random_packed,
    weights,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DOUBLE = TensorSpec("dyn8", Blocks(1, 256))


def formats() -> dict[str, Format]:
    """Everything that the kernels take."""
    found = dict(FORMATS)
    for grid in ("int2", "int5", "int6", "int7", "e3m0", "e1m2", "e3m2", "e4m3", "e5m2ieee", "fp4", "dyn8"):
        found[f"{grid} g64"] = Format(weights(grid, 64))
    found["nf4 g64 double"] = Format(weights("nf4", 64, scale=DOUBLE))
    found["quantile4 rows"] = Format(weights("quantile4", scale="float32"))
    found["int4 g12"] = Format(weights("int4", 12))
    found["int4 tiles"] = Format(Scheme(TensorSpec("int4", Blocks(16, 16))))
    found["int4 bytes"] = Format(weights("int4", 64), layout="bytes")
    found["uint3 g64, order"] = Format(weights("uint3", 64, zero=True), order=True)
    found["int4 g64, outliers"] = Format(weights("int4", 64), outliers=5)
    whole = TensorSpec("int8", ALL)
    found["w8a8 static"] = Format(both(INT8_ROWS, whole, dynamic=False), INT8)
    found["w4a8"] = Format(both(TensorSpec("int4", ROWS), INT8_ROWS), INT8)
    found["llm.int8, outliers"] = Format(both(INT8_ROWS, INT8_ROWS, split=6.0), INT8, outliers=3)
    found["w8a8, order"] = Format(both(INT8_ROWS, INT8_ROWS), INT8, order=True)
    tensor = TensorSpec("e4m3fn", ALL)
    found["fp8 tensor"] = Format(both(tensor, tensor), LEVELS, "float8")
    found["fp8 e5m2"] = Format(both(TensorSpec("e5m2ieee", ROWS), E4M3_ROWS), LEVELS, "float8")
    found["fpq w4a4 static"] = Format(both(TensorSpec("e2m1", ROWS), TensorSpec("e2m1", ALL), dynamic=False), LEVELS)
    found["fpq w6a6 groups"] = Format(both(TensorSpec("e3m2", ROWS), TensorSpec("e2m3", Blocks(1, 32))), LEVELS)
    return found


# One of each family, for tools under which everything takes long.
FAMILIES = ("int4 g128", "nf4 g64", "e2m1 g32", "int3 g128", "int8 rows", "w4a8", "llm.int8", "fp8 tiles", "fpq w4a8")


@dataclass(frozen=True)
class Case:
    """A layer and an input of `rows` rows."""

    name: str
    format: Format
    rows: int
    shape: tuple[int, int]


def cases(setting: Setting, names: tuple[str, ...] | None = None) -> list[Case]:
    """Every kind of weight with the first shape before any with the second one."""
    chosen = {name: format for name, format in formats().items() if names is None or name in names}
    return [Case(name, format, rows, (n, k)) for rows, n, k in setting.sizes.ragged for name, format in chosen.items()]


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory from `torch.empty` holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


def used_memory(like: Tensor) -> None:
    """Fill memory of the size of a tensor with NaN and give it back: the allocator hands it out again."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(4)]
    del blocks


def compare(line: dict[str, Any], key: str, exact: Tensor, run: Callable[[], Tensor], bound: float) -> None:
    """Note in a row how far from `exact` the results of `run` are, and whether they are the same twice."""
    with poisoned():
        first = run()
    used_memory(first)
    second = run()
    found = {key: distance(first, exact), f"{key} bound": bound, "repeats": torch.equal(first, second)}
    fits = first.shape == exact.shape and found[key] <= bound and found["repeats"]
    line |= found | {"agrees": line.get("agrees", True) and fits}


def check(setting: Setting, case: Case, dtype: torch.dtype, line: dict[str, Any]) -> None:
    """The product of one layer, and the gradient of its input."""
    (n, k), device = case.shape, setting.device
    tensors, spec = random_packed(case.shape, case.format, device, seed=case.rows)
    bias = torch.randn(n, generator=torch.Generator(device).manual_seed(3), device=device).to(dtype)
    layer = layer_of(tensors, spec, bias)
    layer.dtype = dtype
    line["kernel"] = kernel_of(layer)
    x = random_input(case.rows, k, device, dtype, seed=case.rows)
    x = x[None] if case.rows % 2 else x
    packed = layer.packed()
    exact = reference.linear(x.float(), packed, bias.float(), spec)
    with torch.no_grad():
        compare(line, "distance", exact, lambda: layer(x), bound(layer, dtype, setting.is_gpu))
        line["agrees"] &= layer(x[..., :0, :]).shape == (*x.shape[:-2], 0, n)  # no token at all
    if setting.is_gpu:
        line["agrees"] &= line["kernel"] == case.format.kernel
    gradient(packed, spec, x, line)


def gradient(packed: list[Tensor], spec: PackedSpec, x: Tensor, line: dict[str, Any]) -> None:
    """The gradient of the input, in which its quantization counts as identity."""
    grad = random_input(x[..., 0].numel(), spec.shape[0], x.device, x.dtype, seed=7).reshape(*x.shape[:-1], -1)
    exact = reference.input_grad(grad.float(), packed, spec)

    def run() -> Tensor:
        given = x.detach().requires_grad_()
        y = ops.linear(given, packed, None, spec.key())
        return torch.autograd.grad(y, given, grad)[0]

    compare(line, "gradient", exact, run, GRADIENT * BOUND[x.dtype])


def check_experts(setting: Setting, format: Format, dtype: torch.dtype, tokens: int, line: dict[str, Any]) -> None:
    """All experts of a call; on a GPU they run in one launch for each projection."""
    call = expert_layers.call(setting, format, dtype, tokens)
    with torch.no_grad():
        line["kernel"] = call.kernel
        # Rounded are the results of both products and of the activation between them, with levels as above.
        compare(line, "distance", call.exact(), call.run, 4 * BOUND[dtype])
    if setting.is_gpu:
        line["agrees"] &= line["kernel"] == expert_layers.TOGETHER


def other_operators(setting: Setting, dtype: torch.dtype, line: dict[str, Any]) -> None:
    """`dequantize` and `embedding` give what the same tensors give on a CPU, to the last bit."""
    tensors, spec = random_packed((48, 80), FORMATS["nf4 g64"], setting.device)
    packed, key = list(tensors.values()), spec.key()
    there = [tensor.cpu() for tensor in packed]
    ids = torch.tensor([[0, 3, 3], [47, 1, 0]], device=setting.device)
    pairs = {
        "dequantize": (ops.dequantize(packed, key, dtype), ops.dequantize(there, key, dtype)),
        "embedding": (ops.embedding(ids, packed, key, dtype), ops.embedding(ids.cpu(), there, key, dtype)),
    }
    line["different"] = [name for name, (here, cpu) in pairs.items() if not torch.equal(here.cpu(), cpu)]
    line["agrees"] = not line["different"]


def checks(setting: Setting, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """What there is to check in one dtype: what a row is called, and what fills it in."""
    for case in cases(setting):
        what = {"name": case.name, "rows": case.rows, "shape": case.shape}
        yield what, partial(check, setting, case, dtype)
    for name in ("int4 g128", "nf4 g64"):
        for tokens in (1, 33):
            what = {"name": f"experts, {name}", "rows": tokens}
            yield what, partial(check_experts, setting, FORMATS[name], dtype, tokens)
    yield {"name": "dequantize, embedding"}, partial(other_operators, setting, dtype)


def run(setting: Setting, findings: Findings, dtype_name: str) -> None:
    """A share of all checks in one dtype."""
    load_all()
    waiting = setting.share_of(checks(setting, DTYPES[dtype_name]))
    for what, work in setting.while_time(findings, "checks", waiting):
        with findings.row(**what, dtype=dtype_name, agrees=True) as line:
            work(line)


def families(setting: Setting, findings: Findings) -> None:
    """Two small layers of each family in bfloat16, and their gradients."""
    load_all()
    for case in cases(setting, FAMILIES)[: 2 * len(FAMILIES)]:
        with findings.row(name=case.name, agrees=True) as line:
            check(setting, case, torch.bfloat16, line)
    with findings.row(name="experts", agrees=True) as line:
        check_experts(setting, FORMATS["int4 g128"], torch.bfloat16, 5, line)


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that do not agree, or raised."""
    return [row for row in rows if "error" in row or not row.get("agrees", True)]
