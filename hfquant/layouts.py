"""Layouts: codes in memory and on disk. `pack` and `unpack` are exact inverses, ragged shapes included."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import CalibrationError, FormatError, SpecError
from .grids import Grid
from .packing import pack_bits, packed_width, unpack_bits
from .qtensor import InputParams, Outliers, QTensor
from .spec import PackedSpec, Scheme, TensorSpec
from .tables import Table


class Layout:
    """How codes become stored tensors; a subclass overrides `encode` and `decode`, or `pack` and `unpack`.

    A packed weight is a dict of tensors: "codes", "scale" (or "scale_codes", "scale_scale" where scales are quantized
    themselves), and where present "zero", "order", "levels", "outlier_index" and "outlier_weight". The tensors of
    `INPUT_NAMES`, which follow them where the input is static, are no layout's business.
    """

    name: str

    def why_not(self, spec: TensorSpec) -> str | None:
        """Reason why `spec` cannot be stored, or None."""
        return None

    def encode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Stored form of codes [N, K] uint8; rows stay the first axis."""
        raise NotImplementedError

    def decode(self, stored: Tensor, grid: Grid, count: int) -> Tensor:
        """Codes [N, count] uint8; inverse of `encode`."""
        raise NotImplementedError

    def levels_of_bytes(self, grid: Grid) -> Tensor | None:
        """What each stored byte stands for, [256] float32, or None: the CPU kernels read layouts that say it.

        Such a layout keeps "codes" as [N, K] of any one-byte dtype, and the other tensors as `pack` does here. Bytes
        that stand for no number are NaN.
        """
        return None

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Stored tensors of a weight. Raises SpecError if this layout cannot hold it."""
        if reason := self.why_not(q.spec):
            raise SpecError(f"layout {self.name!r} cannot store {q.spec.grid}: {reason}")
        packed = {"codes": self.encode(q.codes, q.spec.numbers())}
        _pack_scale(packed, "scale", q.scale)
        if q.zero is not None:
            packed["zero"] = pack_bits(q.zero, q.spec.numbers().bits) if zeros_are_packed(q.spec) else q.zero
        optional = {"order": q.order, "levels": q.levels}
        packed.update({name: value for name, value in optional.items() if value is not None})
        if q.outliers is not None:
            packed |= {"outlier_index": q.outliers.index, "outlier_weight": q.outliers.weight}
        return packed

    def unpack(self, packed: dict[str, Tensor], shape: tuple[int, int], spec: TensorSpec) -> QTensor:
        """Inverse of `pack` for a matrix of `shape` [N, K]."""
        grid, counts = spec.numbers(), spec.blocks.counts(shape)
        zero = packed.get("zero")
        if zero is not None and zeros_are_packed(spec):
            zero = unpack_bits(zero, grid.bits, counts[1])
        outliers = None
        if "outlier_index" in packed:
            outliers = Outliers(packed["outlier_index"], packed["outlier_weight"])
        codes = self.decode(packed["codes"], grid, shape[1])
        scale = _unpack_scale(packed, "scale", counts, spec.scale)
        return QTensor(codes, scale, zero, packed.get("order"), spec, packed.get("levels"), outliers)

    def rows(self, packed: dict[str, Tensor], index: Tensor, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
        """Rows `index` [n] of the matrix, [n, K] float32.

        Works on the rows alone because they are the first axis of "codes"; a layout that stores them otherwise
        overrides this.
        """
        if "order" in packed or "outlier_index" in packed or spec.blocks.rows != 1:
            return self.unpack(packed, shape, spec).dequantize()[index]
        counts = spec.blocks.counts(shape)
        scale = _unpack_scale(packed, "scale", counts, spec.scale)
        values = scale.dequantize().reshape(counts) if isinstance(scale, QTensor) else scale
        chosen: dict[str, Tensor] = {name: packed[name][index] for name in ("codes", "zero") if name in packed}
        part = self.unpack({**packed, **chosen, "scale": values[index]}, (index.numel(), shape[1]), _plain(spec))
        return part.dequantize()


def zeros_are_packed(spec: TensorSpec) -> bool:
    """Whether zero points are stored like codes of less than 8 bits, and not as a number each."""
    return spec.zero is True and spec.numbers().bits < 8


def _plain(spec: TensorSpec) -> TensorSpec:
    """The same numbers with scales that are not quantized themselves."""
    return replace(spec, scale="float32") if isinstance(spec.scale, TensorSpec) else spec


def _pack_scale(packed: dict[str, Tensor], name: str, scale: Tensor | QTensor) -> None:
    if isinstance(scale, QTensor):
        packed[f"{name}_codes"] = scale.codes
        _pack_scale(packed, f"{name}_scale", scale.scale)
    else:
        packed[name] = scale


def _unpack_scale(
    packed: dict[str, Tensor], name: str, counts: tuple[int, int], how: str | TensorSpec
) -> Tensor | QTensor:
    if isinstance(how, str):
        return packed[name]
    outer = _unpack_scale(packed, f"{name}_scale", how.blocks.counts((1, counts[0] * counts[1])), how.scale)
    return QTensor(packed[f"{name}_codes"], outer, None, None, how)


class Bytes(Layout):
    """One code per byte: the fallback that holds every grid."""

    name = "bytes"

    def encode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The codes themselves [N, K] uint8."""
        return codes

    def decode(self, stored: Tensor, grid: Grid, count: int) -> Tensor:
        """The codes themselves."""
        return stored

    def levels_of_bytes(self, grid: Grid) -> Tensor | None:
        """The levels, and 0 for codes that the grid does not have; what decodes otherwise says so itself."""
        if (type(self).decode, type(self).unpack) != (Bytes.decode, Bytes.unpack):
            return None
        levels = grid.levels()
        return pad(levels, (0, 256 - levels.numel()))


class Dense(Layout):
    """Codes of b bits without gaps along the rows: [N, ceil(K * b / 8)] uint8, two codes a byte at 4 bits."""

    name = "dense"

    def why_not(self, spec: TensorSpec) -> str | None:
        """Dense packing is for 2 to 7 bits."""
        bits = spec.numbers().bits
        return None if 2 <= bits <= 7 else f"dense packing is for 2 to 7 bits, this grid has {bits}: use 'bytes'"

    def encode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Packed rows."""
        return pack_bits(codes, grid.bits)

    def decode(self, stored: Tensor, grid: Grid, count: int) -> Tensor:
        """Unpacked rows. Raises FormatError when the stored width is not the one of `count` codes."""
        if stored.shape[-1] != packed_width(count, grid.bits):
            raise FormatError(
                f"packed rows of {count} codes with {grid.bits} bits take {packed_width(count, grid.bits)} bytes, "
                f"found {stored.shape[-1]}"
            )
        return unpack_bits(stored, grid.bits, count)


INPUT_NAMES = ("input_scale", "input_zero")  # of the packed tensors that hold the range of a static input

LAYOUTS: Table[Layout] = Table("layout")
BUILTIN: tuple[Layout, ...] = (Bytes(), Dense())


def default_layout(spec: TensorSpec) -> str:
    """The core layout that stores `spec` in the fewest bytes."""
    return "bytes" if Dense().why_not(spec) else "dense"


def empty_qtensor(
    shape: tuple[int, int], spec: TensorSpec, dtype: torch.dtype, outliers: int = 0, device: str = "meta"
) -> QTensor:
    """A QTensor with the right shapes and dtypes and no values, to know the stored form of a weight in advance.

    `dtype` is the model's; `outliers` the number of columns kept in 16 bit.
    """
    counts = spec.blocks.counts(shape)
    scale = _empty_scale(counts, spec.scale, device)
    zero = torch.empty(counts, dtype=spec.zero_dtype, device=device) if spec.zero else None
    fitted = hasattr(spec.numbers(), "fit")
    levels = torch.empty(2 ** spec.numbers().bits, dtype=torch.float32, device=device) if fitted else None
    kept = None
    if outliers:
        kept_dtype = dtype if dtype == torch.float16 else torch.bfloat16
        index = torch.empty(outliers, dtype=torch.int32, device=device)
        kept = Outliers(index, torch.empty(shape[0], outliers, dtype=kept_dtype, device=device))
    codes = torch.empty(shape, dtype=torch.uint8, device=device)
    return QTensor(codes, scale, zero, None, spec, levels, kept)


def _empty_scale(counts: tuple[int, int], how: str | TensorSpec, device: str) -> Tensor | QTensor:
    if isinstance(how, str):
        return torch.empty(counts, dtype=getattr(torch, how), device=device)
    row = (1, counts[0] * counts[1])
    codes = torch.empty(row, dtype=torch.uint8, device=device)
    return QTensor(codes, _empty_scale(how.blocks.counts(row), how.scale, device), None, None, how)


def packed_spec(
    packed: dict[str, Tensor], layout: str, shape: tuple[int, int], scheme: Scheme, rotated: bool = False
) -> PackedSpec:
    """The description that kernels get of a packed weight."""
    kept = packed["outlier_index"].numel() if "outlier_index" in packed else 0
    return PackedSpec(layout, shape, scheme, tuple(packed), kept, rotated)


def unpack(packed: list[Tensor], spec: PackedSpec) -> QTensor:
    """The QTensor behind packed tensors given in the order of `spec.names`."""
    tensors = {name: value for name, value in zip(spec.names, packed, strict=True) if name not in INPUT_NAMES}
    return replace(LAYOUTS.get(spec.layout).unpack(tensors, spec.shape, spec.scheme.weight), rotated=spec.rotated)


def pack_inputs(inputs: InputParams | None, scheme: Scheme) -> dict[str, Tensor]:
    """Stored tensors of a static input's range, none where ranges are found at run time.

    Raises CalibrationError if the range is missing, SpecError if it is not one that the scheme has a use for.
    """
    spec = _static_input(scheme)
    if spec is None:
        if inputs is not None:
            raise SpecError("a range was given for an input that is not quantized, or that has its ranges at run time")
        return {}
    if inputs is None:
        raise CalibrationError("a static input needs the range that calibration found for it: there is none")
    if bool(spec.zero) != (inputs.zero is not None):
        raise SpecError(f"a range {'with' if inputs.zero is not None else 'without'} a zero point does not fit {spec}")
    # Copies: layers that read the same input are parameters of their own.
    zero = {} if inputs.zero is None else {INPUT_NAMES[1]: inputs.zero.clone()}
    return {INPUT_NAMES[0]: inputs.scale.clone(), **zero}


def unpack_inputs(packed: list[Tensor], spec: PackedSpec) -> InputParams | None:
    """Inverse of `pack_inputs` for packed tensors given in the order of `spec.names`; None without a static input."""
    if _static_input(spec.scheme) is None:
        return None
    scale, zero = (dict(zip(spec.names, packed, strict=True)).get(name) for name in INPUT_NAMES)
    if scale is None:
        raise FormatError(f"the weight has no {INPUT_NAMES[0]}, which its static input needs: quantize it again")
    return InputParams(scale, zero)


def empty_inputs(scheme: Scheme, device: str = "meta") -> InputParams | None:
    """A range with the right shapes and dtypes and no values, None without a static input."""
    spec = _static_input(scheme)
    if spec is None:
        return None
    zero = torch.empty(1, dtype=torch.uint8, device=device) if spec.zero else None
    return InputParams(torch.empty(1, dtype=torch.float32, device=device), zero)


def _static_input(scheme: Scheme) -> TensorSpec | None:
    """Numbers of the input if its range is stored with the weight."""
    return scheme.input.tensor if scheme.input is not None and not scheme.input.dynamic else None
