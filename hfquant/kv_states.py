"""Keys or values of one layer's cache: older tokens as packed codes, the newest in full precision.

Tokens are quantized in blocks, oldest first, each block once: codes that are there never change. Source: KIVI (Liu et
al. 2024), which gives keys a scale for each channel of some tokens and values one for some channels of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import ops
from .codebooks import FittedGrid
from .errors import SpecError
from .gpu import kv as gpu
from .layouts import LAYOUTS, default_layout
from .ranges import absmax
from .rounders import to_nearest
from .spec import PackedSpec, Scheme, TensorSpec
from .stats import Stats

_CACHE = Stats("KV cache")


def check_states(spec: TensorSpec, what: str) -> TensorSpec:
    """The same. Raises SpecError for numbers that keys or values cannot be stored in."""
    grid = spec.numbers()
    if isinstance(grid, FittedGrid):
        raise SpecError(f"{what}: {grid.name!r} is fitted to a whole tensor, a cache grows: use a grid such as 'uint4'")
    if not (spec.zero or grid.signed):
        raise SpecError(f"{what} have both signs: {spec.grid!r} needs zero=True")
    if not isinstance(spec.scale, str):
        raise SpecError(f"{what}: scales of a cache are not quantized themselves: use a dtype such as 'float16'")
    if spec.blocks.rows == -1:
        raise SpecError(
            f"{what}: a scale for all tokens would change with each new one: give blocks a number of tokens"
        )
    return spec


@dataclass(frozen=True)
class Packed:
    """Quantized tokens [B, H, T, `width`] of numbers `spec`.

    `tensors` are those of the core's layouts with the axes of the cache: "codes" [B, H, T, bytes] uint8, "scale"
    [B, H, T / rows, C] and where `spec` has zero points "zero" [B, H, T / rows, bytes] uint8.
    """

    spec: TensorSpec
    width: int
    tensors: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """T."""
        return self.tensors["codes"].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales and zero points included."""
        return sum(value.nbytes for value in self.tensors.values())

    def read(self, dtype: torch.dtype) -> Tensor:
        """The numbers [B, H, T, width] in `dtype`, as `QTensor.dequantize` defines them."""
        codes = self.tensors["codes"]
        names = tuple(self.tensors)
        key = _key(self.spec, codes.shape[:3].numel(), self.width, names)
        matrix = ops.dequantize([value.flatten(0, 2) for value in self.tensors.values()], key, dtype)
        return matrix.reshape(*codes.shape[:3], self.width)

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same with every tensor changed, for example along the first axis."""
        return replace(self, tensors={name: change(value).contiguous() for name, value in self.tensors.items()})

    def then(self, other: Packed) -> Packed:
        """These tokens and those of `other` behind them."""
        tensors = {name: torch.cat([value, other.tensors[name]], 2) for name, value in self.tensors.items()}
        return replace(self, tensors=tensors)

    def first(self, tokens: int) -> Packed:
        """The first `tokens`, whole blocks, of these."""
        rows = {"codes": tokens, "scale": tokens // self.spec.blocks.rows, "zero": tokens // self.spec.blocks.rows}
        kept = {name: value[:, :, : rows[name]].contiguous() for name, value in self.tensors.items()}
        return replace(self, tensors=kept)


@lru_cache(maxsize=4096)
def _key(spec: TensorSpec, rows: int, width: int, names: tuple[str, ...]) -> str:
    """What operators are told about packed tokens."""
    return PackedSpec(default_layout(spec), (rows, width), Scheme(spec), names).key()


def quantize(x: Tensor, spec: TensorSpec) -> Packed:
    """Quantize tokens `x` [B, H, T, D], T a multiple of the tokens in a block, with the range of each block.

    A block that holds NaN or an infinity becomes NaN, so that an overflow stays visible.
    """
    if (reason := gpu.why_not_quantize(x, spec)) is None:
        return Packed(spec, x.shape[-1], gpu.quantize(x, spec))
    gpu.report(x.device, "quantized", reason)
    return Packed(spec, x.shape[-1], quantized(x, spec))


def quantized(x: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    """The tensors of `quantize`, by torch: what kernels must find, bit for bit."""
    matrix = x.detach().reshape(-1, x.shape[-1])
    params = absmax(matrix, spec, _CACHE)
    (peak,) = spec.blocks.reduce(matrix, lambda block: (block.abs().amax(1),))
    zero_or_nan = (peak - peak).to(params.scale.dtype)
    assert isinstance(params.stored, Tensor)
    q = to_nearest(matrix, replace(params, stored=params.stored + zero_or_nan.to(params.stored.dtype)))
    packed = LAYOUTS.get(default_layout(spec)).pack(q)
    return {name: value.reshape(*x.shape[:2], -1, value.shape[-1]) for name, value in packed.items()}


@dataclass(frozen=True)
class States:
    """Keys or values of a layer: `packed`, None while there are no old tokens, and the `tail` [B, H, t, D] behind them.

    `spec` is None where nothing is quantized. The newest `residual` tokens are always in the tail, and `step` tokens
    are quantized at a time. States never change: each method returns new ones.
    """

    spec: TensorSpec | None
    residual: int
    step: int
    tail: Tensor
    packed: Packed | None = None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.tail.shape[2] + (0 if self.packed is None else self.packed.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tail.nbytes + (0 if self.packed is None else self.packed.nbytes)

    def read(self) -> Tensor:
        """All tokens [B, H, T, D] in the dtype of the tail."""
        if self.packed is None:
            return self.tail
        return torch.cat([self.packed.read(self.tail.dtype), self.tail], 2)

    def then(self, x: Tensor) -> States:
        """With new tokens `x` [B, H, n, D] in the tail; nothing is quantized."""
        return replace(self, tail=torch.cat([self.tail, x], 2) if self.tail.shape[2] else x.contiguous())

    def settled(self) -> States:
        """With tokens quantized that are old enough for it."""
        old = (self.tail.shape[2] - self.residual) // self.step * self.step
        if self.spec is None or old <= 0:
            return self
        block = quantize(self.tail[:, :, :old], self.spec)
        # A copy: a view would keep the quantized tokens in memory.
        tail = self.tail[:, :, old:].clone()
        return replace(self, tail=tail, packed=block if self.packed is None else self.packed.then(block))

    def without(self, tokens: int) -> States:
        """Without the newest `tokens`.

        Of a block that is cut, what is left goes back to the tail, as the numbers that it stood for.
        """
        keep = max(0, self.tokens - tokens)
        old = 0 if self.packed is None else self.packed.tokens
        if self.packed is None or keep >= old:
            return replace(self, tail=self.tail[:, :, : keep - old].clone())
        whole = keep // self.step * self.step
        left = self.packed.read(self.tail.dtype)[:, :, whole:keep].clone()
        return replace(self, tail=left, packed=self.packed.first(whole) if whole else None)

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        """With every tensor changed along the first axis, or moved."""
        packed = None if self.packed is None else self.packed.map(change)
        return replace(self, tail=change(self.tail), packed=packed)
