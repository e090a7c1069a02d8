"""Packed experts: the fused 3-D weights of mixture-of-experts models, which no scan for `nn.Linear` finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import ops
from .binding import Bindings, is_plain
from .errors import UnsupportedError
from .expert_view import Added, ExpertsView, LowRank, Parameters, asked_by
from .gathered import Witness, check_gathered, witness_of
from .gpu import experts as gpu_experts
from .layouts import LAYOUTS, unpack
from .nn import packed_aside
from .qtensor import QTensor
from .requantize import requantize
from .spec import PackedSpec

AT_ONCE = 64  # pairs of a token and an expert: with more, experts have enough to do to be run one after the other
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def expert_projections(module: nn.Module) -> list[str]:
    """Names of the fused 3-D expert weights that `module` owns; empty if it is no experts module."""
    own = dict(module.named_parameters(recurse=False))
    names = [name for name in PROJECTIONS if name in own and own[name].dim() == 3]
    return names if "down_proj" in names and len(names) > 1 else []


class RoutedExperts(nn.Module):
    """Mixed into the class of an experts module: the same gate, activation and biases, one expert after the other.

    A subclass says what a projection is.
    """

    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum [T, H] over each token's experts.

        `hidden_states` [T, H], `top_k_index` [T, k] int64, `top_k_weights` [T, k]. Only experts with tokens run.
        """
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # marks slots that another rank serves
                continue
            token, slot = torch.where(top_k_index == expert)
            y = self._expert(hidden_states[token], expert, token) * top_k_weights[token, slot, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    def _expert(self, x: Tensor, expert: int, token: Tensor) -> Tensor:
        """Output [t, H] of one expert for `x` [t, H], which are the tokens numbered `token` [t]."""
        return self.mlp(x, lambda projection, rows: self._project(projection, rows, expert, token))

    def mlp(self, x: Tensor, project: Callable[[str, Tensor], Tensor]) -> Tensor:
        """What experts make of `x` [R, K]; `project` multiplies rows with a projection of the expert that each has."""
        hidden = self._apply_gate(project("gate_up_proj", x)) if self.has_gate else self.act_fn(project("up_proj", x))
        y = project("down_proj", hidden)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _project(self, projection: str, x: Tensor, expert: int, token: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias_of(self, projection: str, expert: int) -> Tensor | None:
        return getattr(self, f"{projection}_bias")[expert] if self.has_bias else None


class QExperts(RoutedExperts):
    """Mixed into the class of an experts module: the same function over packed weights.

    Each projection [E, N, K] is packed expert by expert; its tensors are parameters `<projection>_<name>` with the
    expert as their first axis. Transposed models ([E, K, N]) are packed the usual way round. The attribute
    `<projection>` is a view in the model's own orientation, which PEFT adapts and merges into.
    """

    specs: dict[str, PackedSpec]
    keys: dict[str, str]
    dtype: torch.dtype
    _bindings: dict[str, Bindings]
    _witnesses: dict[str, Witness]

    _hf_quantized_needs_local_tp = True

    def hold(self, projection: str, packed: dict[str, Tensor], spec: PackedSpec) -> None:
        """Take the packed tensors [E, ...] of one projection as parameters."""
        self.specs[projection], self.keys[projection] = spec, spec.key()
        self.__dict__.setdefault("_bindings", {})[projection] = Bindings()
        self.__dict__.setdefault("_witnesses", {})[projection] = witness_of(packed)
        for name in spec.names:
            self._parameters[f"{projection}_{name}"] = nn.Parameter(packed[name], requires_grad=False)
        self.__dict__["_parameters"].shown.add(projection)

    def packed(self, projection: str, expert: int) -> list[Tensor]:
        """The packed tensors of one expert's projection."""
        return [stack[expert] for stack in self._stacks(projection)]

    def packed_names(self) -> list[str]:
        """Names of all packed parameters."""
        return [f"{projection}_{name}" for projection, spec in self.specs.items() for name in spec.names]

    def waiting(self) -> list[str]:
        """Names of the full-precision placeholders that are still held."""
        return [projection for projection in self.specs if projection in list(self._parameters)]  # views are not listed

    def qtensor(self, projection: str, expert: int) -> QTensor:
        """One expert's weight as codes and grid parameters."""
        return unpack(self.packed(projection, expert), self.specs[projection])

    def dequantize(self, projection: str, dtype: torch.dtype) -> Tensor:
        """The fused weight in the model's own orientation, [E, N, K] or transposed [E, K, N]."""
        count = self._stacks(projection)[0].shape[0]
        stacked = torch.stack([self.qtensor(projection, expert).dequantize(dtype) for expert in range(count)])
        return stacked.transpose(1, 2).contiguous() if self.is_transposed else stacked

    @torch.no_grad()
    def write(self, projection: str, values: Tensor) -> None:
        """Quantize new values of a projection, in the model's own orientation, with the numbers that it has."""
        matrices = values.detach().transpose(1, 2) if self.is_transposed else values.detach()
        layout = LAYOUTS.get(self.specs[projection].layout)
        packed = [
            layout.pack(requantize(w.contiguous(), self.qtensor(projection, expert)))
            for expert, w in enumerate(matrices)
        ]
        for name in packed[0]:
            stack = self._parameters[f"{projection}_{name}"]
            assert stack is not None
            stack.data = torch.stack([part[name] for part in packed]).to(stack.dtype)

    def view(self, projection: str) -> ExpertsView:
        """The fused weight as a tensor in the model's dtype that takes no memory before its values are used."""
        first, (rows, cols) = self._stacks(projection)[0], self.specs[projection].shape
        shape = (first.shape[0], *((cols, rows) if self.is_transposed else (rows, cols)))
        read, write = partial(self.dequantize, projection, self.dtype), partial(self.write, projection)
        return ExpertsView.of(shape, self.dtype, first.device, read, write)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of `nn.Module`; PEFT, which looks here for what it is to adapt, also gets the views of fused weights."""
        listed = super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse or not asked_by("peft"):
            return listed
        held, start = self.__dict__["_parameters"], f"{prefix}." if prefix else ""
        views = [(start + name, self.view(name)) for name in self.specs if held.shows(name)]
        return chain(listed, views)  # type: ignore[arg-type]  # views count as parameters

    def _changes(self, projection: str) -> tuple[LowRank | Added, ...]:
        """What adapters add to a projection during this forward pass."""
        if not is_parametrized(self, projection):
            return ()
        weight = getattr(self, projection)
        if not isinstance(weight, ExpertsView):
            raise UnsupportedError(
                f"an adapter does something else to the packed experts' {projection!r} than to add to it: LoRA on "
                "target_parameters is supported"
            )
        return weight.changes

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of `RoutedExperts`, all experts of a projection at once: those of a few tokens on a CPU, any on a GPU."""
        if not is_parametrized(self) and gpu_experts.can_run(self.keys, hidden_states):
            return gpu_experts.forward(self, hidden_states, top_k_index, top_k_weights)
        if is_plain(hidden_states) and 0 < top_k_index.numel() <= AT_ONCE:
            out = self._at_once(hidden_states, top_k_index, top_k_weights)
            if out is not None:
                return out
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _at_once(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """Weighted sum [T, H], or None if the kernel has no way to run several products at once."""
        experts, top = index.flatten().tolist(), index.shape[-1]
        slots = sorted(
            (slot for slot in range(len(experts)) if experts[slot] < self.num_experts), key=experts.__getitem__
        )
        out = torch.zeros_like(x)
        if not slots:
            return out
        counts = Counter(experts[slot] for slot in slots)  # in the order of `slots`
        tokens = torch.tensor([slot // top for slot in slots], device=x.device)
        rows = x.index_select(0, tokens)
        hidden = self._project_all("gate_up_proj" if self.has_gate else "up_proj", rows, counts)
        if hidden is None:
            return None
        y = self._project_all("down_proj", self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden), counts)
        if y is None:
            return None
        y = self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        y = y * weights.flatten()[torch.tensor(slots, device=x.device), None]
        return out.index_add(0, tokens, y.to(out.dtype))

    def _project_all(self, projection: str, x: Tensor, counts: dict[int, int]) -> Tensor | None:
        """Outputs [R, N] for `x` [R, K], of which each expert in turn has so many rows; None as above."""
        spec, experts = self.specs[projection], list(counts)
        kernel, bounds = self._bindings[projection].bounds(x, self._stacks(projection), self.keys[projection], experts)
        if bounds is None or kernel.run_jobs is None:
            return None
        sizes, y = list(counts.values()), x.new_empty(x.shape[0], spec.shape[0])
        biases = [self._bias_of(projection, expert) for expert in experts]
        if not kernel.run_jobs(bounds, x.split(sizes), biases, y.split(sizes)):
            return None
        for change in self._changes(projection):
            for expert, rows, out in zip(experts, x.split(sizes), y.split(sizes), strict=True):
                out += change.times(rows, expert, self.is_transposed)
        return y

    def _stacks(self, projection: str) -> list[Tensor]:
        """The packed tensors [E, ...] of all experts' projection."""
        held: dict[str, Any] = self._parameters
        witness = self._witnesses[projection]
        check_gathered(held[f"{projection}_{witness[0]}"], witness)
        return [held[f"{projection}_{name}"] for name in self.specs[projection].names]

    def _project(self, projection: str, x: Tensor, expert: int, token: Tensor) -> Tensor:
        bias = self._bias_of(projection, expert)
        y = ops.linear(x, self.packed(projection, expert), bias, self.keys[projection])
        for change in self._changes(projection):
            y = y + change.times(x, expert, self.is_transposed).to(y.dtype)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QExperts:
        """Move packed tensors with the module but keep their dtypes."""
        with packed_aside(self, self.packed_names(), fn):
            super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class, which can be imported."""
        return _empty_packed, (self.original,), self.__dict__

    def __getattr__(self, name: str) -> Any:
        """The views of fused weights, which no listing of parameters has."""
        held = self.__dict__.get("_parameters")
        return self.view(name) if isinstance(held, Parameters) and held.shows(name) else super().__getattr__(name)


def to_packed_experts(module: nn.Module, dtype: torch.dtype) -> QExperts:
    """Turn an experts module into its packed form, in place: hooks, biases and settings stay as they are."""
    module.__class__ = _packed_class(type(module))  # type: ignore[arg-type]  # mypy looks at instances' __hash__
    assert isinstance(module, QExperts)
    module.specs, module.keys, module.dtype = {}, {}, dtype
    module.__dict__["_parameters"] = Parameters(module._parameters)
    return module


def to_plain_experts(module: QExperts, dtype: torch.dtype) -> None:
    """Turn packed experts into what they were, in place, with the quantized values in `dtype`."""
    weights = {projection: module.dequantize(projection, dtype) for projection in module.specs}
    packed = module.packed_names()
    held = {name: parameter for name, parameter in module._parameters.items() if name not in packed}
    module.__class__ = module.original
    module.__dict__["_parameters"] = held
    for projection, weight in weights.items():
        module.register_parameter(projection, nn.Parameter(weight))


@cache
def _packed_class(original: type[nn.Module]) -> type[nn.Module]:
    """One packed class for each class of experts."""
    return type(f"Q{original.__name__}", (QExperts, original), {"original": original})


def _empty_packed(original: type[nn.Module]) -> nn.Module:
    cls = _packed_class(original)  # type: ignore[arg-type]  # see to_packed_experts
    return cls.__new__(cls)


def why_not_experts(module: nn.Module) -> str | None:
    """Reason why an experts module cannot be packed, or None."""
    needed = ("has_gate", "has_bias", "is_transposed", "num_experts")
    missing = [name for name in needed if not hasattr(module, name)]
    return f"its class does not say {', '.join(missing)}, so its forward pass is unknown" if missing else None
