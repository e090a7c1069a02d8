"""Products of levels on a GPU are those of the quantized input and the dequantized weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfquant import reference
from hfquant.blocks import Blocks
from hfquant.gpu import inputs as gpu_inputs
from hfquant.kernel import choose
from hfquant.kernels.triton import levels
from hfquant.layouts import unpack_inputs
from hfquant.qtensor import InputParams, QTensor
from hfquant.spec import InputSpec, PackedSpec, Scheme, TensorSpec

from ..problems import DTYPES, WORST_INT, assert_close, drawn_bias, drawn_input, packed, random_weight
from .compiled import ATOMIC, TARGETS, Launch, recording
from .interpret import interpreted
from .products import as_if_on

EIGHT = ("e4m3fn", "e5m2ieee")
GRIDS = ("int4", "uint4", "int8", "int3", "e2m1", "e3m0", "e2m1b7", "e3m2b-4", "e4m3", "e2m5", "ue2m2", "e5m0b30")
WEIGHTS = (Blocks(1, -1), Blocks(-1, -1), Blocks(128, 128), Blocks(1, 32), Blocks(16, 64))
INPUTS = (Blocks(1, -1), Blocks(-1, -1), Blocks(1, 128), Blocks(1, 32))
ARCHITECTURES = ("none", "sm_80", "sm_90", "gfx942")

Problem = tuple[QTensor, str, InputSpec, InputParams | None, torch.Tensor, torch.Tensor | None]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A weight, its layout, how the input is quantized and its range if that is static, an input and a bias."""
    both = draw(st.sampled_from([EIGHT, (*GRIDS, *EIGHT)]))
    weight, seen = draw(st.sampled_from(both)), draw(st.sampled_from(both))
    shape = draw(st.integers(1, 70)), draw(st.one_of(st.integers(1, 300), st.sampled_from([128, 256])))
    how = draw(st.sampled_from(["float32", "bfloat16"]))
    seed = draw(st.integers(0, 2**31))
    q = random_weight(shape, TensorSpec(weight, draw(st.sampled_from(WEIGHTS)), scale=how), seed)
    other = "dense" if q.spec.numbers().bits < 8 else "float8" if weight in EIGHT else "bytes"
    layout = draw(st.sampled_from(["bytes", other, other, other]))
    dynamic = draw(st.integers(0, 4)) > 0
    input = InputSpec(TensorSpec(seen, draw(st.sampled_from(INPUTS)) if dynamic else Blocks(-1, -1)), dynamic)
    inputs = None if dynamic else InputParams(torch.tensor([draw(st.sampled_from([0.02, 0.3]))]))
    if input.tensor.blocks.cols == -1 and draw(st.booleans()):
        q = replace(q, order=torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)).int())
    dtype = draw(st.sampled_from(DTYPES))
    x = drawn_input(draw, draw(st.sampled_from([1, 2, 17, 70])), shape[1], dtype, seed + 1)
    return q, layout, input, inputs, x, drawn_bias(draw, shape[0], seed + 2)


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from(ARCHITECTURES))
def test_products(problem: Problem, architecture: str) -> None:
    """Float and integer grids of any bias, blocks of all shapes, layouts, ragged shapes, three ways to read float8."""
    q, layout, input, inputs, x, bias = problem
    tensors, spec = packed(q, layout, input, inputs)
    assert gpu_inputs.why_not_levels(spec, x.dtype, (8, 0)) is None
    seen = reference.quantize_input(x.float(), input, None, unpack_inputs(tensors, spec))
    with as_if_on(architecture), interpreted():
        y = gpu_inputs.run_levels(x, tensors, bias, spec)
    assert y.dtype == x.dtype
    assert_close(y, seen, q.dequantize(), bias, WORST_INT)


def test_a_single_row_that_was_cut_from_a_wider_tensor() -> None:
    """It has no gaps whatever its stride, which only its view as another type would look at."""
    q = random_weight((1, 9), TensorSpec("int3", Blocks(1, -1)), 0)
    tensors, spec = packed(q, "dense", InputSpec(TensorSpec("int4", Blocks(1, -1))))
    wide = torch.zeros(1, 6, dtype=torch.uint8)
    wide[:, :4] = tensors[0]
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    with interpreted():
        y = gpu_inputs.run_levels(x, [wide[:, :4], *tensors[1:]], None, spec)
    torch.testing.assert_close(y, reference.linear(x, tensors, None, spec))


@pytest.mark.parametrize("grid", EIGHT)
def test_halved_float8_is_half_of_every_level(grid: str) -> None:
    """Why AMD's float8 instructions of gfx942 give a quarter of the product; its only other zero stands for NaN."""
    dtype, halved = {"e4m3fn": (torch.float8_e4m3fn, torch.float8_e4m3fnuz)}.get(
        grid, (torch.float8_e5m2, torch.float8_e5m2fnuz)
    )
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(dtype).float()
    finite = numbers.isfinite() & (bits != 128)
    assert torch.equal(numbers[finite], 2 * bits.view(halved).float()[finite])


def test_values_that_are_not_finite_are_seen_in_their_row_alone() -> None:
    q = random_weight((20, 256), TensorSpec("e4m3fn", Blocks(128, 128)), 0)
    tensors, spec = packed(q, "float8", InputSpec(TensorSpec("e4m3fn", Blocks(1, 128))))
    x = torch.ones(3, 256)
    x[1, 5], x[2, 200] = float("nan"), float("inf")
    with as_if_on("sm_90"), interpreted():
        y = gpu_inputs.run_levels(x, tensors, None, spec)
    assert y[1:].isnan().all() and y[0].isfinite().all()


@pytest.mark.parametrize(
    ("weight", "blocks", "rows"),
    [
        ("e2m1", Blocks(1, -1), 1),
        ("e2m1", Blocks(1, 64), 40),
        ("e4m3fn", Blocks(1, -1), 1),
        ("e4m3fn", Blocks(128, 128), 40),
        ("int3", Blocks(1, 64), 1),
    ],
)
def test_columns_are_split_among_programs_and_summed_in_one_order(weight: str, blocks: Blocks, rows: int) -> None:
    """However the programs are scheduled, results are equal to the last bit, and those of one program nearly so."""
    q = random_weight((40, 1100), TensorSpec(weight, blocks), 0)
    layout = "float8" if weight == "e4m3fn" else "dense"
    tensors, spec = packed(q, layout, InputSpec(TensorSpec("e4m3fn", replace(blocks, rows=1))))
    x = torch.randn(rows, 1100, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2))
    with as_if_on("sm_90"), recording() as launches:
        gpu_inputs.run_levels(x, tensors, bias, spec)
    assert [launch.kernel for launch in launches[-2:]] == [levels.levels_kernel, levels.add_parts]
    assert launches[-2].grid[1] > 1
    with as_if_on("sm_90"), interpreted():
        y = gpu_inputs.run_levels(x, tensors, bias, spec)
    with as_if_on("sm_90"), interpreted(backwards=True):
        assert torch.equal(y, gpu_inputs.run_levels(x, tensors, bias, spec))
    seen = reference.quantize_input(x, spec.scheme.input, None)
    assert_close(y, seen, q.dequantize(), bias, WORST_INT)


def spec_of(weight: TensorSpec, input: InputSpec, layout: str = "bytes", **options: object) -> PackedSpec:
    given = {"names": ("codes", "scale"), **options}
    return PackedSpec(layout, (64, 256), Scheme(weight, input), **given)


def test_what_it_declines() -> None:
    """The reasons are true."""
    weight, token = TensorSpec("e2m1", Blocks(1, -1)), Blocks(1, -1)
    seen = InputSpec(TensorSpec("e2m1", token))

    def reason(spec: PackedSpec, dtype: torch.dtype = torch.bfloat16) -> str:
        return gpu_inputs.why_not_levels(spec, dtype, (9, 0)) or ""

    assert not reason(spec_of(weight, seen))
    assert "this layer nf4 and e2m1" in reason(spec_of(replace(weight, grid="nf4"), seen))
    assert "zero points" in reason(spec_of(TensorSpec("uint4", token, True), seen))
    assert "not quantized themselves" in reason(spec_of(replace(weight, scale=TensorSpec("e4m3", token)), seen))
    assert "float32 scales" in reason(spec_of(weight, InputSpec(replace(seen.tensor, scale="float16"))))
    assert "in floating point" in reason(spec_of(weight, replace(seen, split=6.0)))
    assert "groups of 32 columns" in reason(spec_of(replace(weight, blocks=Blocks(1, 48)), seen))
    assert "groups of 32 columns" in reason(spec_of(weight, InputSpec(TensorSpec("e2m1", Blocks(1, 16)))))
    grouped = InputSpec(TensorSpec("e2m1", Blocks(1, 32)))
    assert "another order" in reason(spec_of(weight, grouped, names=("codes", "scale", "order")))
    assert "for tokens" in reason(spec_of(weight, InputSpec(TensorSpec("e2m1", Blocks(8, -1)))))
    assert "layouts bytes, dense and float8" in reason(spec_of(weight, seen, "other"))
    assert "not torch.float64" in reason(spec_of(weight, seen), torch.float64)


@pytest.mark.parametrize(
    ("weight", "seen", "layout", "name"),
    [
        ("int8", "int8", "bytes", "triton_int8"),
        ("int4", "int8", "dense", "triton_int8"),
        ("int4", "e4m3fn", "dense", "triton_levels"),
        ("e4m3fn", "e4m3fn", "float8", "triton_levels"),
        ("e2m1", "e2m1", "dense", "triton_levels"),
        ("nf4", "int8", "dense", "reference"),
    ],
)
def test_which_kernel_is_chosen(
    weight: str, seen: str, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    token = Blocks(1, -1)
    spec = spec_of(TensorSpec(weight, token), InputSpec(TensorSpec(seen, token)), layout)
    for rotated in (False, True):
        dtype = torch.float32 if rotated else torch.bfloat16
        chosen = choose.__wrapped__(replace(spec, rotated=rotated).key(), torch.device("cuda"), dtype)
        assert chosen.name == name


def product(rows: int, weight: TensorSpec, layout: str, input: InputSpec, target: str) -> Launch:
    """The launch of the product of a layer with 4096 columns."""
    tensors, spec = packed(random_weight((4096, 4096), weight, 0), layout, input)
    with as_if_on(target), recording() as launches:
        levels.run(torch.empty(rows, 4096, dtype=torch.bfloat16), tensors, None, spec)
    return next(launch for launch in launches if launch.kernel is levels.levels_kernel)


FLOAT8 = {"sm_80": "HMMA.*BF16", "sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "v_mfma.*fp8_fp8"}
BFLOAT16 = {"sm_90": "HGMMA.*BF16", "sm_100": "UTCHMMA", "gfx942": "v_mfma.*bf16"}
WIDE = r"(LDG|LDGSTS)\.E.*\.128|(global|buffer)_load_dwordx[24]"
TILES = TensorSpec("e4m3fn", Blocks(128, 128)), "float8", InputSpec(TensorSpec("e4m3fn", Blocks(1, 128)))
CHANNELS = TensorSpec("e4m3fn", Blocks(1, -1)), "float8", InputSpec(TensorSpec("e4m3fn", Blocks(1, -1)))
FOUR = TensorSpec("e2m1", Blocks(1, -1)), "dense", InputSpec(TensorSpec("e2m1", Blocks(1, -1)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("rows", "layer", "matrix"),
    [(1, CHANNELS, FLOAT8), (4096, TILES, FLOAT8), (4096, FOUR, BFLOAT16)],
    ids=["channels", "tiles", "four bits"],
)
def test_machine_code(target: str, rows: int, layer: tuple, matrix: dict[str, str]) -> None:
    """The matrix instructions that are meant; no conversions of integers, and none at all of float8 numbers."""
    binary = product(rows, *layer, target).compile(target)
    assert binary.spilled == 0 and binary.shared <= (64 if target == "gfx942" else 99) << 10
    assert binary.count(matrix.get(target, "HMMA.*BF16")) and binary.count(WIDE)
    assert not binary.count("I2F|v_cvt_f32_[iu]", binary.loop)
    if matrix is FLOAT8 and target != "sm_80":
        assert not binary.count("F2F|v_cvt|LOP3.*0x7f", binary.loop)


@pytest.mark.parametrize("target", TARGETS)
def test_parts_are_added_without_atomics(target: str) -> None:
    tensors, spec = packed(random_weight((64, 4096), FOUR[0], 0), *FOUR[1:])
    with as_if_on(target), recording() as launches:
        levels.run(torch.empty(1, 4096, dtype=torch.bfloat16), tensors, None, spec)
    binary = launches[-1].compile(target)
    assert launches[-1].kernel is levels.add_parts and binary.spilled == 0
    assert not binary.count(ATOMIC) and binary.count(WIDE)
    if target in ("sm_90", "gfx942"):
        assert not launches[-2].compile(target).count(ATOMIC)
