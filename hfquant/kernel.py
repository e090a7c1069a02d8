"""Kernels: how a layout runs on a device, and which one is chosen."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .errors import UnsupportedError
from .hadamard import hadamard, inverse_hadamard
from .halves import DecoderParts, Halves
from .spec import PackedSpec, Scheme
from .tables import Table

logger = logging.getLogger(__name__)

Run = Callable[[Tensor, list[Tensor], Tensor | None, PackedSpec], Tensor]
Bound = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]
"""(x, packed, bias) -> y for one packed weight."""
Columns = Callable[[list[Tensor], PackedSpec, torch.dtype, int, int], Tensor]
RunJobs = Callable[[Sequence[Bound], Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], bool]
Join = Callable[[Sequence[Bound], Sequence[Tensor | None]], Callable[[Tensor], list[Tensor]] | None]
InputGrad = Callable[[Tensor, list[Tensor], PackedSpec], Tensor]
WhyNot = Callable[[PackedSpec, torch.dtype, tuple[int, int] | None], str | None]


def _always(spec: PackedSpec, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to compute a quantized linear layer.

    `layout` and `device` ("cpu", "cuda", ...) say what it is for, "*" for any. `run(x, packed, bias, spec)` computes
    y [..., N]. `why_not(spec, dtype, capability)` gives the reason why it cannot, or None; `capability` is the CUDA
    compute capability or None. The kernel with the highest `priority` that does not decline is used. Kernels know
    nothing of rotated weights: their input is rotated before `run`. `bind(packed, spec)` may do once what `run` does at
    every call for the same tensors; what it returns must not keep them alive. `columns(packed, spec, dtype, first,
    last)` may give columns [N, last - first] of the matrix of a weight that is not declined, as `QTensor.dequantize`
    does; it is asked for all of them where they are stored in another order or some are kept in 16 bit.
    `run_jobs(bounds, xs, biases, ys)` may run several bound weights at once into given results, to the same bits; it
    returns False where it cannot. `join(bounds, biases)` gives what runs them all on one input, None where it cannot.
    `halves(parts)` gives what runs a decoder layer before and after its attention, None where it cannot.
    `input_grad(grad, packed, spec)` computes grad [..., N] @ W; without it gradients go through `columns`.
    """

    name: str
    layout: str
    device: str
    run: Run
    why_not: WhyNot = _always
    priority: int = 0
    bind: Callable[[list[Tensor], PackedSpec], Bound] | None = None
    columns: Columns | None = None
    run_jobs: RunJobs | None = None
    join: Join | None = None
    halves: Callable[[DecoderParts], Halves | None] | None = None
    input_grad: InputGrad | None = None


KERNELS: Table[Kernel] = Table("kernel")
REFERENCE = Kernel("reference", "*", "*", reference.linear, priority=-1)

_forced: ContextVar[str | None] = ContextVar("hfquant_kernel", default=None)


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Run every quantized layer on the kernel `name` inside the block, to tell numbers from kernels.

    Raises SpecError if there is no such kernel, UnsupportedError at the first layer that it cannot run.
    """
    KERNELS.get(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_kernel() -> str | None:
    """The kernel that `use_kernel` asks for at this point, or None."""
    return _forced.get()


def run_linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, key: str) -> Tensor:
    """Compute a quantized linear layer with the best kernel; `key` is the text form of its PackedSpec.

    Raises UnsupportedError if only the reference kernel can, under HFQUANT_STRICT=1 and outside of `use_kernel`.
    """
    spec = PackedSpec.parse(key)
    kernel = best(key, x.device, dtype_inside(spec, x.dtype))
    if not spec.rotated or kernel is REFERENCE:
        return kernel.run(x, packed, bias, spec)
    return kernel.run(rotate(x, spec), packed, bias, replace(spec, rotated=False)).to(x.dtype)


def columns_of(key: str, device: torch.device, dtype: torch.dtype) -> Columns | None:
    """What gives columns of a weight's matrix at this point, None if only the reference does."""
    kernel, forced = choose(_without_input(key), device, dtype), _forced.get()
    return kernel.columns if forced in (None, kernel.name) and not PackedSpec.parse(key).rotated else None


def run_input_grad(grad: Tensor, packed: list[Tensor], key: str) -> Tensor:
    """Gradient [..., K] of the input of a quantized linear layer; `grad` [..., N] is that of its output.

    Quantization of the input counts as identity, so that of the weight alone decides which kernel can. Inside of
    `use_kernel` the reference stands in for a kernel without gradients.
    """
    spec, forced = PackedSpec.parse(key), _forced.get()
    kernel = choose(_without_input(key), grad.device, grad.dtype)
    if kernel.input_grad is None or forced not in (None, kernel.name):
        return reference.input_grad(grad, packed, spec)
    out = kernel.input_grad(grad, packed, replace(spec, rotated=False))
    return inverse_hadamard(out).to(grad.dtype) if spec.rotated else out


@lru_cache(maxsize=4096)
def _without_input(key: str) -> str:
    """The key of the same weight in a layer that does not quantize its input."""
    spec = PackedSpec.parse(key)
    return replace(spec, scheme=Scheme(spec.scheme.weight)).key()


def rotate(x: Tensor, spec: PackedSpec) -> Tensor:
    """The input of a rotated layer, as its kernel gets it."""
    return hadamard(x).to(dtype_inside(spec, x.dtype))


def dtype_inside(spec: PackedSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kernel's input: that of the layer's, but what is rotated and then quantized is rounded once."""
    return torch.float32 if spec.rotated and spec.scheme.input is not None else dtype


def best(key: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel that runs a weight at this point. Raises like `run_linear`."""
    forced = _forced.get()
    kernel = choose(key, device, dtype, forced)
    if kernel is REFERENCE and forced is None:
        _report_fallback(PackedSpec.parse(key), device, dtype)
    return kernel


@lru_cache(maxsize=4096)
def choose(key: str, device: torch.device, dtype: torch.dtype, forced: str | None = None) -> Kernel:
    """The kernel for a weight on a device: `forced` by name, or the best one.

    Raises UnsupportedError with the reason when the forced one cannot run it. Remembers its answers: whoever changes
    the table of kernels calls `choose.cache_clear()`.
    """
    reasons = declined(PackedSpec.parse(key), device, dtype)
    if forced is not None:
        if reason := reasons.get(forced):
            raise UnsupportedError(f"kernel {forced!r} was asked for on {device.type}", [reason])
        return KERNELS.get(forced)
    able = [KERNELS.get(name) for name, reason in reasons.items() if reason is None]
    return max(able, key=lambda kernel: kernel.priority)


def declined(spec: PackedSpec, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each kernel by name: why it cannot run this weight, or None if it can."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reasons: dict[str, str | None] = {}
    for name in KERNELS.names():
        kernel = KERNELS.get(name)
        if kernel.layout not in ("*", spec.layout):
            reasons[name] = f"{name}: is for layout {kernel.layout!r}, the weight has {spec.layout!r}"
        elif kernel.device not in ("*", device.type):
            reasons[name] = f"{name}: is for {kernel.device}, the weight is on {device.type}"
        else:
            reason = kernel.why_not(spec, dtype, capability)
            reasons[name] = None if reason is None else f"{name}: {reason}"
    return reasons


def _report_fallback(spec: PackedSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Say once per kind of weight that only the reference kernel is left; an error under HFQUANT_STRICT=1."""
    what = f"{spec.scheme.weight.grid} weights in layout {spec.layout!r} on {device.type}"
    others = tuple(reason for reason in declined(spec, device, dtype).values() if reason is not None)
    if os.environ.get("HFQUANT_STRICT") == "1":
        raise UnsupportedError(f"HFQUANT_STRICT=1 and no fast kernel runs {what}", others)
    _log_once(what, others)


@lru_cache(maxsize=1024)
def _log_once(what: str, others: tuple[str, ...]) -> None:
    level = logging.WARNING if others else logging.INFO
    logger.log(level, "%s run on the reference kernel, which is slow%s", what, "".join(f"\n  - {o}" for o in others))
