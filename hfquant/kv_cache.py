"""A quantized KV cache for `generate`: `past_key_values=hfquant.KVCache(model.config)`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from .blocks import Blocks
from .errors import SpecError, UnsupportedError
from .grids import grid as named
from .kv_attention import IMPLEMENTATION, stand_ins
from .kv_states import States, check_states
from .spec import TensorSpec

NONE = "none"
# Layers whose memory does not grow with the text are left to transformers, in full precision.
BOUNDED = ("sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid_sliding", "dummy")

Numbers = str | TensorSpec | None


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one attention layer, quantized but for the newest tokens.

    `keys` and `values` are the numbers of `TensorSpec`s, None for full precision. A token is seen in full precision by
    the call that brings it; then the oldest tokens are quantized, so that the newest `residual` ones, and less than
    one block more, are left. `config`: of the model, to see which attention it uses.
    """

    is_sliding = False

    def __init__(
        self, keys: TensorSpec | None, values: TensorSpec | None, residual: int, config: Any | None = None
    ) -> None:
        # Not that of the base class: `keys` and `values` are computed here.
        self.specs = (keys, values)
        self.residual = residual
        self.config = config
        self.states: tuple[States, States] | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come."""
        return self.states is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace: not where tokens may have been quantized meanwhile."""
        return self.specs == (None, None)

    @property
    def keys(self) -> Tensor | None:
        """All keys [B, H, T, D], dequantized; None while there are none."""
        return None if self.states is None else self.states[0].read()

    @property
    def values(self) -> Tensor | None:
        """All values [B, H, T, D], dequantized; None while there are none."""
        return None if self.states is None else self.states[1].read()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens, of the shapes, dtype and device of these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        step = math.lcm(*(1 if spec is None else spec.blocks.rows for spec in self.specs))
        both = zip(self.specs, (key_states, value_states), strict=True)
        key, value = (States(spec, self.residual, step, x[:, :, :0]) for spec, x in both)
        self.states = (key, value)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens [B, H, n, D]; all keys and all values, [B, H, T, D] of the same dtype."""
        if self.states is None:
            self.lazy_initialization(key_states, value_states)
        assert self.states is not None
        key, value = self.states
        key, value = key.then(key_states), value.then(value_states)
        self.states = (key.settled(), value.settled())
        if self.config is not None and self.config._attn_implementation == IMPLEMENTATION:
            return stand_ins(key, value)
        return key.read(), value.read()

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return 0 if self.states is None else self.states[0].tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens is about."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.states = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one; at most one block is cut for it.

        What is left of that block is in full precision again, but not as precise as before it was quantized.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove and self.states is not None:
            key, value = self.states
            self.states = (key.without(-tokens_to_remove), value.without(-tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on from another one, [B] int64, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` [n] int64, or those of a mask [B] bool."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def _map(self, change: Any) -> None:
        if self.states is not None:
            key, value = self.states
            self.states = (key.map(change), value.map(change))


class KVCache(Cache):
    """A KV cache that stores keys and values in few bits, for `generate` and `forward` as `past_key_values`.

    `config`: the model's; without it every layer is taken for one with full attention. `keys` and `values`: a grid
    ("uint4", "int8", "e4m3", "nf4", ...), "none" for full precision, or a `TensorSpec` with any blocks of tokens and
    channels. Unsigned integers have a zero point for each block. By name, keys share a scale in each channel of
    `group_size` tokens, values in each token of `group_size` channels (KIVI). At least the newest `residual` tokens
    stay in full precision. `scale_dtype`: "float16", "bfloat16" or "float32".

    Layers with a sliding window, or without attention, are as in transformers' `DynamicCache`, in full precision.
    Raises SpecError for numbers that cannot be stored, UnsupportedError for a model without any layer to quantize.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        keys: Numbers = "uint4",
        values: Numbers = "uint4",
        group_size: int = 32,
        residual: int = 128,
        scale_dtype: str = "float16",
    ) -> None:
        for name, least, number in (("group_size", 1, group_size), ("residual", 0, residual)):
            if not isinstance(number, int) or number < least:
                raise SpecError(f"{name} is a whole number of at least {least}, got {number!r}")
        key = numbers_of(keys, Blocks(group_size, 1), scale_dtype, "keys")
        value = numbers_of(values, Blocks(1, group_size), scale_dtype, "values")
        if config is None:
            super().__init__(layer_class_to_replicate=partial(KVCacheLayer, key, value, residual))
            return
        decoder = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(decoder)
        if reason := why_not(types):
            raise UnsupportedError(f"a quantized KV cache for {decoder.model_type!r}: {reason}")
        layers = [
            KVCacheLayer(key, value, residual, decoder)
            if kind == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
            for kind, given in zip(types, options, strict=True)
        ]
        super().__init__(layers=layers)

    def bytes(self) -> tuple[int, int]:
        """Bytes that all keys and values take now, and those that they would take in the dtype of the model."""
        taken, full = 0, 0
        for layer in self.layers:
            if not isinstance(layer, KVCacheLayer):
                size = sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor))
                taken, full = taken + size, full + size
            elif layer.states is not None:
                for side in layer.states:
                    batch, heads, _, width = side.tail.shape
                    taken += side.nbytes
                    full += batch * heads * side.tokens * width * side.tail.element_size()
        return taken, full


def numbers_of(asked: Numbers, blocks: Blocks, scale: str, what: str) -> TensorSpec | None:
    """What `KVCache` takes for keys or values as a spec, None for full precision. Raises SpecError."""
    if asked is None or asked == NONE:
        return None
    if isinstance(asked, TensorSpec):
        return check_states(asked, what)
    if not isinstance(asked, str):
        raise SpecError(f"{what} is the name of a grid, 'none' or a TensorSpec, got {asked!r}")
    return check_states(TensorSpec(named(asked).name, blocks, asked.startswith("uint"), scale), what)


def why_not(types: list[str]) -> str | None:
    """Reason why a model with layers of these types gets no quantized cache, or None."""
    if unknown := sorted(set(types) - {"full_attention", *BOUNDED}):
        return f"it has layers of type {', '.join(unknown)}, whose caches hold more than keys and values"
    if "full_attention" not in types:
        return (
            f"all its layers are of type {', '.join(sorted(set(types)))}, whose caches do not grow with the text: "
            "leave past_key_values out"
        )
    return None
