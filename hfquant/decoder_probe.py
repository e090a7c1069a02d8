"""What a decoder layer does, found by asking it: nothing is concluded from the names of its classes.

The layer's own code runs once, with an attention and a cache that note what they are given and make something up. What
the prepared halves of the layer compute from the same input must agree with it.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention import CHANGING
from .decoder_parts import ATTENTION, Pieces
from .halves import BEFORE

ASKED = frozenset(("position_ids", "use_cache"))  # keywords that transformers calls a layer with
# Keywords that may change what torch's attention computes; it leaves all others alone.
_READ = {*CHANGING, "output_attentions", *inspect.signature(sdpa_attention_forward).parameters}
_NAME = "hfquant_probe"  # among transformers' attention implementations
_NOTES = "_hfquant_notes"
_TOKENS = 4
_SIZES = (1.0, 1e-1, 1e-2, 1e-3)  # of the tokens: small ones show the epsilon of a norm and what an MLP adds
_AGREE = 1e-2  # relative to the largest number of a token: rounding, also of a quantized input to its next number


@dataclass(frozen=True)
class AttentionCall:
    """How a layer calls attention and its cache, besides with query, key, value and mask.

    `head`: numbers of a head. `index`: the layer's in the cache. `fixed`: keywords that stay. `passed`: those of
    `ASKED` that are passed on from the call of the layer; `passes_more`: whether unknown ones are.
    """

    head: int
    index: int
    fixed: dict[str, Any]
    passed: tuple[str, ...]
    passes_more: bool

    @property
    def scale(self) -> float | None:
        """Factor of the scores, if attention gets nothing else that changes what it computes."""
        scaling, dropout = self.fixed.get("scaling"), self.fixed.get("dropout")
        others = {name: value for name, value in self.fixed.items() if name not in ("scaling", "dropout")}
        return scaling if isinstance(scaling, float) and not dropout and leaves_torch_alone(others) else None

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """What attention gets when the layer is called with `given`."""
        passed = {
            name: value
            for name, value in given.items()
            if name in self.passed or (self.passes_more and name not in ASKED)
        }
        return {**passed, **self.fixed}


def leaves_torch_alone(given: dict[str, Any]) -> bool:
    """Whether no keyword changes what `sdpa` computes without a mask."""
    return all(given[name] is None for name in given.keys() & _READ)


class Disagreement(Exception):
    """The layer does something else than its halves would."""


@dataclass
class _Notes:
    """What attention and the cache were given."""

    attended: Tensor | None = None
    states: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)
    updates: list[tuple[Tensor, Tensor, Any]] = field(default_factory=list)

    def update(self, key: Tensor, value: Tensor, index: Any, *more: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """As a cache does."""
        if any(one is not None for one in (*more, *keywords.values())):
            raise Disagreement("it gives more to its cache than keys, values and its number")
        self.updates.append((key, value, index))
        return key, value

    def attend(self, states: tuple[Tensor, ...], mask: Tensor | None, given: dict[str, Any]) -> tuple[Tensor, None]:
        """As attention does: the result [B, T, H, D] is made up."""
        if self.states:
            raise Disagreement("it calls attention twice")
        self.states, self.mask, self.given = states, mask, given
        query = states[0].transpose(1, 2)
        self.attended = _drawn(query.shape, query.dtype, 3) * _sizes(query.dtype)[:, None]
        return self.attended, None


def _attend(module: nn.Module, *states: Any, **given: Any) -> tuple[Tensor, None]:
    query, key, value, *mask = states
    notes: _Notes = getattr(module, _NOTES)
    return notes.attend((query, key, value), mask[0] if mask else given.pop("attention_mask", None), given)


AttentionInterface.register(_NAME, _attend)


def ask(pieces: Pieces) -> AttentionCall:
    """How the layer of `pieces` calls attention. Raises Disagreement if it does not what its halves do."""
    notes, first = _Notes(), pieces.products["query"]
    x = _drawn((1, _TOKENS, first.in_features), first.dtype, 0) * _sizes(first.dtype)
    head = getattr(pieces.attention, "head_dim", None)
    query, key, value = (pieces.products[name].out_features for name in BEFORE)
    if not isinstance(head, int) or head % 2 or query % head or key % head or query % key or key != value:
        raise Disagreement("its attention does not say how many numbers a head has")
    cos, sin = (_drawn((1, _TOKENS, head), x.dtype, seed) for seed in (1, 2))
    marks: dict[str, Any] = {name: object() for name in (*sorted(ASKED), _NOTES)}
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=x.dtype)
    given = {"attention_mask": mask, "past_key_values": notes, "position_embeddings": (cos, sin), **marks}
    try:
        _compare(pieces, notes, x, _standing_in(pieces, notes)(x, **given), given)
    except Disagreement:
        raise
    except Exception as error:
        raise Disagreement(f"it cannot be asked what it does: {type(error).__name__}: {error}") from error
    return _call(notes, head, marks)


def _standing_in(pieces: Pieces, notes: _Notes) -> nn.Module:
    """The layer with an attention that calls `notes`; the model itself is not touched."""
    layer, attention = copy.copy(pieces.layer), copy.copy(pieces.attention)
    config = copy.copy(attention.config)
    config._attn_implementation_internal = _NAME  # type: ignore[union-attr]
    attention.__dict__.update({"config": config, _NOTES: notes})
    layer.__dict__["_modules"] = {**layer._modules, ATTENTION: attention}
    return layer


def _compare(pieces: Pieces, notes: _Notes, x: Tensor, y: Any, given: dict[str, Any]) -> None:
    """Raise Disagreement unless the halves of a layer make of `x` what led to `notes` and `y`."""
    attended, mask = notes.attended, given["attention_mask"]
    if attended is None or len(notes.updates) != 1 or notes.mask is not mask or not isinstance(y, Tensor):
        raise Disagreement("it does not call transformers' attention once, with its mask and its cache")
    rotary = given["position_embeddings"]
    halves = pieces.halves(x, rotary[0].shape[-1])
    if halves is None:
        raise Disagreement("no kernel runs it as a whole")
    key, value, _ = notes.updates[0]
    if key is not notes.states[1] or value is not notes.states[2]:
        raise Disagreement("it changes keys or values after they went to the cache")
    for name, ours, theirs in zip(BEFORE, halves.before(x, *rotary), notes.states, strict=True):
        if not _agree(ours.transpose(1, 2), theirs.transpose(1, 2)):
            raise Disagreement(f"its {name} is something else")
    if not _agree(halves.after(x, attended), y):
        raise Disagreement("what it does after attention is something else")


def _call(notes: _Notes, head: int, marks: dict[str, Any]) -> AttentionCall:
    passed = tuple(name for name, mark in marks.items() if name != _NOTES and notes.given.get(name) is mark)
    fixed = {name: value for name, value in notes.given.items() if name not in marks}
    if odd := [name for name, value in fixed.items() if not isinstance(value, bool | int | float | str | None)]:
        raise Disagreement(f"it computes {odd[0]} for its attention")
    index = notes.updates[0][2]
    if not isinstance(index, int):
        raise Disagreement("its number in the cache is none")
    return AttentionCall(head, index, fixed, passed, notes.given.get(_NOTES) is marks[_NOTES])


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results [B, T, ...] are the same for each token, but for rounding."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.flatten(2).double(), theirs.flatten(2).double()
    off, largest = (ours - theirs).abs().amax(-1), theirs.abs().amax(-1)
    return bool((off <= _AGREE * largest).all()) and bool(largest.isfinite().all())


def _sizes(dtype: torch.dtype) -> Tensor:
    return torch.tensor(_SIZES, dtype=dtype)[:, None]


def _drawn(shape: Any, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
