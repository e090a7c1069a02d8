"""Layers of other packages that compute what a format of ours does. What is not installed is left out, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .setting import Setting
from .timing import Call, how_many, rotated

Shape = tuple[int, int]
Ready = Callable[[Sequence[Tensor]], Call]
"""From inputs to what is timed: an input and a weight of the call's number."""


@dataclass(frozen=True)
class Peer:
    """`make` builds the weights of a shape once. `syncs`: it waits for the GPU in every call."""

    make: Callable[[Shape, Setting], Ready]
    syncs: bool = False


def over(weights: Sequence[Any], product: Callable[[Tensor, Any], object]) -> Ready:
    """The plain way: weights and inputs in turns."""

    def ready(xs: Sequence[Tensor]) -> Call:
        x, weight = rotated(xs), rotated(weights)
        return lambda number: product(x(number), weight(number))

    return ready


def dense(shape: Shape, setting: Setting) -> Ready:
    """torch's product in bfloat16."""
    count = how_many(2 * shape[0] * shape[1], setting.sizes.distinct)
    some = torch.randn(shape, device=setting.device, dtype=torch.bfloat16) / shape[1] ** 0.5
    return over([some.clone() for _ in range(count)], F.linear)


def tinygemm(shape: Shape, setting: Setting, group: int = 128) -> Ready:
    """torch's own 4-bit product, the one behind torchao's tiles for tensor cores."""
    n, k = shape
    codes = torch.randint(0, 16, shape, dtype=torch.int32, device=setting.device)
    scales = torch.rand(k // min(group, k), n, 2, device=setting.device).to(torch.bfloat16)
    if setting.is_gpu:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed, multiply = torch.ops.aten._convert_weight_to_int4pack(pairs, 8), torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    count = how_many(n * k // 2, setting.sizes.distinct)
    return over([packed.clone() for _ in range(count)], lambda x, weight: multiply(x, weight, min(group, k), scales))


def torchao_int4(shape: Shape, setting: Setting) -> Ready:
    """torchao's weight-only layer."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    def layer() -> torch.nn.Module:
        made = torch.nn.Linear(shape[1], shape[0], bias=False, device=setting.device, dtype=torch.bfloat16)
        quantize_(made, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
        return made

    layers = [layer() for _ in range(how_many(shape[0] * shape[1] // 2, setting.sizes.distinct))]
    return over(layers, lambda x, layer: layer(x))


def gemlite_int4(shape: Shape, setting: Setting) -> Ready:
    """gemlite's weight-only layer."""
    from gemlite.core import DType, GemLiteLinear

    n, k = shape

    def layer() -> Any:
        sizes = {"W_nbits": 4, "group_size": 128, "in_features": k, "out_features": n}
        made = GemLiteLinear(**sizes, input_dtype=DType.BF16, output_dtype=DType.BF16)
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=setting.device)
        scales = torch.rand(n * k // 128, 1, device=setting.device).to(torch.bfloat16)
        made.pack(codes, scales, torch.full_like(scales, 8), None)
        return made

    layers = [layer() for _ in range(how_many(n * k // 2, setting.sizes.distinct))]
    return over(layers, lambda x, layer: layer(x))


def bnb_nf4(shape: Shape, setting: Setting) -> Ready:
    """bitsandbytes' Linear4bit."""
    layers = [
        linear4bit(shape, setting.device) for _ in range(how_many(shape[0] * shape[1] // 2, setting.sizes.distinct))
    ]
    return over(layers, lambda x, layer: layer(x))


def linear4bit(shape: Shape, device: torch.device) -> Any:
    """One layer of bitsandbytes with random weights in blocks of 64."""
    import bitsandbytes as bnb

    n, k = shape
    values = torch.randn(shape, dtype=torch.bfloat16, device=device) / k**0.5
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=layer).to(device)
    return layer.eval()


def bnb_int8(shape: Shape, setting: Setting) -> Ready:
    """bitsandbytes' Linear8bitLt, which asks the GPU in every call which columns are large."""
    import bitsandbytes as bnb

    n, k = shape
    values = torch.randn(shape, dtype=torch.bfloat16) / k**0.5  # it quantizes what it moves to another device

    def layer() -> Any:
        made = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to(setting.device)
        return made.eval()

    layers = [layer() for _ in range(how_many(n * k, setting.sizes.distinct))]
    return over(layers, lambda x, layer: layer(x))


def float8(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales, for largest magnitudes that broadcast against `x`."""
    scale = (amax.float() / 448).clamp_min(1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def scaled_rows(shape: Shape, setting: Setting, inside: bool) -> Ready:
    """`torch._scaled_mm` with a scale for each row of both; inputs quantized before, or `inside` of what is timed."""
    n, k = shape
    values, scales = float8(*_with_peaks(torch.randn(shape, device=setting.device) / k**0.5))
    weights = [values.clone() for _ in range(how_many(n * k, setting.sizes.distinct))]
    columns = scales.reshape(1, n).contiguous()

    def multiply(seen: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        return torch._scaled_mm(
            seen[0], weight.t(), scale_a=seen[1], scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def ready(xs: Sequence[Tensor]) -> Call:
        weight, x = rotated(weights), rotated(xs)
        before = rotated([float8(*_with_peaks(x)) for x in xs])
        if inside:
            return lambda number: multiply(float8(*_with_peaks(x(number))), weight(number))
        return lambda number: multiply(before(number), weight(number))

    return ready


def _with_peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.abs().amax(1, keepdim=True)


def scaled_tiles(shape: Shape, setting: Setting) -> Ready:
    """`torch._scaled_mm` with scales for 1 x 128 inputs and 128 x 128 weights; inputs are quantized before.

    Scales of inputs are laid out by columns, those of weights by rows, as cuBLAS wants them on Hopper.
    """
    n, k = shape
    values = (torch.randn(shape, device=setting.device)).to(torch.float8_e4m3fn)
    scales = torch.rand(n // 128, k // 128, device=setting.device)
    weights = [values.clone() for _ in range(how_many(n * k, setting.sizes.distinct))]

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        tiles = x.reshape(len(x), -1, 128)
        numbers, found = float8(tiles, tiles.abs().amax(2, keepdim=True))
        return numbers.reshape(x.shape), found.squeeze(2).t().contiguous().t()

    def ready(xs: Sequence[Tensor]) -> Call:
        seen, weight = rotated([quantized(x) for x in xs]), rotated(weights)
        options = {"scale_b": scales.t(), "out_dtype": torch.bfloat16}
        return lambda number: torch._scaled_mm(seen(number)[0], weight(number).t(), scale_a=seen(number)[1], **options)

    return ready


BF16 = "bf16"
NF4, LLM_INT8, SCALED, SCALED_INSIDE = "bitsandbytes nf4", "bitsandbytes int8", "_scaled_mm", "_scaled_mm, with inputs"
PEERS: dict[str, dict[str, Peer]] = {
    "int4 g128": {
        "torch int4": Peer(tinygemm),
        "torchao int4": Peer(torchao_int4),
        "gemlite int4": Peer(gemlite_int4),
    },
    "nf4 g64": {NF4: Peer(bnb_nf4)},
    "llm.int8": {LLM_INT8: Peer(bnb_int8, syncs=True)},
    "fp8 rows": {
        SCALED: Peer(lambda shape, setting: scaled_rows(shape, setting, False)),
        SCALED_INSIDE: Peer(lambda shape, setting: scaled_rows(shape, setting, True)),
    },
    "fp8 tiles": {SCALED: Peer(scaled_tiles)},
}
