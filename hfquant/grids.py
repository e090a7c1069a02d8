"""Grids: which numbers exist. Every grid of at most 8 bits is a sorted list of at most 256 numbers, zero included."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import FormatError, SpecError
from .tables import Table

GRIDS: Table[Grid] = Table("grid")

_MANTISSA, _BIAS = 23, 127  # of float32
_EXPONENT, _HALF = 0x7F800000, 0x400000  # bits of the exponent, and of one half in the mantissa


class Grid(ABC):
    """A finite set of numbers; `name` is its identity on disk."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Identity on disk, such as "int4", "e2m1" or "nf4"."""

    @abstractmethod
    def _levels(self) -> list[float]:
        """The numbers, sorted and unique."""

    def levels(self) -> Tensor:
        """All levels [L] float32, sorted and unique, L <= 256."""
        return _levels(self)

    @property
    def size(self) -> int:
        """Number of levels L."""
        return self.levels().numel()

    @property
    def bits(self) -> int:
        """Bits needed to store one code."""
        return max(1, (self.size - 1).bit_length())

    @property
    def zero_code(self) -> int:
        """Code of the level 0."""
        return int(self.levels().abs().argmin())

    @property
    def top(self) -> float:
        """Largest level: an absmax range maps the largest magnitude here."""
        return float(self.levels()[-1])

    @property
    def signed(self) -> bool:
        """Whether there are negative levels."""
        return float(self.levels()[0]) < 0

    @property
    def affine(self) -> bool:
        """Whether the levels are consecutive integers, so that kernels can decode by arithmetic."""
        return isinstance(self, IntGrid)

    def encode(self, x: Tensor) -> Tensor:
        """Codes [same shape] uint8 of the level nearest to float32 `x` (already divided by the scale), ties to even.

        "Even" counts from zero, as in IEEE 754: codes an even number of steps away from the code of 0 win.
        """
        return torch.bucketize(x, thresholds(self).to(x.device), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels [same shape] of uint8 `codes` in `dtype`."""
        return self.levels().to(codes.device, dtype)[codes.int()]

    def nearest(self, x: Tensor) -> Tensor:
        """Levels [same shape] float32 nearest to float32 `x`: `decode(encode(x))`, except for signs of 0."""
        return self.decode(self.encode(x))


@lru_cache(maxsize=256)
def _levels(grid: Grid) -> Tensor:
    # On the CPU also where models are made on another device: what is cached would have no values on "meta".
    return torch.tensor(grid._levels(), dtype=torch.float64, device="cpu").to(torch.float32)


@lru_cache(maxsize=256)
def thresholds(grid: Grid) -> Tensor:
    """Largest float32 numbers [L - 1] that still belong to the lower of two neighbouring codes.

    `bucketize` gives a value equal to a threshold to the lower code. The middle of two levels is rounded down to
    float32, since rounding it up would give the lower code a number nearer to the upper one. Where the middle is a
    float32 number itself and the upper code is the even one, the threshold moves one ulp down: the tie goes up.
    """
    levels = grid.levels().double()
    middle = (levels[:-1] + levels[1:]) / 2
    threshold = middle.float()
    upper_is_even = (torch.arange(1, levels.numel(), device="cpu") - grid.zero_code) % 2 == 0
    too_high = (threshold.double() > middle) | ((threshold.double() == middle) & upper_is_even)
    return torch.where(too_high, torch.nextafter(threshold, torch.full_like(threshold, -torch.inf)), threshold)


@dataclass(frozen=True)
class IntGrid(Grid):
    """Consecutive integers: signed [-2^(b-1), 2^(b-1) - 1], narrow without the lowest one, unsigned [0, 2^b - 1]."""

    width: int
    is_signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise SpecError(f"integer grids have 2 to 8 bits, got {self.width}")
        if self.narrow and not self.is_signed:
            raise SpecError("only signed integer grids can be narrow")

    @property
    def name(self) -> str:
        """For example "int4", "int4n" (narrow) or "uint4"."""
        return f"{'int' if self.is_signed else 'uint'}{self.width}{'n' if self.narrow else ''}"

    def _levels(self) -> list[float]:
        low = (-(2 ** (self.width - 1)) + int(self.narrow)) if self.is_signed else 0
        high = 2 ** (self.width - 1) - 1 if self.is_signed else 2**self.width - 1
        return [float(value) for value in range(low, high + 1)]

    def encode(self, x: Tensor) -> Tensor:
        """Codes [same shape] uint8 by arithmetic; the same result as the general search, faster."""
        return self.nearest(x).sub_(float(self.levels()[0])).to(torch.uint8)

    def nearest(self, x: Tensor) -> Tensor:
        """Levels [same shape] float32 nearest to float32 `x`."""
        return x.round().clamp_(float(self.levels()[0]), self.top)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Sign, `e` exponent and `m` mantissa bits with subnormals, 3 to 8 bits in all; unsigned ones have no sign.

    `specials`: "none" gives every code a finite value (FPQ, LLM-FP4 eq. 1), "fn" reserves the top code for NaN
    (OCP E4M3, `torch.float8_e4m3fn`), "ieee" reserves the top exponent (`torch.float8_e5m2`).
    """

    e: int
    m: int
    bias: int | None = None
    specials: str = "none"
    is_signed: bool = True

    def __post_init__(self) -> None:
        if self.e < 1 or self.m < 0 or not 3 <= self.bits <= 8:
            raise SpecError(f"float grids have 3 to 8 bits with at least one exponent bit, got e{self.e}m{self.m}")
        if self.specials != "none" and not self.is_signed:
            raise SpecError(f"unsigned float grids have no special values, got {self.specials!r}")
        if self.specials not in ("none", "fn", "ieee"):
            raise SpecError(f'specials is "none", "fn" or "ieee", got {self.specials!r}')
        lowest, highest = 1 - self.exponent_bias - self.m, 2**self.e - 1 - self.exponent_bias
        if lowest < -125 or highest > 126:
            raise SpecError(
                f"levels of {self.name} reach from 2^{lowest} to 2^{highest}, float32 holds 2^-125 to 2^126: "
                "choose another bias and put the factor into the scale"
            )

    @property
    def name(self) -> str:
        """For example "e2m1", "e4m3fn", "e5m2ieee", "e4m3b11" (exponent bias 11), "ue2m2" (unsigned)."""
        suffix = "" if self.specials == "none" else self.specials
        return (
            f"{'' if self.is_signed else 'u'}e{self.e}m{self.m}{suffix}{'' if self.bias is None else f'b{self.bias}'}"
        )

    @property
    def bits(self) -> int:
        """Storage width, sign included."""
        return int(self.is_signed) + self.e + self.m

    @property
    def exponent_bias(self) -> int:
        """The bias in use: `bias`, or IEEE's 2^(e-1) - 1."""
        return 2 ** (self.e - 1) - 1 if self.bias is None else self.bias

    def _magnitudes(self) -> list[float]:
        """Finite magnitudes in the order of their bit patterns."""
        reserved = {"none": 0, "fn": 1, "ieee": 2**self.m}[self.specials]
        values = []
        for pattern in range(2 ** (self.e + self.m) - reserved):
            exponent, mantissa = divmod(pattern, 2**self.m)
            binade = max(exponent, 1)  # exponent 0 holds the subnormals, with the step of exponent 1
            implicit = 2**self.m if exponent else 0
            values.append((implicit + mantissa) * 2.0 ** (binade - self.exponent_bias - self.m))
        return values

    def _levels(self) -> list[float]:
        positive = self._magnitudes()
        return ([-value for value in reversed(positive[1:])] if self.is_signed else []) + positive

    def encode(self, x: Tensor) -> Tensor:
        """Codes [same shape] uint8 by arithmetic on the bits; the same result as the general search, faster."""
        level = self.nearest(x)
        magnitude = level.abs()
        normal = (magnitude.view(torch.int32) >> (_MANTISSA - self.m)).sub_((_BIAS - self.exponent_bias) << self.m)
        subnormal = (magnitude * 2.0 ** (self.exponent_bias + self.m - 1)).to(torch.int32)
        most = self.size - 1 - self.zero_code
        steps = torch.where(magnitude < self._tiny, subnormal, normal).clamp_max_(most)  # NaN has more
        sign = (level < 0).to(torch.int32).neg_()
        return (steps ^ sign).sub_(sign).add_(self.zero_code).to(torch.uint8)

    def nearest(self, x: Tensor) -> Tensor:
        """Levels [same shape] float32 nearest to float32 `x`; NaN stays NaN."""
        x = x.clamp(-self.top if self.is_signed else 0.0, self.top)
        if self.m == 0:
            return self._nearest_power(x)
        # Adding 1.5 * 2^23 steps leaves a float32 no bits below one step, so it rounds there, ties to even. The power
        # of two at or below x says how large a step is; subnormals have the step of the smallest normal number.
        binade = (x.view(torch.int32) & _EXPONENT).clamp_min_((_BIAS + 1 - self.exponent_bias) << _MANTISSA)
        shifter = binade.add_(((_MANTISSA - self.m) << _MANTISSA) + _HALF).view(torch.float32)
        return x.add_(shifter).sub_(shifter)

    def _nearest_power(self, x: Tensor) -> Tensor:
        """The same without mantissa bits: in the middle of two powers of two, the one with the even code."""
        magnitude = x.abs()
        bits = magnitude.view(torch.int32)
        odd = ((bits >> _MANTISSA) + (1 + self.exponent_bias)) & 1
        power = (bits + odd.add_(_HALF - 1)).bitwise_and_(_EXPONENT).view(torch.float32)
        power = power.clamp_min_(self._tiny).masked_fill_(magnitude <= self._tiny / 2, 0)
        return power.copysign_(x).add_(x - x)  # NaN stays NaN

    @property
    def _tiny(self) -> float:
        """Smallest normal number."""
        return 2.0 ** (1 - self.exponent_bias)

    def to_bits(self, codes: Tensor) -> Tensor:
        """Sign-magnitude bit patterns [same shape] uint8 of `codes`; zero becomes +0."""
        step = codes.short() - self.zero_code  # never negative without a sign
        return (step.abs() | ((step < 0).short() << (self.e + self.m))).to(torch.uint8)

    def from_bits(self, patterns: Tensor) -> Tensor:
        """Codes [same shape] uint8 of sign-magnitude bit patterns; the inverse of `to_bits`, both zeros accepted.

        Raises FormatError for patterns that stand for NaN or infinity: no code does.
        """
        sign = 1 << (self.e + self.m) if self.is_signed else 0
        magnitude = (patterns & (sign - 1) if sign else patterns).short()
        if self.specials != "none" and not patterns.is_meta and (bad := int((magnitude > self.zero_code).sum())):
            raise FormatError(
                f"{bad} of {patterns.numel()} values in {self.name} are NaN or infinite: weights are finite"
            )
        return torch.where(patterns & sign != 0, self.zero_code - magnitude, self.zero_code + magnitude).to(torch.uint8)


@dataclass(frozen=True)
class Codebook(Grid):
    """Any set of at most 256 numbers, zero among them, decoded by lookup."""

    label: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.values) <= 256 or 0.0 not in self.values:
            raise SpecError(f"codebook {self.label!r} needs 2 to 256 values with 0 among them")
        if list(self.values) != sorted(set(self.values)):
            raise SpecError(f"codebook {self.label!r} must be sorted without repeats")

    @property
    def name(self) -> str:
        """The label it was made with."""
        return self.label

    def _levels(self) -> list[float]:
        return list(self.values)


_INT = re.compile(r"(u?)int([2-8])(n?)")
_FLOAT = re.compile(r"(u?)e(\d)m(\d)(fn|ieee)?(?:b(-?\d+))?")


@lru_cache(maxsize=256)
def by_pattern(name: str) -> Grid | None:
    """The integer or float grid that a name spells out, or None."""
    if match := _INT.fullmatch(name):
        return IntGrid(int(match[2]), is_signed=not match[1], narrow=bool(match[3]))
    if match := _FLOAT.fullmatch(name):
        bias = int(match[5]) if match[5] else None
        return FloatGrid(int(match[2]), int(match[3]), bias, match[4] or "none", is_signed=not match[1])
    return None


def grid(name: str) -> Grid:
    """The grid of a name: "int4", "uint4", "e2m1", or one registered, such as "nf4". Raises SpecError if unknown."""
    return by_pattern(name) or GRIDS.get(name)
