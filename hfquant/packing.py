"""Dense packing of sub-byte codes: b bits each, least significant bit first, rows padded to whole bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` [..., K] uint8, all below 2^bits, into [..., ceil(K * bits / 8)] uint8."""
    count = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    if codes.is_meta:  # most of a model's loading time would go into finding out what this comes to
        return codes.new_empty(*codes.shape[:-1], packed_width(count, bits))
    if bits == 4:
        pairs = _words(_pad_to(codes, 2), torch.int16)
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)  # what is above the lowest byte is cut off
    words = _words(_pad_to(codes, 8), torch.int64)
    for lane in (8, 16, 32):  # two lanes at a time become one, with the codes of both at its beginning
        used = lane * bits // 8
        low = _every(2 * lane, 2**used - 1)
        words = ((words >> (lane - used)) & (low << used)).bitwise_or_(words & low)
    # Eight codes fill exactly `bits` bytes.
    packed = _bytes(words).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)
    return packed[..., : packed_width(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` codes [..., count] uint8."""
    if bits == 8:
        return packed[..., :count].contiguous()
    if bits == 4:
        pairs = packed.to(torch.int16)
        return _bytes((pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F))[..., :count].contiguous()
    words = pad(_pad_to(packed, bits).unflatten(-1, (-1, bits)), (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for lane in (32, 16, 8):
        used = lane * bits // 8
        low = _every(2 * lane, 2**used - 1)
        words = ((words << (lane - used)) & (low << lane)).bitwise_or_(words & low)
    return _bytes(words)[..., :count].contiguous()


def _every(period: int, pattern: int) -> int:
    """A 64-bit word with `pattern` in every `period` bits."""
    return sum(pattern << start for start in range(0, 64, period))


def _words(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `codes`, which fill the last axis, as larger integers; the processor is little-endian."""
    flat = codes.reshape(-1)
    flat = flat.clone() if flat.storage_offset() % dtype.itemsize else flat
    return flat.view(dtype).reshape(*codes.shape[:-1], codes.shape[-1] // dtype.itemsize)


def _bytes(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    flat = words.reshape(-1).view(torch.uint8)
    return flat.reshape(*words.shape[:-1], words.shape[-1] * words.element_size())


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad the last axis with zeros to a multiple."""
    missing = -x.shape[-1] % multiple
    return pad(x, (0, missing)) if missing else x
