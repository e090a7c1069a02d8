"""From stored codes to numbers, on the device: what every kernel that reads packed weights is made of.

A code is the place of a number in the sorted list of its grid. Integers become floating point without a conversion
instruction, which is slow: written into the last bits of the mantissa of a power of two ("magic number") they are a
float already, off by that power.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_at(stored, row, index, BITS: tl.constexpr):
    """Codes int32 of BITS bits, low bits first, at places `index` of rows that begin at the bytes `row`."""
    if BITS == 8:
        return tl.load(stored + (row + index)).to(tl.int32)
    else:
        first = index * BITS
        at = row + (first >> 3)
        found = tl.load(stored + at).to(tl.int32)
        if 8 % BITS != 0:  # a code may end in the next byte
            beyond = (first & 7) + BITS > 8
            found |= tl.load(stored + at + 1, mask=beyond, other=0).to(tl.int32) << 8
        return (found >> (first & 7)) & ((1 << BITS) - 1)


@triton.jit
def zeros_at(zero, row, index, BITS: tl.constexpr):
    """Zero points at places `index` of rows that begin at `row`: int32 of BITS bits, or float32 for BITS of 0."""
    if BITS == 0:
        return tl.load(zero + (row + index)).to(tl.float32)
    else:
        return bits_at(zero, row, index, BITS)


@triton.jit
def four_bits_of(words, MAGIC: tl.constexpr):
    """The eight codes of each of `words` [R, W] int32, in order: [R, 8 W] uint16, each with the bits of MAGIC set.

    Two codes are cut out at once, those that lie 16 bits apart.
    """
    both: tl.constexpr = MAGIC * 0x10001
    a = (words & 0x000F000F) | both
    b = ((words >> 4) & 0x000F000F) | both
    c = ((words >> 8) & 0x000F000F) | both
    d = ((words >> 12) & 0x000F000F) | both
    even = tl.join(
        tl.join(a.to(tl.uint16), (a >> 16).to(tl.uint16)),
        tl.join(c.to(tl.uint16), (c >> 16).to(tl.uint16)),
    )
    odd = tl.join(
        tl.join(b.to(tl.uint16), (b >> 16).to(tl.uint16)),
        tl.join(d.to(tl.uint16), (d >> 16).to(tl.uint16)),
    )
    # The last axis that was joined varies fastest: from here [R, W, 2, 2, 2] is the order of the codes.
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))


@triton.jit
def permuted(a, b, selector):
    """Four bytes of the eight of `a` and `b` int32, named by the hex digits of `selector`, 0 to 7, low ones first.

    An instruction of NVIDIA's GPUs, and a table of eight entries in registers.
    """
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def bytes_of_codes(codes, table, BYTE: tl.constexpr):
    """Byte 0 or 1 of the levels of the four codes in the low half of each of `codes`: [R, W] int32."""
    low = codes & 0x7777
    first = permuted(tl.load(table + 4 * BYTE), tl.load(table + 4 * BYTE + 1), low)
    second = permuted(tl.load(table + 4 * BYTE + 2), tl.load(table + 4 * BYTE + 3), low)
    return permuted(first, second, ((codes >> 1) & 0x4444) | 0x3210)  # the code's last bit says which


@triton.jit
def levels_of_words(words, table, dtype: tl.constexpr):
    """Levels [R, 8 W] in a 16-bit dtype of the eight 4-bit codes of each of `words` [R, W] int32.

    `table` [8] int32 holds the first bytes of all 16 levels and then the second ones. Everything stays in registers:
    three permutations find the bytes of four levels, one puts those of two together.
    """
    low, high = bytes_of_codes(words, table, 0), bytes_of_codes(words, table, 1)
    words = words >> 16
    low2, high2 = bytes_of_codes(words, table, 0), bytes_of_codes(words, table, 1)
    a, b = permuted(low, high, 0x5140), permuted(low, high, 0x7362)
    c, d = permuted(low2, high2, 0x5140), permuted(low2, high2, 0x7362)
    even = tl.join(tl.join(a.to(tl.uint16), c.to(tl.uint16)), tl.join(b.to(tl.uint16), d.to(tl.uint16)))
    odd = tl.join(
        tl.join((a >> 16).to(tl.uint16), (c >> 16).to(tl.uint16)),
        tl.join((b >> 16).to(tl.uint16), (d >> 16).to(tl.uint16)),
    )
    # From here [R, W, 2, 2, 2] is the order of the codes.
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8)).to(dtype, bitcast=True)


@triton.jit
def numbers_of_words(words, table, zero, KIND: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr,
                     MANTISSA: tl.constexpr, FACTOR: tl.constexpr):  # fmt: skip
    """Numbers [R, 8 W] in dtype of the eight 4-bit codes of each of `words` [R, W] int32; see `numbers`."""
    if KIND == "permute":
        return levels_of_words(words, table, dtype)
    elif KIND == "integer" and dtype != tl.float32:
        return from_magic(four_bits_of(words, 0x6400 if dtype == tl.float16 else 0x4300), zero, dtype)
    else:
        return numbers(four_bits_of(words, 0), table, zero, KIND, dtype, BITS, MANTISSA, FACTOR)


@triton.jit
def integers(code, zero, dtype: tl.constexpr, BITS: tl.constexpr):
    """`code` - `zero`, exactly, in dtype; both are integers of at most BITS bits."""
    if dtype == tl.float16:
        return from_magic(code.to(tl.uint16) | 0x6400, zero, dtype)
    elif dtype == tl.bfloat16 and BITS < 8:
        return from_magic(code.to(tl.uint16) | 0x4300, zero, dtype)
    else:
        placed = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        return (placed - (zero.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)).to(dtype)


@triton.jit
def from_magic(placed, zero, dtype: tl.constexpr):
    """The same for codes that four_bits_of has put into the bits of a 16-bit number."""
    magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    return placed.to(dtype, bitcast=True) - (zero | magic).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def shifted(code, zero, dtype: tl.constexpr):
    """`code`, of at most 8 bits, - `zero`, float32, rounded to dtype."""
    placed = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return ((placed - 8388608.0) - zero).to(dtype)


@triton.jit
def floats(code, ZERO: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    """Numbers float32 of a floating-point grid: `code` - ZERO is a sign and the bits of the magnitude.

    They are written over the bits of a float32, whose exponents are FACTOR, a power of two, off.
    """
    step = code.to(tl.int32) - ZERO
    magnitude = tl.abs(step) << (23 - MANTISSA)
    return (magnitude | (step & -0x80000000)).to(tl.float32, bitcast=True) * FACTOR


@triton.jit
def numbers(code, table, zero, KIND: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr,
            MANTISSA: tl.constexpr, FACTOR: tl.constexpr):  # fmt: skip
    """Numbers in dtype of codes of any grid; KIND says how.

    "integer", "shifted" for integers off by a real number, "float", or "table" for a lookup.
    """
    if KIND == "integer":
        return integers(code, zero, dtype, BITS)
    elif KIND == "shifted":
        return shifted(code, zero, dtype)
    elif KIND == "float":
        return floats(code, zero, MANTISSA, FACTOR).to(dtype)
    else:
        return tl.load(table + code.to(tl.int32))


@triton.jit
def scales(scale, levels, factors, at, factor_group):
    """Scales float32 at places `at`; quantized ones are codes of `levels` with a factor for every `factor_group`."""
    if levels is None:
        return tl.load(scale + at).to(tl.float32)
    else:
        level = tl.load(levels + tl.load(scale + at).to(tl.int32))
        return level * tl.load(factors + at // factor_group).to(tl.float32)
