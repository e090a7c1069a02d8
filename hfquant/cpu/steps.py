"""A decoder layer in two calls of the CPU library: `hfq_steps` of hfquant.h."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..halves import BEFORE, Decode, Decoded, DecoderParts, Gain, Halves
from .jobs import Direct, address_of

LINEAR, NORM, ROPE, GATE, ADD, ATTEND = range(6)  # hfq_op
NEAR = 512  # tokens: with more of them torch's attention is faster, and takes so long that the way to it does not count
WIDEST = 512  # numbers of a head that ATTEND takes
_STEP = struct.Struct("@5if3q3P")  # hfq_step


@dataclass(eq=False)
class Steps:
    """Steps to be run one after the other, on slots that hold tensors.

    `held`: what they have addresses of and must live as long.
    """

    fields: list[bytes] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)

    def product(self, bound: Direct, bias: Tensor | None, x: int, y: int) -> None:
        """Slot y [rows, N] = slot x [rows, K] @ W^T + bias."""
        at, copied = address_of(bias)
        self.held += (bound, copied)
        self.fields.append(_STEP.pack(LINEAR, x, y, 0, 0, 0.0, bound.n, 1, 1, *bound.at, at))

    def norm(self, gain: Gain, x: int, y: int, parts: int = 1) -> None:
        """Slot y = slot x [rows * parts, C] normed."""
        weight = gain.weight
        self.fields.append(_STEP.pack(NORM, x, y, 0, 0, gain.eps, weight.numel(), parts, 1, 0, 0, weight.data_ptr()))

    def rope(self, x: int, cos: int, sin: int, head: int, parts: int) -> None:
        """Turn the heads in slot x [rows * parts, head] by their positions."""
        self.fields.append(_STEP.pack(ROPE, x, x, cos, sin, 0.0, head, parts, 1, 0, 0, 0))

    def gate(self, x: int, other: int, columns: int) -> None:
        """Slot x [rows, columns] = silu(x) * other."""
        self.fields.append(_STEP.pack(GATE, x, x, other, 0, 0.0, columns, 1, 1, 0, 0, 0))

    def add(self, x: int, other: int, y: int, columns: int) -> None:
        """Slot y [rows, columns] = x + other."""
        self.fields.append(_STEP.pack(ADD, x, y, other, 0, 0.0, columns, 1, 1, 0, 0, 0))

    def attend(
        self, query: int, key: int, value: int, y: int, head: int, parts: int, sharing: int, scale: float
    ) -> None:
        """Slot y [rows, parts * head] = softmax(query keys^T * scale) values, for one token per row."""
        self.fields.append(_STEP.pack(ATTEND, query, y, key, value, scale, head, parts, sharing, 0, 0, 0))

    def table(self) -> bytes:
        """All of them as the library reads them."""
        return b"".join(self.fields)


def halves(parts: DecoderParts) -> Halves | None:
    """What runs a decoder layer, or None if some weight needs its input in another form."""
    if any(type(bound) is not Direct for bound in parts.bounds.values()):
        return None
    if parts.scale is None or parts.head > WIDEST:
        return Halves(_Before(parts), _After(parts))
    decode_and = partial(_decode_and, parts) if parts.mlp is None else None
    return Halves(_Before(parts), _After(parts), _Decode(parts, None), decode_and)


def _decode_and(parts: DecoderParts, following: Halves) -> Decode | None:
    before = following.before
    return _Decode(parts, before.parts) if isinstance(before, _Before) else None


class _Before:
    """The norm, query, key and value, and their positions."""

    def __init__(self, parts: DecoderParts) -> None:
        self.parts = parts
        self._heads = _heads(parts)
        steps = Steps()
        _add_before(steps, parts, *range(7))
        self._run = _Run(parts, steps, 7)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        batch, tokens, _ = x.shape
        normed, head = x.new_empty(x.shape), self.parts.head
        if tokens == 1:  # the same numbers in the same places
            query, key, value = [x.new_empty(batch, heads, 1, head) for heads in self._heads]
        else:
            query, key, value = [x.new_empty(batch, tokens, heads, head) for heads in self._heads]
        self._run((x, normed, cos, sin, query, key, value), batch * tokens, len(cos) * tokens)
        if tokens == 1:
            return query, key, value
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _After:
    """The output of attention, the norm and the MLP, each added to what it was made from."""

    def __init__(self, parts: DecoderParts) -> None:
        steps = Steps()
        _add_after(steps, parts, *range(6))
        self._parts, self._inner = parts, _inner(parts)
        self._run = _Run(parts, steps, 6)

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x.contiguous()
        rows, (y, scratch, gate, up) = x.numel() // x.shape[-1], _room(x, self._inner)
        self._run((x, attended.contiguous(), y, scratch, gate, up), rows)
        return _finished(self._parts, y, scratch)


class _Decode:
    """The same behind attention of one token to all keys and values; and before that of the `following` layer."""

    def __init__(self, parts: DecoderParts, following: DecoderParts | None) -> None:
        x, query, y, scratch, gate, up, key, value, *more = range(13)
        assert parts.scale is not None
        steps = Steps()
        query_heads, key_heads, _ = _heads(parts)
        steps.attend(query, key, value, query, parts.head, query_heads, query_heads // key_heads, parts.scale)
        _add_after(steps, parts, x, query, y, scratch, gate, up)
        if following is not None:
            _add_before(steps, following, y, scratch, *more)
        self._parts, self._next, self._inner = parts, following, _inner(parts)
        self._run = _Run(parts, steps, 8 if following is None else 13)

    def __call__(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, *rotary: Tensor) -> Decoded | None:
        if key.shape[2] > NEAR:
            return None
        x, rows = x.contiguous(), len(x)
        y, scratch, gate, up = _room(x, self._inner)
        made: list[Tensor] = []
        if self._next is not None:
            made = [x.new_empty(rows, heads, 1, self._next.head) for heads in _heads(self._next)]
        positions = len(rotary[0]) if rotary else 1
        self._run((x, query, y, scratch, gate, up, key, value, *rotary, *made), rows, positions, key.shape[2])
        return _finished(self._parts, y, scratch), tuple(made)


def _inner(parts: DecoderParts) -> int:
    """Columns inside of the MLP, if it is one of steps."""
    return parts.bounds["gate"].n if parts.mlp is None else 0


def _room(x: Tensor, inner: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the result of `x`, for what is in between, and for both halves of the MLP."""
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(rows, inner), x.new_empty(rows, inner)


def _finished(parts: DecoderParts, y: Tensor, normed: Tensor) -> Tensor:
    """The result of a layer: with what its MLP makes of `normed`, unless that is in it already."""
    return y if parts.mlp is None else y + parts.mlp(normed)


def _heads(parts: DecoderParts) -> list[int]:
    return [parts.bounds[name].n // parts.head for name in BEFORE]


def _add_before(steps: Steps, parts: DecoderParts, x: int, normed: int, cos: int, sin: int, *made: int) -> None:
    """What comes before attention."""
    steps.norm(parts.input_norm, x, normed)
    for name, slot in zip(BEFORE, made, strict=True):
        steps.product(parts.bounds[name], parts.biases[name], normed, slot)
    heads = _heads(parts)
    for number, gain in enumerate(parts.head_norms or ()):
        steps.norm(gain, made[number], made[number], heads[number])
    for number in (0, 1):
        steps.rope(made[number], cos, sin, parts.head, heads[number])


def _add_after(
    steps: Steps, parts: DecoderParts, x: int, attended: int, y: int, scratch: int, gate: int, up: int
) -> None:
    """What follows attention."""
    bounds: dict[str, Direct] = dict(parts.bounds)
    columns = bounds["output"].n
    steps.product(bounds["output"], parts.biases["output"], attended, y)
    steps.add(x, y, y, columns)
    steps.norm(parts.output_norm, y, scratch)
    if parts.mlp is not None:
        return
    steps.product(bounds["gate"], parts.biases["gate"], scratch, gate)
    steps.product(bounds["up"], parts.biases["up"], scratch, up)
    steps.gate(gate, up, bounds["gate"].n)
    steps.product(bounds["down"], parts.biases["down"], gate, scratch)
    steps.add(y, scratch, y, columns)


class _Run:
    """Prepared steps on so many slots."""

    def __init__(self, parts: DecoderParts, steps: Steps, slots: int) -> None:
        self._library, self._held = parts.bounds["query"].library, steps.held
        self._table, self._count = steps.table(), len(steps.fields)
        self._slots = struct.Struct(f"@{slots}P")

    def __call__(self, tensors: Sequence[Tensor], rows: int, positions: int = 1, tokens: int = 1) -> None:
        slots = self._slots.pack(*map(Tensor.data_ptr, tensors))
        self._library.steps(self._table, self._count, slots, (rows, positions, tokens), tensors[0].dtype)
