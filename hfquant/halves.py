"""The two halves of a decoder layer, before and after its attention: what a kernel may run in one call each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BEFORE = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Gain:
    """A root-mean-square norm: x / sqrt(mean(x^2) + eps), rounded to its dtype, times `weight` [C] of that dtype."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """What a decoder layer with H heads of D numbers is made of, in the order in which it is computed.

    `bounds` and `biases`: the bound weights of the products `BEFORE` attention and of output, gate, up and down behind
    it, and their biases or None.
    `input_norm` goes before the first products, `head_norms` over each head of query and key or None, and `output_norm`
    before the gated MLP down(silu(gate(x)) * up(x)), or before `mlp` [B, T, C], whatever that is: then gate, up and
    down are not there. `scale`: factor of attention's scores, if that is no more than
    softmax(q k^T * scale) v.
    """

    head: int
    scale: float | None
    bounds: Mapping[str, Any]
    biases: Mapping[str, Tensor | None]
    input_norm: Gain
    head_norms: tuple[Gain, Gain] | None
    output_norm: Gain
    mlp: Callable[[Tensor], Tensor] | None = None


Decoded = tuple[Tensor, tuple[Tensor, ...]]
Decode = Callable[..., Decoded | None]


@dataclass(frozen=True, eq=False)
class Halves:
    """What runs a decoder layer, for inputs x [B, T, C] of one dtype.

    `before(x, cos, sin)` gives query [B, H, T, D], key and value [B, H', T, D] of x, with rotary positions `cos` and
    `sin` [1 or B, T, D] of its dtype. `after(x, attended)` gives the result [B, T, C] of x and what attention made
    [B, T, H, D]. `decode(x, query, key, value)` gives `(y, ())`, the result for one token, x [B, 1, C], that attends to
    all of contiguous key and value [B, H', T, D]; it is None without a scale, and gives None where single operations
    are faster. `decode_and(following)` makes what goes on with `before` of the halves that follow: called with `cos`
    and `sin`, too, it gives `(y, (query, key, value))`.

    Results are those of single operations, but for the order of sums in a norm, the last bit of an exponential, and
    what is left in float32 inside of attention. What is kept alive is `mlp`, and of tensors biases and norms' weights.
    """

    before: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    after: Callable[[Tensor, Tensor], Tensor]
    decode: Decode | None = None
    decode_and: Callable[[Halves], Decode | None] | None = None
