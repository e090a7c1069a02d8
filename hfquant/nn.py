"""Layers with packed weights that are still an `nn.Linear` or `nn.Embedding` to the rest of the ecosystem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import ops
from .binding import Binding, is_plain
from .errors import FormatError, SpecError
from .gathered import Witness, check_gathered, witness_of
from .layouts import INPUT_NAMES, LAYOUTS, unpack
from .qtensor import QTensor
from .requantize import requantize
from .spec import InputSpec, PackedSpec, TensorSpec
from .together import Together
from .weight_view import WeightView

_NUMBERS = "hfquant"  # entry of a state dict's metadata: what the codes of a layer mean


class PackedModule(nn.Module):
    """A module whose weight is packed into parameters that are frozen, keep their dtype, and are never named "weight".

    `weight` is a property that dequantizes, and assigning to it (or to its `.data`) quantizes the new values.
    """

    spec: PackedSpec
    key: str
    dtype: torch.dtype
    _witness: Witness
    kind: str  # of the module it replaced: "linear", "conv1d" or "embedding"

    is_cut = False  # by tensor parallelism: what is held here is described by `spec`, as a matrix of its own

    # Tensor parallelism hands such modules their local shard instead of a DTensor.
    _hf_quantized_needs_local_tp = True

    def _start(self, dtype: torch.dtype) -> None:
        """Initialise the bare module; `dtype` is the one that `weight` is seen in."""
        nn.Module.__init__(self)
        self.dtype = dtype

    def hold(self, packed: dict[str, Tensor], spec: PackedSpec) -> None:
        """Take the packed tensors of a weight as parameters."""
        self.spec, self.key, self._witness = spec, spec.key(), witness_of(packed)
        for name in spec.names:
            self._parameters[name] = nn.Parameter(packed[name], requires_grad=False)

    def packed(self) -> list[Tensor]:
        """The packed tensors in the order of `spec.names`; with tensor parallelism, this rank's part of them.

        Raises UnsupportedError for tensors that FSDP has cut or cast.
        """
        held: dict[str, Any] = self._parameters
        tensors = [held[name] for name in self.spec.names]
        if self.is_cut:
            return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        check_gathered(held[self._witness[0]], self._witness)
        return tensors

    def packed_names(self) -> list[str]:
        """Names of the packed parameters."""
        return list(self.spec.names)

    def waiting(self) -> list[str]:
        """Names of the full-precision placeholders that are still held."""
        return [name for name in ("weight",) if name in self._parameters]

    def qtensor(self) -> QTensor:
        """The weight as codes and grid parameters."""
        return unpack(self.packed(), self.spec)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] in the model's dtype, detached, and dequantized when its numbers are first needed.

        Compiled code gets a copy of the values, of which it computes what it uses; what it writes there is lost.
        """
        waiting = self._parameters.get("weight")
        if waiting is not None:  # full-precision placeholder of a model that is still being loaded
            return waiting
        packed, key, dtype = self.packed(), self.key, self.dtype
        if torch.compiler.is_compiling():
            return ops.dequantize(packed, key, dtype)
        now = [tensor.detach() for tensor in packed]  # `put` and moves give the parameters other data
        return WeightView.of(self.spec.shape, dtype, now[0].device, lambda: ops.dequantize(now, key, dtype), self.write)

    @weight.setter
    def weight(self, values: Tensor) -> None:
        self.write(values)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Quantize new values [N, K] into this layer with the numbers it has; the range of a static input stays."""
        self.put(requantize(values.detach(), self.qtensor()))

    @torch.no_grad()
    def put(self, q: QTensor) -> None:
        """Take a weight [N, K] that is quantized already, on the numbers, blocks and columns that this layer has.

        The range of a static input stays. Raises SpecError for a weight that is stored in other tensors.
        """
        packed = LAYOUTS.get(self.spec.layout).pack(q)
        kept = 0 if q.outliers is None else q.outliers.index.numel()
        held = self.spec.scheme.weight, self.spec.rotated, self.spec.outliers, self.spec.shape
        own = {name for name in self.spec.names if name not in INPUT_NAMES}
        if held != (q.spec, q.rotated, kept, q.shape) or own != set(packed):
            raise SpecError(f"the layer holds {held} as {sorted(own)}, not {q.spec}, {q.rotated}, {kept}, {q.shape}")
        for name, tensor in packed.items():
            current = self._parameters[name]
            assert current is not None
            current.data = tensor.to(current.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move packed tensors with the module but keep their dtypes."""
        with packed_aside(self, self.spec.names, fn):
            super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[_NUMBERS] = self.key

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Refuse codes that mean other numbers: int4 and nf4 differ in nothing but what they stand for."""
        key = local_metadata.get(_NUMBERS)
        found, held = (_meaning(spec) for spec in (self.spec if key is None else PackedSpec.parse(key), self.spec))
        if found != held:
            raise FormatError(f"{prefix[:-1]}: the state dict holds {found}, this layer {held}: quantize both alike")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        """The shape and numbers of the weight."""
        weight = self.spec.scheme.weight
        blocks = f"({weight.blocks.rows}, {weight.blocks.cols})"
        turned = ", rotated" if self.spec.rotated else ""
        return f"{super().extra_repr()}, grid={weight.grid}, blocks={blocks}, layout={self.spec.layout}{turned}"


def _meaning(spec: PackedSpec) -> tuple[TensorSpec, InputSpec | None, str]:
    """What the packed tensors stand for: the numbers of the weight and of a static input, and their basis."""
    given = spec.scheme.input
    basis = "rotated" if spec.rotated else "not rotated"
    return spec.scheme.weight, given if given is not None and not given.dynamic else None, basis


@contextmanager
def packed_aside(module: nn.Module, names: Iterable[str], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Take packed parameters out of `module` while `fn` is applied to the others, then apply only its move to them.

    `.to(bfloat16)` must not round scales, and float8 codes are not numbers to convert.
    """
    held = {name: module._parameters.pop(name) for name in names}
    try:
        yield
    finally:  # a move that fails, for want of memory say, must not cost the weights
        module._parameters.update(held)
    for name, parameter in held.items():
        assert parameter is not None
        moved = fn(parameter.data)
        data = moved if moved.dtype == parameter.dtype else parameter.data.to(moved.device)
        module._parameters[name] = _like(parameter, data)


def _like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A frozen parameter with new data that keeps the marks other libraries left on the old one."""
    new = nn.Parameter(data, requires_grad=False)
    new.__dict__.update(parameter.__dict__)
    return new


class QLinear(PackedModule, nn.Linear):
    """y = x W^T + b with a packed W [out_features, in_features]."""

    _together: tuple[Together, int] | None = None  # `optimize`: what it shares with its siblings, its number among them

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        self._start(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self._binding = Binding()

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out_features] in the dtype of `input` [..., in_features]."""
        plain = is_plain(input)
        if plain and self._together is not None:
            together, number = self._together
            if (y := together.take(number, self, input)) is not None:
                return y
        packed, bias = self.packed(), self._parameters["bias"]
        if plain and (y := self._binding.run(input, packed, bias, self.key)) is not None:
            return y
        return ops.linear(input, packed, bias, self.key)


class QEmbedding(PackedModule, nn.Embedding):
    """Rows of a packed table [num_embeddings, embedding_dim]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        self._start(dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings [..., embedding_dim] of token ids `input` [...] int64."""
        return ops.embedding(input, self.packed(), self.key, self.dtype)


def adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give a replacement the hooks and mode of the module it replaces: a lost hook is a silently wrong model."""
    for name in vars(nn.Module()):
        # Flags too: without `_is_full_backward_hook`, backward hooks are kept and never called.
        if "hook" in name:
            vars(new)[name] = vars(old)[name]
    new.training = old.training
    return new
