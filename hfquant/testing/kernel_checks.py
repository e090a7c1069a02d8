"""Checks of a kernel against the reference, which defines what it must compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernel import Kernel
from ..layouts import unpack, unpack_inputs
from ..quantize import quantize_linear
from ..recipe import Recipe
from ..reference import linear as reference_linear
from ..spec import PackedSpec
from .report import NotRun, Report, require
from .weight_checks import DTYPES, pack_sample, sample, stats_for

SHAPES = ((48, 176), (64, 64), (7, 33))
LEADS = ((26,), (1,), (2, 13), (), (0,))  # shapes of the input in front of its last axis; the last one holds no token


def check_kernel(report: Report, kernel: Kernel, recipes: Iterable[Recipe]) -> None:
    """Run a kernel on every weight that it accepts of the given recipes."""
    known = list(recipes)
    for dtype in DTYPES:
        name = f"agrees with the reference in {str(dtype).removeprefix('torch.')}"
        report.run(f"kernel {kernel.name}", name, partial(agrees, kernel, known, dtype))


def agrees(kernel: Kernel, recipes: list[Recipe], dtype: torch.dtype) -> None:
    """Outputs within the tolerance of `allowed`, and neither the input nor the weight written to."""
    device = _device(kernel)
    reasons: list[str] = []
    ran = 0
    for recipe in recipes:
        for shape in SHAPES:
            w = sample(shape)
            packed, spec = pack_sample(quantize_linear(w, recipe, stats_for(w, recipe)), recipe)
            if reason := _why_not(kernel, spec, dtype, device):
                reasons.append(reason)
                continue
            tensors = [tensor.to(device) for tensor in packed.values()]
            for x, bias in _calls(shape, dtype, device):
                _compare(kernel, x, tensors, bias, spec)
                ran += 1
    if not ran:
        raise NotRun("; ".join(dict.fromkeys(reasons)) or "no method uses its layout")


def _compare(kernel: Kernel, x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec) -> None:
    given = [x.clone(), *(tensor.clone() for tensor in packed)]
    y = kernel.run(x, packed, bias, spec)
    ending = "with bias" if bias is not None else "without bias"
    what = f"x {list(x.shape)}, weight {list(spec.shape)} {spec.scheme.weight.grid}, {ending}"
    require(y.shape == (*x.shape[:-1], spec.shape[0]), f"output has shape {list(y.shape)} for {what}")
    require(y.dtype == x.dtype, f"output is {y.dtype} for {x.dtype} inputs")
    unchanged = all(torch.equal(a, b) for a, b in zip(given, [x, *packed], strict=True))
    require(unchanged, f"the input or the packed weight was written to for {what}")
    expected = reference_linear(x.float(), packed, None if bias is None else bias.float(), spec)
    require(bool(torch.isfinite(y).all()), f"output holds NaN or infinite values for {what}")
    if y.numel():
        error = (y.float() - expected).abs()
        worst = float((error / allowed(x.float(), packed, bias, spec, x.dtype)).max())
        require(worst <= 1, f"{worst:.3g} times the allowed difference to the reference for {what}")
        relative = float(error.norm() / expected.norm())
        limit = 2 * torch.finfo(x.dtype).eps + (0 if spec.scheme.input is None else 5e-3)
        require(relative <= limit, f"relative difference {relative:.3g} > {limit:.3g} to the reference for {what}")


def allowed(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: PackedSpec, dtype: torch.dtype) -> Tensor:
    """Largest difference [..., N] that rounding explains, for inputs `x` [..., K] float32 of a kernel in `dtype`.

    Two roundings to `dtype` and K roundings to float32 of the sum of |x| |w|; and where the input is quantized, one of
    its codes on the other side of a tie.
    """
    w = unpack(packed, spec).dequantize().abs()
    size = x.abs() @ w.T + (0 if bias is None else bias.float().abs())
    bound = (2 * torch.finfo(dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps) * size
    if spec.scheme.input is not None:
        levels = spec.scheme.input.tensor.numbers().levels()
        static = unpack_inputs(packed, spec)
        unit = x.abs().amax(-1, keepdim=True) / levels.abs().max() if static is None else static.scale
        bound = bound + float(levels.diff().max()) * unit * w.amax(1)
    return bound + 1e-30


def _calls(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs and biases to try on a weight of `shape` [N, K]."""
    bias = sample((1, shape[0]), seed=3)[0].to(device, dtype)
    for seed, lead in enumerate(LEADS):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(*lead, shape[1], generator=generator).to(device, dtype), bias if seed % 2 else None
    spread = torch.randn(26, 2 * shape[1], generator=torch.Generator().manual_seed(9)).to(device, dtype)
    yield spread[:, ::2], bias  # not contiguous


def _device(kernel: Kernel) -> torch.device:
    """Where to run a kernel. Raises NotRun if there is no such device."""
    if kernel.device in ("*", "cpu"):
        return torch.device("cpu")
    backend = getattr(torch, kernel.device, None)
    if backend is None or not backend.is_available():
        raise NotRun(f"there is no {kernel.device} device here")
    return torch.device(kernel.device)


def _why_not(kernel: Kernel, spec: PackedSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Reason why a kernel is not for a weight, or None."""
    if kernel.layout not in ("*", spec.layout):
        return f"no method stores its weights in layout {kernel.layout!r}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return kernel.why_not(spec, dtype, capability)
