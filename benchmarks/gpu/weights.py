"""Quantized layers with random codes, made where they are needed: no matrix in floating point is ever there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import hfquant
from hfquant.blocks import Blocks
from hfquant.layouts import LAYOUTS, default_layout, pack_inputs, packed_spec
from hfquant.nn import QLinear
from hfquant.qtensor import InputParams, Outliers, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

WEIGHT_ONLY, INT8, LEVELS = "triton", "triton_int8", "triton_levels"
ROWS, ALL = Blocks(1, -1), Blocks(-1, -1)


@dataclass(frozen=True)
class Format:
    """Numbers of a layer, how they are stored (None: as densely as the core can), and the kernel of a GPU for them.

    `order`: columns are stored in another order; `outliers`: so many columns are in 16 bit.
    """

    scheme: Scheme
    kernel: str = WEIGHT_ONLY
    layout: str | None = None
    order: bool = False
    outliers: int = 0


def weights(grid: str, group: int = -1, zero: bool = False, scale: str | TensorSpec = "bfloat16") -> Scheme:
    """Numbers of a layer that leaves its input as it is."""
    return Scheme(TensorSpec(grid, Blocks(1, group), zero, scale))


def both(weight: TensorSpec, seen: TensorSpec, dynamic: bool = True, split: float | None = None) -> Scheme:
    """Numbers of a layer that quantizes its input."""
    return Scheme(weight, InputSpec(seen, dynamic, split))


INT8_ROWS, E4M3_ROWS = TensorSpec("int8", ROWS), TensorSpec("e4m3fn", ROWS)
E4M3_TILES = TensorSpec("e4m3fn", Blocks(128, 128))
FORMATS = {
    "int4 g128": Format(weights("int4", 128)),
    "nf4 g64": Format(weights("nf4", 64)),
    "uint4 g128": Format(weights("uint4", 128, zero=True)),
    "int3 g128": Format(weights("int3", 128)),
    "int8 rows": Format(weights("int8", scale="float32")),
    "e2m1 g32": Format(weights("e2m1", 32)),
    "w8a8": Format(both(INT8_ROWS, INT8_ROWS), INT8),
    "llm.int8": Format(both(INT8_ROWS, INT8_ROWS, split=6.0), INT8),
    "fp8 rows": Format(both(E4M3_ROWS, E4M3_ROWS), LEVELS, "float8"),
    "fp8 tiles": Format(both(E4M3_TILES, TensorSpec("e4m3fn", Blocks(1, 128))), LEVELS, "float8"),
    "fpq w4a8": Format(both(TensorSpec("e2m1", ROWS), TensorSpec("e4m3", ROWS)), LEVELS),
}


def random_qtensor(shape: tuple[int, int], format: Format, device: torch.device, seed: int = 0) -> QTensor:
    """Any codes [N, K], with scales that make weights of the size 1 / sqrt(K)."""
    generator = torch.Generator(device).manual_seed(seed)
    spec, grid = format.scheme.weight, format.scheme.weight.numbers()
    fitted = None
    if hasattr(grid, "fit"):  # levels of its own
        fitted = torch.randn(2**grid.bits, generator=generator, device=device).sort().values
    levels = grid.levels() if fitted is None else fitted.cpu()
    codes = torch.randint(len(levels), shape, generator=generator, dtype=torch.uint8, device=device)
    middle = levels.mean() if spec.zero else torch.zeros(())
    typical = 1 / (shape[1] ** 0.5 * float((levels - middle).square().mean().sqrt()))
    counts = spec.blocks.counts(shape)
    spread = torch.rand(counts, generator=generator, device=device) + 0.5
    scale: Tensor | QTensor
    if isinstance(spec.scale, TensorSpec):
        row, inner = (1, counts[0] * counts[1]), spec.scale.numbers()
        upper = torch.randint(
            inner.size // 2, inner.size, row, generator=generator, dtype=torch.uint8, device=device
        )  # none is 0 or negative
        outer = torch.full(spec.scale.blocks.counts(row), typical / inner.top, device=device)
        scale = QTensor(upper, outer, None, None, spec.scale)
    else:
        scale = (spread * typical).to(spec.scale_dtype)
    zero = None
    if spec.zero:
        near = int(middle) + torch.randint(-1, 2, counts, generator=generator, device=device)
        zero = near.clamp(0, len(levels) - 1).to(torch.uint8)
    order = torch.randperm(shape[1], generator=generator, device=device).int() if format.order else None
    q = QTensor(codes, scale, zero, order, spec, fitted)
    if format.outliers:
        index = torch.randperm(shape[1], generator=generator, device=device)[: format.outliers].sort().values.int()
        kept = torch.randn(shape[0], format.outliers, generator=generator, device=device) / shape[1] ** 0.5
        q = replace(q, outliers=Outliers(index, kept.bfloat16()))
    return q


def random_packed(
    shape: tuple[int, int], format: Format, device: torch.device, seed: int = 0
) -> tuple[dict[str, Tensor], PackedSpec]:
    """The tensors of a layer by name, and what they are."""
    layout = format.layout or default_layout(format.scheme.weight)
    tensors = LAYOUTS.get(layout).pack(random_qtensor(shape, format, device, seed))
    given = format.scheme.input
    if given is not None and not given.dynamic:
        tensors |= pack_inputs(
            InputParams(torch.full((1,), 4 / given.tensor.numbers().top, device=device)), format.scheme
        )
    return tensors, packed_spec(tensors, layout, shape, format.scheme)


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def layer_of(tensors: dict[str, Tensor], spec: PackedSpec, bias: Tensor | None = None) -> QLinear:
    """A layer as models have it."""
    given = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer = QLinear(spec.shape[1], spec.shape[0], given, torch.bfloat16)
    layer.kind = "linear"
    layer.hold(tensors, spec)
    return layer.eval()


def kernel_of(layer: nn.Module) -> str:
    """The kernels that `hfquant.explain` names for a layer or a model."""
    used = {row.kernel or "none" for row in hfquant.explain(nn.ModuleDict({"of": layer}))}
    return ", ".join(sorted(used))


def random_input(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensor:
    """Normal numbers [rows, columns], with half a percent of columns ten times as large."""
    generator = torch.Generator(device).manual_seed(1000 + seed)
    x = torch.randn(rows, columns, generator=generator, device=device)
    x[:, ::200] *= 10
    return x.to(dtype)
