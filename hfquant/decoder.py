"""A decoder layer that runs in two calls of a kernel, with its attention and its cache in between.

A token that attends to few others takes one call a layer: from one attention to that of the next layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .binding import is_plain
from .decoder_parts import ATTENTION, Pieces, Watch, find
from .decoder_probe import AttentionCall, Disagreement, ask, leaves_torch_alone
from .halves import Decode, Halves

EAGER = "eager"  # attention that models bring along themselves


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """The last result of a layer `by`; and what is `ready` for the next one, `to`, with the halves that it has."""

    result: weakref.ref[Tensor]
    by: WholeLayer
    to: WholeLayer | None = None
    halves: Halves | None = None
    rotary: Any = None
    version: int = 0
    ready: tuple[Tensor, ...] = ()


class Chain:
    """What the layers of a model tell each other: the last result. Copies know nothing yet."""

    last: _Made | None = None

    def __reduce__(self) -> tuple[type[Chain], tuple[()]]:
        return Chain, ()

    def of(self, x: Tensor) -> _Made | None:
        """How `x` was made, if it is the last result."""
        last = self.last  # another thread may put in its own meanwhile
        return last if last is not None and last.result() is x else None


class WholeLayer:
    """Stands for the `forward` of a decoder layer, whose products are called `names` in it.

    Where anything is not as it was when `call` was found out, or somebody watches, the layer's own code runs. Copies
    find out what they can do when they are called. Which layer follows is seen when it gets the result of this one.
    """

    def __init__(self, layer: nn.Module, names: tuple[str, ...], call: AttentionCall, chain: Chain) -> None:
        self.layer, self.names, self.call, self.chain = layer, names, call, chain
        self._own = type(layer).forward
        self._ready: tuple[Pieces, Watch] | None = None
        self._plan: tuple[tuple[Any, ...], Halves | None] = (), None  # the halves, and what they are for
        self._next: WholeLayer | None = None
        self._chained: tuple[Halves, Halves, Decode | None] | None = None
        self._runs = False

    def __reduce__(self) -> tuple[type[WholeLayer], tuple[Any, ...]]:
        return WholeLayer, (self.layer, self.names, self.call, self.chain)

    def seen(self) -> list[tuple[int, ...]]:
        """The numbers of the products that ran together so far: all of them, or none."""
        return [tuple(range(len(self.names)))] if self._runs else []

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer makes of `hidden_states` [B, T, C], with the arguments that transformers gives it."""
        y = None if args else self._run(hidden_states, **kwargs)
        return self._own(self.layer, hidden_states, *args, **kwargs) if y is None else y

    def _run(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **given: Any,
    ) -> Tensor | None:
        halves, states = self._start(x, position_embeddings)
        attend = None if halves is None else self._attention()
        if halves is None or attend is None:
            return None
        query, key, value = states or halves.before(x, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.call.index)
        self._runs = True
        plain = attention_mask is None and attend is sdpa_attention_forward and _is_one(query, key, value)
        if plain and leaves_torch_alone(given):
            y = self._decode(halves, x, (query, key, value), position_embeddings)
            if y is not None:
                return y
        attended, _ = attend(
            self.layer._modules[ATTENTION], query, key, value, attention_mask, **self.call.keywords(given)
        )
        return halves.after(x, attended)

    def _start(self, x: Tensor, rotary: Any) -> tuple[Halves | None, tuple[Tensor, ...]]:
        """The halves for `x`, and query, key and value where the layer before this one has made them already."""
        made = self.chain.of(x)
        if made is not None and made.to is self and made.rotary is rotary and made.version == x._version:
            return made.halves, made.ready
        if made is not None:
            made.by._next = self
        return self._prepared(x) if self._fit(x, rotary) else None, ()

    def _attention(self) -> Callable[..., Any] | None:
        """The attention that the model is told to use, None for its own."""
        name = self.layer._modules[ATTENTION].config._attn_implementation  # type: ignore[union-attr]
        return None if name == EAGER else ALL_ATTENTION_FUNCTIONS.get(name)

    def _decode(self, halves: Halves, x: Tensor, states: tuple[Tensor, ...], rotary: Any) -> Tensor | None:
        """The result for one token, and what comes before attention in the next layer."""
        following, decode = self._follow(halves, x)
        if decode is not None:
            found = decode(x, *states, *rotary)
        else:
            found = None if halves.decode is None else halves.decode(x, *states)
        if found is None:
            return None
        y, ready = found
        made = _Made(weakref.ref(y), self)
        if following is not None:
            made = _Made(made.result, self, self._next, following, rotary, y._version, ready)
        self.chain.last = made
        return y

    def _follow(self, halves: Halves, x: Tensor) -> tuple[Halves | None, Decode | None]:
        """The halves of the next layer, and what runs this one and goes on with them; None if nobody can."""
        following = self._next
        if following is None or x.is_inference() or self.layer._forward_hooks or following.layer._forward_pre_hooks:
            return None, None
        after = following._prepared(x)
        if after is None or halves.decode_and is None:
            return None, None
        chained = self._chained
        if chained is None or chained[0] is not halves or chained[1] is not after:
            self._chained = chained = halves, after, halves.decode_and(after)
        decode = chained[2]
        return (None, None) if decode is None else (after, decode)

    def _prepared(self, x: Tensor) -> Halves | None:
        """The halves for inputs like `x`, if nobody watches and the layer is what it was."""
        if not is_plain(x) or self.layer.training:
            return None
        if self._ready is None:
            pieces = find(self.layer)
            if not isinstance(pieces, Pieces):
                return None
            self._ready = pieces, Watch(pieces)
        pieces, watch = self._ready
        if not watch.is_whole():
            self._ready, self._plan = None, ((), None)
            return None
        try:
            now = (x.dtype, x.device, *watch.marks())
        except RuntimeError:  # inference tensors, whose changes are not counted
            return None
        plan = self._plan
        if now != plan[0]:
            self._plan = plan = now, _halves(pieces, x, self.call)
        return plan[1]

    def _fit(self, x: Tensor, rotary: Any) -> bool:
        if not isinstance(rotary, tuple) or len(rotary) != 2 or x.dim() != 3:
            return False
        shapes = ((1, x.shape[1], self.call.head), (x.shape[0], x.shape[1], self.call.head))
        return all(turn.shape in shapes and turn.dtype == x.dtype and turn.is_contiguous() for turn in rotary)


def _is_one(query: Tensor, *states: Tensor) -> bool:
    """Whether these are one token's queries, and keys and values that lie there without gaps."""
    if query.shape[2] != 1:
        return False
    return all(type(one) is Tensor and one.dtype == query.dtype and one.is_contiguous() for one in states)


def _halves(pieces: Pieces, x: Tensor, call: AttentionCall) -> Halves | None:
    if any(tensor.device != x.device for product in pieces.products.values() for tensor in product.packed()):
        return None
    return pieces.halves(x, call.head, call.scale)


@torch.no_grad()
def whole(pieces: Pieces, chain: Chain) -> WholeLayer | str:
    """What may stand for the forward of the layer of `pieces`, or the reason why nothing may.

    `chain`: that of the other layers of the same model.
    """
    layer = pieces.layer
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if layer.training:
        return "it is in training mode: call eval() first"
    if not Watch(pieces).is_whole():
        return "there are hooks on modules inside of it"
    try:
        call = ask(pieces)
    except Disagreement as disagreement:
        return str(disagreement)
    return WholeLayer(layer, tuple(".".join(place) for place in pieces.places.values()), call, chain)
