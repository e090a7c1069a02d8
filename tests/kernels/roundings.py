"""Matrices and what they are rounded to: what compiled rounding is tried on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.codebooks import FittedGrid
from hfquant.compiled import Parameters
from hfquant.grids import GRIDS, Codebook, Grid, IntGrid, grid
from hfquant.kernel import use_kernel
from hfquant.scales import encode, round_to

from .problems import DTYPES
from .problems import GRIDS as PATTERNS

UNSIGNED = ("ue2m2", "ue1m2", "ue4m4", "ue3m0", "e3m0b2", "e5m2", "e6m1", "e7m0", "e1m6")
FITTED = (-3.0, -1.0, -0.25, 0.0, 1e-30, 0.5, 2.0)  # any count of levels
NAMES = (*PATTERNS, *UNSIGNED, *(name for name in GRIDS.names() if not isinstance(grid(name), FittedGrid)))


def numbers(grid: Grid, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Levels, the middles between them, their neighbours, any bit pattern, and what is no number."""
    levels = grid.levels()
    middle = ((levels[:-1].double() + levels[1:].double()) / 2).float()
    points = torch.cat([levels, middle, torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])])
    count = shape[0] * shape[1]
    x = points[torch.randint(len(points), (count,), generator=generator)]
    kind = torch.randint(5, (count,), generator=generator)
    x = torch.where(kind == 1, torch.nextafter(x, torch.tensor(torch.inf)), x)
    x = torch.where(kind == 2, torch.nextafter(x, torch.tensor(-torch.inf)), x)
    x = torch.where(kind == 3, torch.randn(count, generator=generator) * grid.top, x)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    return torch.where(kind == 4, bits, x).reshape(shape)


@st.composite
def roundings(draw: st.DrawFn, real_zeros: bool = False) -> tuple[Tensor, Parameters]:
    """A matrix, not always without gaps between rows, and what it is rounded to, with real zero points if asked."""
    book = draw(st.booleans()) and draw(st.booleans())
    to = Codebook("book", FITTED[draw(st.integers(0, 3)) :]) if book else grid(draw(st.sampled_from(NAMES)))
    to = grid(draw(st.sampled_from(["uint2", "uint4", "uint8"]))) if real_zeros else to
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 9)), draw(st.one_of(st.integers(1, 70), st.integers(500, 1100)))
    blocks = Blocks(draw(st.sampled_from([1, 2, 3, -1])), draw(st.sampled_from([1, 3, 12, 16, 32, 100, -1])))
    counts = blocks.counts(shape)
    scale = torch.ones(counts) if draw(st.booleans()) else torch.randn(counts, generator=generator).exp()
    if draw(st.booleans()):
        scale.view(-1)[0] = draw(st.sampled_from([torch.nan, torch.inf, 1e-38, 1e38]))
    asymmetric = isinstance(to, IntGrid) and not to.is_signed and draw(st.booleans())
    zero = torch.randint(to.size, counts, generator=generator).float() if asymmetric else None
    x = numbers(to, (shape[0], shape[1] + draw(st.sampled_from([0, 3]))), generator)[:, : shape[1]]
    if real_zeros:
        zero = draw(st.sampled_from([0.5, 20.0, 1e4, 5e6, 1e9])) * torch.randn(counts, generator=generator)
        x.sub_(blocks.expand(zero, shape)).mul_(blocks.expand(scale, shape))  # so that all codes are met
    return x.to(draw(st.sampled_from(DTYPES))), Parameters(to, scale, zero, blocks.sides(shape))


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal, signs of 0 and places of NaN included."""
    bad = wanted.isnan()
    same = torch.equal(found.isnan(), bad) and torch.equal(found.signbit()[~bad], wanted.signbit()[~bad])
    return same and torch.equal(found.nan_to_num(), wanted.nan_to_num())


def defined(x: Tensor, to: Parameters) -> tuple[Tensor, Tensor]:
    """Codes and values that torch gives, which are what rounding is."""
    blocks, shape = Blocks(*to.sides), (x.shape[0], x.shape[1])
    scale, zero = (None if given is None else blocks.expand(given, shape) for given in (to.scale, to.zero))
    assert scale is not None
    with use_kernel("reference"):
        return encode(x.float(), scale, zero, to.grid), round_to(x.float(), scale, zero, to.grid)
