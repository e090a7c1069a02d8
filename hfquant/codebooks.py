"""The codebooks that come with the library: NF4, bitsandbytes' FP4, dynamic exponent, and fitted quantiles."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SpecError
from .grids import Codebook, Grid

_SAMPLE = 1 << 20  # values a fitted codebook looks at: quantiles of a million values are exact enough


def nf4() -> Codebook:
    """NormalFloat-4: quantiles of a normal distribution, 8 levels above zero, 7 below. Source: QLoRA, appendix E.

    The published numbers and not the formula, whose last digits depend on the precision it is evaluated in: stored
    NF4 weights mean these numbers.
    """
    negative = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
    )
    positive = (
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
    return Codebook("nf4", (*negative, 0.0, *positive))


def fp4() -> Codebook:
    """bitsandbytes' FP4, which is not OCP E2M1: magnitudes {0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}."""
    magnitudes = [1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0]
    return Codebook("fp4", tuple([-x for x in reversed(magnitudes)] + [0.0] + magnitudes))


def dynamic_exponent(bits: int) -> Codebook:
    """Dynamic exponent data type of `bits` bits (3 to 8), magnitudes up to 1.

    The run of zeros after the sign counts decimal exponents, a one ends it, and the bits left form a linear fraction
    of [0.1, 1]. Source: Dettmers 2016 (8-bit approximations), figure 1; 8 bits equal bitsandbytes' signed map.
    """
    if not 3 <= bits <= 8:
        raise SpecError(f"dynamic exponent grids have 3 to 8 bits, got {bits}")
    magnitudes: list[float] = []
    for fraction_bits in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2**fraction_bits + 1, dtype=torch.float64, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2
        magnitudes += (10.0 ** (fraction_bits - bits + 2) * middles).tolist()
    magnitudes.sort()
    return Codebook(f"dyn{bits}", tuple([-x for x in reversed(magnitudes)] + [0.0, *magnitudes, 1.0]))


class FittedGrid(Grid):
    """A grid whose numbers depend on the tensor: `fit` gives the codebook, which is stored with the weight."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Storage width of the codebooks that `fit` gives."""

    @abstractmethod
    def fit(self, x: Tensor) -> Codebook:
        """The codebook for float32 values `x`, already divided by their scales."""

    def _levels(self) -> list[float]:
        raise SpecError(f"grid {self.name!r} has no levels before it is fitted to a tensor")


@dataclass(frozen=True)
class QuantileGrid(FittedGrid):
    """Levels at the medians of 2^bits bins that hold equally many values, the one nearest to zero moved to 0.

    Source: "The case for 4-bit precision" (Dettmers and Zettlemoyer 2023), section 2.1; one bit gives the quartiles.
    """

    width: int

    @property
    def name(self) -> str:
        """For example "quantile4"."""
        return f"quantile{self.width}"

    @property
    def bits(self) -> int:
        """Storage width."""
        return self.width

    def fit(self, x: Tensor) -> Codebook:
        """Empirical quantiles of `x`, normalised to a largest magnitude of 1 so that block maxima are on the grid."""
        levels = quantiles(x, self.width)
        levels /= levels.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        levels[levels.abs().argmin()] = 0.0
        numbers = set(levels.float().tolist())  # float32 first: what is unique must be unique as stored
        return Codebook(self.name, tuple(sorted(numbers if len(numbers) > 1 else {0.0, 1.0})))


def quantiles(x: Tensor, bits: int) -> Tensor:
    """Medians [2^bits] float64 of the equally filled bins of `x`, from at most a million evenly spaced values."""
    flat = x.flatten()
    # An odd stride: an even one would look at some columns only, as widths are multiples of powers of two.
    flat = flat[:: (flat.numel() // _SAMPLE) | 1].double().sort().values
    count = 2**bits
    where = (torch.arange(count, dtype=torch.float64, device=flat.device) + 0.5) / count * (flat.numel() - 1)
    low = where.floor().long()
    high = (low + 1).clamp_max(flat.numel() - 1)
    return torch.lerp(flat[low], flat[high], where - low)


BUILTIN: tuple[Grid, ...] = (
    nf4(),
    fp4(),
    *(dynamic_exponent(bits) for bits in range(3, 9)),
    *(QuantileGrid(bits) for bits in range(2, 9)),
)
