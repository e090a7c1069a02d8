"""A format is named only if it holds the weight exactly; torch's own dtypes and plain integers say whether it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfquant.blocks import Blocks
from hfquant.grids import grid
from hfquant.layouts import LAYOUTS, default_layout, packed_spec
from hfquant.qtensor import Outliers, QTensor
from hfquant.served_formats import exact_as
from hfquant.spec import PackedSpec, Scheme, TensorSpec

ROW, TENSOR = Blocks(1, -1), Blocks(-1, -1)
SCALES = TensorSpec("e4m3fn", ROW)  # of the scales: all of a matrix are one row


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def weight(spec: TensorSpec, seed: int = 0, shape: tuple[int, int] = (4, 64), **given: Tensor) -> QTensor:
    """A weight with random codes and scales."""
    count = spec.numbers().size
    codes = torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    scale = numbers(seed, *spec.blocks.counts(shape))
    return QTensor(**{"codes": codes, "scale": scale, "zero": None, "order": None, "spec": spec, **given})


def pack(q: QTensor, layout: str = "") -> tuple[PackedSpec, dict[str, Tensor]]:
    layout = layout or default_layout(q.spec)
    packed = LAYOUTS.get(layout).pack(q)
    return packed_spec(packed, layout, q.shape, Scheme(q.spec), q.rotated), packed


def told(q: QTensor, layout: str = "") -> str | None:
    spec, packed = pack(q, layout)
    return exact_as(spec, packed.get)


# ---- FP8


@pytest.mark.parametrize("blocks", [ROW, TENSOR, Blocks(128, 128)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("e4m3", torch.float8_e4m3fn, "FP8 E4M3"), ("e5m2", torch.float8_e5m2, "FP8 E5M2")],
)
@given(codes=st.lists(st.one_of(st.integers(0, 254), st.integers(10, 244)), min_size=1, max_size=8))
def test_fp8_is_named_exactly_if_torch_has_every_number(
    name: str, dtype: torch.dtype, expected: str, blocks: Blocks, codes: list[int]
) -> None:
    q = weight(TensorSpec(name, blocks), codes=torch.tensor([codes], dtype=torch.uint8), shape=(1, len(codes)))
    levels = grid(name).decode(q.codes)
    held = torch.equal(levels.to(dtype).float(), levels)
    assert told(q) == (expected if held else None)


@pytest.mark.parametrize("code", [0, 254])
def test_one_number_at_either_end_is_enough_to_say_no(code: int) -> None:
    q = weight(TensorSpec("e4m3", ROW))
    q.codes.clamp_(1, 253)
    assert told(q) == "FP8 E4M3"
    q.codes[3, 7] = code
    assert told(q) is None


def test_fp8_with_a_scale_for_a_group_is_not_served() -> None:
    for name in ("e4m3", "e4m3fn"):
        q = weight(TensorSpec(name, Blocks(1, 32)))
        q.codes.clamp_(1, 252)
        assert told(q, "bytes") is None


# ---- integers


@pytest.mark.parametrize("blocks", [ROW, TENSOR, Blocks(1, 16)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "top", "expected"), [("e1m2", 7, "INT4"), ("e1m6", 127, "INT8")])
def test_formats_with_one_exponent_bit_are_integers(
    name: str, top: int, expected: str, dtype: str, blocks: Blocks
) -> None:
    q = weight(TensorSpec(name, blocks, scale=dtype))
    q = replace(q, scale=q.scale.to(getattr(torch, dtype)))
    assert told(q) == expected
    integers = q.codes.int() - top
    assert integers.abs().max() <= top
    step = (q.scale.double() * 3.5 / 7 if top == 7 else q.scale.double() / 32).to(q.scale.dtype)
    assert torch.equal(integers * blocks.expand(step.float(), q.shape), q.dequantize())


def test_scales_that_cannot_be_halved_are_not_integers() -> None:
    smallest = torch.full((4, 1), 2.0**-24, dtype=torch.float16)  # the smallest subnormal number
    spec = TensorSpec("e1m2", ROW, scale="float16")
    assert told(weight(spec, scale=smallest)) is None and told(weight(spec, scale=2 * smallest)) == "INT4"


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_themselves(bits: int) -> None:
    for name in (f"int{bits}", f"int{bits}n"):
        assert told(weight(TensorSpec(name, Blocks(1, 32)))) == f"INT{bits}"
    zero = torch.ones(4, 2, dtype=torch.uint8)
    assert told(weight(TensorSpec(f"uint{bits}", Blocks(1, 32), zero=True), zero=zero)) == f"INT{bits} asymmetric"
    assert told(weight(TensorSpec(f"uint{bits}", Blocks(1, 32), zero="float32"), zero=zero.float())) is None


# ---- four-bit floats


def scaled(scale: Tensor, width: int) -> QTensor:
    shape = (scale.shape[0], scale.shape[1] * width)
    return weight(TensorSpec("e2m1", Blocks(1, width)), shape=shape, scale=scale)


@pytest.mark.parametrize("width", [32, 64])
@given(exponents=st.lists(st.integers(-149, 127), min_size=1, max_size=4), seed=st.none() | st.integers(0, 9))
def test_mxfp4_is_named_exactly_if_torch_has_every_scale(width: int, exponents: list[int], seed: int | None) -> None:
    scale = torch.tensor([exponents], dtype=torch.float64).exp2().float()
    if seed is not None:
        scale = scale * numbers(seed, 1, len(exponents))
    held = torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
    assert (told(scaled(scale, width)) == "MXFP4") == held


def test_e8m0_ends_before_float32_does() -> None:
    assert told(scaled(torch.tensor([[2.0**-127]]), 32)) == "MXFP4"
    assert told(scaled(torch.tensor([[2.0**-128, 1.0]]), 32)) is None


POSITIVE = [value for value in grid("e4m3fn").levels().tolist() if value > 0]


@pytest.mark.parametrize("width", [16, 48])
@given(
    chosen=st.lists(st.sampled_from(POSITIVE), min_size=2, max_size=8),
    factor=st.integers(1, 2**20),  # 20 bits and the 4 of E4M3 are those of a float32: the products are exact
    exponent=st.integers(-60, 60),
)
def test_nvfp4_is_named_for_e4m3_scales_times_one_number(
    width: int, chosen: list[float], factor: int, exponent: int
) -> None:
    scale = torch.tensor([chosen], dtype=torch.float64) * factor * 2.0**exponent
    assert torch.equal(scale.float().double(), scale)
    assert told(scaled(scale.float(), width)) == "NVFP4"
    # Ratios of numbers of 4 bits are further apart than one step of a float32.
    scale[0, 0] = torch.nextafter(scale[0, 0].float(), torch.tensor(torch.inf)).double()
    assert told(scaled(scale.float(), width)) is None


def test_scales_all_over_the_place_are_none_of_them() -> None:
    assert told(scaled(numbers(0, 64, 8), 16)) is None and told(scaled(numbers(0, 64, 8), 32)) is None
    assert told(scaled(torch.tensor([[448.0, 2.0**-10]]), 16)) is None  # further apart than E4M3 reaches
    assert told(scaled(torch.tensor([[448.0, 2.0**-9]]), 16)) == "NVFP4"


def test_each_expert_has_a_number_of_its_own() -> None:
    matrices = [torch.tensor([[1.0, 1.125], [3.0, 5.0]]) * factor for factor in (0.7, 1.1)]
    spec, packed = pack(scaled(matrices[0], 16))
    stacked = {"codes": torch.stack([packed["codes"]] * 2), "scale": torch.stack(matrices)}
    assert exact_as(spec, stacked.get) is None, "0.7 and 1.1 in float32 have too many bits"
    stacked["scale"] = torch.stack([matrices[0].new_tensor([[1.0, 1.125], [3.0, 5.0]]) * f for f in (0.75, 1.25)])
    assert exact_as(spec, stacked.get) == "NVFP4"
    assert told(scaled(torch.cat([stacked["scale"][0] * 3, stacked["scale"][1] * 5]), 16)) is None


def test_quantized_scales_are_those_of_nvfp4() -> None:
    def nested(spec: TensorSpec, width: int = 16, **given: Tensor) -> QTensor:
        blocks = Blocks(1, width)
        whole = TensorSpec("e2m1", blocks, scale=spec)
        count = blocks.counts((4, 64))[0] * blocks.counts((4, 64))[1]
        return weight(whole, scale=weight(spec, shape=(1, count), **given))

    assert told(nested(SCALES)) == "NVFP4"
    assert told(nested(TensorSpec("e4m3fn", ROW, scale="bfloat16"))) is None
    assert told(nested(TensorSpec("e4m3fn", Blocks(1, 4)))) is None, "several factors"
    assert told(nested(TensorSpec("int8", ROW))) is None
    assert told(nested(SCALES, 8)) is None
    codes = torch.full((1, 16), 253, dtype=torch.uint8)
    assert told(nested(TensorSpec("e4m3", ROW), codes=codes)) == "NVFP4"
    assert told(nested(TensorSpec("e4m3", ROW), codes=codes + 1)) is None


# ---- what no format has, and what is looked at


def test_what_formats_do_not_describe_is_none_of_them() -> None:
    q = weight(TensorSpec("int4", Blocks(1, 16)))
    assert told(q) == "INT4"
    kept = Outliers(torch.tensor([3], dtype=torch.int32), torch.ones(4, 1, dtype=torch.bfloat16))
    assert told(replace(q, outliers=kept)) is None
    assert told(replace(q, order=torch.arange(64, dtype=torch.int32).flip(0))) is None
    assert told(replace(q, rotated=True)) is None
    scales = TensorSpec("int8", Blocks(1, 256))
    double = replace(q.spec, scale=scales)
    assert told(weight(double, scale=weight(scales, shape=(1, 16)))) is None
    for name in ("nf4", "e3m0", "e2m0", "e3m2", "int3", "int5"):
        assert told(weight(TensorSpec(name, Blocks(1, 16)))) is None
    assert told(weight(TensorSpec("int4", Blocks(1, 48)))) is None, "the last group is smaller"
    assert told(weight(TensorSpec("int4", Blocks(2, 32)))) is None
    ones = torch.ones(4, 3)
    assert told(weight(TensorSpec("e2m1", Blocks(1, 24)), scale=ones)) is None
    assert told(weight(TensorSpec("e2m1", Blocks(1, 16)), shape=(4, 40), scale=ones)) is None


@pytest.mark.parametrize(
    ("name", "read"), [("int4", []), ("e4m3fn", []), ("e4m3", ["codes"]), ("e1m2", ["scale"]), ("e2m1", ["scale"])]
)
def test_only_what_matters_is_read_and_without_it_nothing_is_claimed(name: str, read: list[str]) -> None:
    q = weight(TensorSpec(name, ROW), scale=torch.ones(4, 1))
    q.codes.clamp_(1, 250)
    spec, packed = pack(q, "bytes")
    asked: list[str] = []

    def look(tensor: str) -> Tensor | None:
        asked.append(tensor)
        return packed[tensor]

    assert exact_as(spec, look) is not None and asked == read
    assert (exact_as(spec, lambda _: None) is None) == bool(read)
