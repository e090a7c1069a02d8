"""What a quantized weight is, as plain data with an exact JSON round trip: no torch objects."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .blocks import Blocks
from .errors import SpecError
from .grids import Grid, IntGrid, grid

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """Numbers of one tensor.

    `scale` is a dtype name, or a TensorSpec that quantizes the scales themselves, taken as one row [1, R * C] (double
    quantization, NVFP4). `zero`: whether each block has a zero point (asymmetric), for an unsigned integer grid. True:
    one of the grid's numbers. A dtype name: any real number, stored in that dtype (ADR 0015).
    """

    grid: str
    blocks: Blocks
    zero: bool | str = False
    scale: str | TensorSpec = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) and self.scale not in SCALE_DTYPES:
            raise SpecError(f"scales are stored as {', '.join(SCALE_DTYPES)} or quantized, got {self.scale!r}")
        if not isinstance(self.zero, bool) and self.zero not in SCALE_DTYPES:
            raise SpecError(f"zero is True, False, or for real numbers {', '.join(SCALE_DTYPES)}, got {self.zero!r}")
        if self.zero and not self.grid.startswith("uint"):
            raise SpecError(f"a zero point needs an unsigned integer grid such as uint4, got {self.grid!r}")
        if isinstance(self.scale, TensorSpec) and self.scale.zero:
            raise SpecError("scales are positive and quantized without a zero point: give their spec zero=False")

    def numbers(self) -> Grid:
        """The grid itself. Raises SpecError if its name is not known."""
        return grid(self.grid)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype in which a scale is looked at while searching; nested scales are searched in float32."""
        return SCALE_DTYPES[self.scale] if isinstance(self.scale, str) else torch.float32

    @property
    def zero_dtype(self) -> torch.dtype | None:
        """Dtype of zero points: uint8 of those on the grid, None where there are none."""
        if isinstance(self.zero, str):
            return SCALE_DTYPES[self.zero]
        return torch.uint8 if self.zero else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        scale = self.scale if isinstance(self.scale, str) else self.scale.to_dict()
        blocks = [self.blocks.rows, self.blocks.cols]
        return {"grid": self.grid, "blocks": blocks, "zero": self.zero, "scale": scale}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorSpec:
        """Inverse of `to_dict`."""
        scale = data["scale"] if isinstance(data["scale"], str) else cls.from_dict(data["scale"])
        return cls(data["grid"], Blocks(*data["blocks"]), data["zero"], scale)


@dataclass(frozen=True)
class InputSpec:
    """Quantization of a layer's input inside the layer.

    `dynamic`: ranges come from the input itself at run time; otherwise calibration found one for the whole input, which
    is stored with the weight and clips what lies beyond it. `split`: columns that hold a magnitude of at least this
    stay in floating point (LLM.int8); which columns do is decided over all tokens of the call.
    """

    tensor: TensorSpec
    dynamic: bool = True
    split: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tensor.scale, str):
            raise SpecError("the scales of an input cannot be quantized")
        if isinstance(self.tensor.zero, str):
            raise SpecError(f"zero points of an input are on its grid: use zero=True instead of {self.tensor.zero!r}")
        blocks = self.tensor.blocks
        if not self.dynamic and blocks != Blocks(-1, -1):
            raise SpecError(
                "a static range holds for the whole input, as tokens are not known in advance: use blocks (-1, -1) "
                f"instead of ({blocks.rows}, {blocks.cols}), or dynamic=True"
            )
        if not self.dynamic and self.split is not None:
            raise SpecError(f"split={self.split} is decided at run time, static ranges are not: use one of them")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"tensor": self.tensor.to_dict(), "dynamic": self.dynamic, "split": self.split}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InputSpec:
        """Inverse of `to_dict`."""
        return cls(TensorSpec.from_dict(data["tensor"]), data["dynamic"], data["split"])


@dataclass(frozen=True)
class Scheme:
    """Numbers of one layer: its weight and, if quantized, its input."""

    weight: TensorSpec
    input: InputSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"weight": self.weight.to_dict(), "input": self.input.to_dict() if self.input else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Inverse of `to_dict`."""
        return cls(TensorSpec.from_dict(data["weight"]), InputSpec.from_dict(data["input"]) if data["input"] else None)


@dataclass(frozen=True)
class PackedSpec:
    """Everything a kernel must know about a packed weight besides its tensors.

    `shape` is [N, K] of the matrix; `outliers` the number of columns kept in 16 bit; `names` the packed tensors in
    the order in which ops receive them. `rotated`: the codes are in the Hadamard basis of the input (see `QTensor`).
    """

    layout: str
    shape: tuple[int, int]
    scheme: Scheme
    names: tuple[str, ...]
    outliers: int = 0
    rotated: bool = False

    def key(self) -> str:
        """Text form, the argument that ops take; `PackedSpec.parse` is its inverse and is cached."""
        scheme = self.scheme.to_dict()
        data: dict[str, Any] = {"layout": self.layout, "shape": self.shape, "scheme": scheme, "names": self.names}
        data |= {"outliers": self.outliers, "rotated": self.rotated}
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(key: str) -> PackedSpec:
        """Inverse of `key`."""
        data = json.loads(key)
        scheme = Scheme.from_dict(data["scheme"])
        shape, names = tuple(data["shape"]), tuple(data["names"])
        return PackedSpec(data["layout"], shape, scheme, names, data["outliers"], data.get("rotated", False))


def is_affine(spec: TensorSpec) -> bool:
    """Whether kernels can decode by `(code - zero) * scale`."""
    return isinstance(spec.numbers(), IntGrid)
