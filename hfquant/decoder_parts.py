"""What a decoder layer is made of, by the names that the models of transformers share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .binding import Binding
from .halves import DecoderParts, Gain, Halves
from .kernel import forced_kernel
from .nn import QLinear

ATTENTION, MLP = "self_attn", "mlp"
OF_ATTENTION = {
    "query": (ATTENTION, "q_proj"),
    "key": (ATTENTION, "k_proj"),
    "value": (ATTENTION, "v_proj"),
    "output": (ATTENTION, "o_proj"),
}
OF_MLP = {"gate": (MLP, "gate_proj"), "up": (MLP, "up_proj"), "down": (MLP, "down_proj")}
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
ACTIVATION = "act_fn"
_VERSION = attrgetter("_version")
_EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True, eq=False)
class Pieces:
    """The modules of a decoder layer: its norms, and its products by the names of `OF_ATTENTION` and `OF_MLP`.

    `places`: where the products are. Those of an MLP of another kind, such as experts, are not among them.
    """

    layer: nn.Module
    places: dict[str, tuple[str, str]]
    products: dict[str, QLinear]
    norms: tuple[nn.Module, nn.Module]
    head_norms: tuple[nn.Module, nn.Module] | None

    @property
    def attention(self) -> nn.Module:
        """The module that computes attention."""
        return self.layer._modules[ATTENTION]  # type: ignore[return-value]

    @property
    def is_gated(self) -> bool:
        """Whether its MLP is one of the three products."""
        return "gate" in self.products

    def halves(self, x: Tensor, head: int, scale: float | None = None) -> Halves | None:
        """What runs the layer for inputs like `x`; `head`, `scale`: as in `DecoderParts`. None if nothing does."""
        bounds, kernels = {}, []
        for name, product in self.products.items():
            binding: Binding = product._binding
            kernel, bound = binding.bound(x, product.packed(), product.key)
            bounds[name] = bound
            kernels.append(kernel)
        make = kernels[0].halves
        if make is None or None in bounds.values() or any(kernel is not kernels[0] for kernel in kernels):
            return None
        gains = [_gain(norm) for norm in (*self.norms, *(self.head_norms or ()))]
        sizes = [x.shape[-1]] * len(self.norms) + [head] * len(self.head_norms or ())
        for gain, size in zip(gains, sizes, strict=True):
            if isinstance(gain, str) or (gain.weight.dtype, gain.weight.numel()) != (x.dtype, size):
                return None
        biases = {name: product._parameters["bias"] for name, product in self.products.items()}
        first, last, *heads = gains
        mlp = None if self.is_gated else self._mlp
        return make(DecoderParts(head, scale, bounds, biases, first, tuple(heads) or None, last, mlp))  # type: ignore[arg-type]

    def _mlp(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer._modules[MLP](x)  # type: ignore[misc]
        return found

    def modules(self) -> Iterator[nn.Module]:
        """All modules below the layer whose own calls are left out when it runs as a whole."""
        yield self.attention
        if self.is_gated:
            yield self.layer._modules[MLP]  # type: ignore[misc]
        yield from (*self.products.values(), *self.norms, *(self.head_norms or ()))


def find(layer: nn.Module) -> Pieces | str | None:
    """The pieces of a decoder layer, the reason why it has other ones, or None for anything else."""
    attention, mlp = layer._modules.get(ATTENTION), layer._modules.get(MLP)
    norms = [layer._modules.get(name) for name in NORMS]
    if attention is None or mlp is None or None in norms:
        return None
    places = {**OF_ATTENTION, **OF_MLP} if _is_gated(mlp) else OF_ATTENTION
    products = {name: layer._modules[parent]._modules.get(leaf) for name, (parent, leaf) in places.items()}  # type: ignore[union-attr]
    if missing := [name for name, product in products.items() if not isinstance(product, QLinear)]:
        return f"{'.'.join(places[missing[0]])} is no quantized linear layer"
    if not _fit(products):  # type: ignore[arg-type]
        return "its products have other sizes than those of a decoder layer"
    heads = [attention._modules.get(name) for name in HEAD_NORMS]
    found = [norm for norm in (*norms, *heads) if norm is not None]
    for norm in found:
        if isinstance(reason := _gain(norm), str):
            return reason
    return Pieces(layer, places, products, tuple(norms), None if None in heads else tuple(heads))  # type: ignore[arg-type]


def _is_gated(mlp: nn.Module) -> bool:
    """Whether an MLP has the three products and the activation of one that is down(silu(gate(x)) * up(x))."""
    products = [mlp._modules.get(leaf) for _, leaf in OF_MLP.values()]
    known = type(mlp._modules.get(ACTIVATION)).__name__ in ("SiLUActivation", "SiLU")
    return known and all(isinstance(product, QLinear) for product in products)


def _fit(products: dict[str, QLinear]) -> bool:
    """Whether what one product gives is what the next one takes."""
    sizes = {name: (product.in_features, product.out_features) for name, product in products.items()}
    width, queries = sizes["query"]
    keys = sizes["key"][1]
    wanted = {"query": (width, queries), "key": (width, keys), "value": (width, keys), "output": (queries, width)}
    if "gate" in sizes:
        inner = sizes["gate"][1]
        wanted.update(gate=(width, inner), up=(width, inner), down=(inner, width))
    return sizes == wanted


def _gain(norm: nn.Module) -> Gain | str:
    """The numbers of a norm that may be one of root mean squares, or the reason why it is none."""
    weight: Any = norm._parameters.get("weight")
    eps = next((getattr(norm, name) for name in _EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    if weight is None or weight.dim() != 1 or len(norm._parameters) != 1 or eps is None or norm._modules:
        return f"{type(norm).__name__} is no norm with one weight and an epsilon"
    return Gain(weight, eps)


class Watch:
    """Whether a layer is still what it was: the same modules, without hooks, with the same tensors.

    It is asked at every call, just after the caches were filled with weights: it looks at as little as it can.
    """

    def __init__(self, pieces: Pieces) -> None:
        layer, attention, mlp = pieces.layer, pieces.attention, pieces.layer._modules[MLP]
        modules = list(pieces.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [module.__dict__ for module in modules]
        places: list[tuple[Any, str]] = [(layer._modules, name) for name in (ATTENTION, MLP, *NORMS)]
        places += [(layer._modules[parent]._modules, leaf) for parent, leaf in pieces.places.values()]  # type: ignore[union-attr]
        places += [(attention._modules, name) for name in HEAD_NORMS]
        places += [(mlp._modules, ACTIVATION)] if pieces.is_gated else []  # type: ignore[union-attr]
        places += [(module._parameters, name) for module in modules for name in module._parameters]
        self._owners, self._names = zip(*places, strict=True)
        self._there = self._now_there()
        self._tensors = [one for one in self._there if isinstance(one, Tensor)]

    def _now_there(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def is_whole(self) -> bool:
        """Whether nobody has put in another module or parameter, or watches one of them."""
        if any(self._hooks) or any(map(dict.__contains__, self._own, repeat("forward"))) or _has_any_global_hook():
            return False
        return all(map(is_, self._now_there(), self._there))

    def marks(self) -> tuple[Any, ...]:
        """Where the tensors lie, and how often they were changed; RuntimeError if nobody counts."""
        return forced_kernel(), *map(Tensor.data_ptr, self._tensors), *map(_VERSION, self._tensors)
