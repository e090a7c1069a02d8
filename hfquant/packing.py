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
    lanes = _pad_to(codes, 8).unflatten(-1, (-1, 8))
    if bits == 4:
        packed = (lanes[..., 0::2] | (lanes[..., 1::2] << 4)).flatten(-2)
    else:
        # Eight codes fill exactly `bits` bytes: collect them in one 64-bit word and cut it.
        word = torch.zeros(lanes.shape[:-1], dtype=torch.int64, device=codes.device)
        for lane in range(8):
            word |= lanes[..., lane].long() << (lane * bits)
        packed = torch.stack([(word >> (8 * byte)) & 255 for byte in range(bits)], -1).to(torch.uint8).flatten(-2)
    return packed[..., : packed_width(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` codes [..., count] uint8."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :count].contiguous()
    bytes_ = _pad_to(packed, bits).unflatten(-1, (-1, bits))
    word = torch.zeros(bytes_.shape[:-1], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= bytes_[..., byte].long() << (8 * byte)
    mask = 2**bits - 1
    lanes = torch.stack([((word >> (lane * bits)) & mask).to(torch.uint8) for lane in range(8)], -1)
    return lanes.flatten(-2)[..., :count].contiguous()


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad the last axis with zeros to a multiple."""
    missing = -x.shape[-1] % multiple
    return pad(x, (0, missing)) if missing else x
