"""FP8 against torch's own float8 casts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hfquant import HfQuantConfig, ops, use_kernel
from hfquant.errors import FormatError, SpecError
from hfquant.grids import grid
from hfquant.quantize import check_recipe, pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import TensorSpec
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant_fp8 import Float8, fp8

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
GRANULARITIES = ("channel", "tensor", "tile")
# Sides of the rectangles that share a scale, of the weight and of the input.
SIDES = {"channel": ((1, None), (1, None)), "tensor": ((None, None), (None, None)), "tile": ((128, 128), (1, 128))}

each_dtype = pytest.mark.parametrize("weights", DTYPES)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def cast(x: Tensor, sides: tuple[int | None, int | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition, block by block: float8 numbers of `x` [N, K], and the scale of each element [N, K]."""
    numbers, scales = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape)
    height, width = sides[0] or x.shape[0], sides[1] or x.shape[1]
    top = torch.finfo(dtype).max
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            where = slice(i, i + height), slice(j, j + width)
            scale = x[where].abs().max() / top
            numbers[where] = (x[where] / scale).clamp(-top, top).to(dtype)
            scales[where] = scale
    return numbers, scales


def weight_of(recipe: Recipe, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a weight, and what they stand for."""
    packed, spec = pack(quantize_linear(w, recipe), recipe)
    return packed, ops.dequantize(list(packed.values()), spec.key(), torch.float32)


def linear(recipe: Recipe, w: Tensor, x: Tensor) -> Tensor:
    packed, spec = pack(quantize_linear(w, recipe), recipe)
    return ops.linear(x, list(packed.values()), None, spec.key())


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values over several powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


# ---- numbers


@each_dtype
@each_granularity
def test_codes_are_torchs_own_float8_bit_for_bit(weights: str, granularity: str) -> None:
    w = random(200, 300)
    packed, dequantized = weight_of(fp8(weights=weights, granularity=granularity), w)
    numbers, scales = cast(w, SIDES[granularity][0], DTYPES[weights])
    assert packed["codes"].dtype == DTYPES[weights]
    same = packed["codes"].view(torch.uint8) == numbers.view(torch.uint8)
    assert (same | (numbers.float() == 0)).all()  # the sign of zero is not kept
    assert torch.equal(packed["codes"].float(), numbers.float())
    assert torch.equal(dequantized, numbers.float() * scales)


@each_granularity
def test_ragged_tiles_have_scales_of_their_own(granularity: str) -> None:
    packed, _ = weight_of(fp8(granularity=granularity), random(200, 300))
    assert packed["scale"].shape == {"channel": (200, 1), "tensor": (1, 1), "tile": (2, 3)}[granularity]
    assert packed["scale"].dtype == torch.float32


def assert_computes(recipe: Recipe, w: Tensor, x: Tensor, wanted: Tensor) -> None:
    """The definition to the last bit, and the kernel that is used but for the order of its float32 sums."""
    with use_kernel("reference"):
        assert torch.equal(linear(recipe, w, x), wanted)
    y = linear(recipe, w, x)
    assert (y - wanted).norm() <= 1e-6 * wanted.norm()


@each_dtype
@each_granularity
@pytest.mark.parametrize("shape", [(5, 300), (1, 128), (3, 129)])
def test_a_layer_computes_with_torchs_casts_of_both_sides(
    weights: str, granularity: str, shape: tuple[int, int]
) -> None:
    w, x = random(200, shape[1]), random(*shape, seed=1)
    of_weight, of_input = SIDES[granularity]
    (a, scale_a), (b, scale_b) = cast(x, of_input, DTYPES["e4m3"]), cast(w, of_weight, DTYPES[weights])
    assert_computes(
        fp8(weights=weights, granularity=granularity), w, x, F.linear(a.float() * scale_a, b.float() * scale_b)
    )


def test_inputs_can_be_left_alone_or_be_e5m2() -> None:
    w, x = random(64, 96), random(7, 96, seed=1)
    _, dequantized = weight_of(fp8(), w)
    assert_computes(fp8(activations=False), w, x, F.linear(x, dequantized))
    a, scale = cast(x, (1, None), torch.float8_e5m2)
    assert_computes(fp8(activations="e5m2"), w, x, F.linear(a.float() * scale, dequantized))


@each_dtype
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 6), granularity=st.sampled_from(GRANULARITIES))
@settings(max_examples=40, deadline=None)
def test_relative_error_is_half_a_mantissa_step(weights: str, seed: int, spread: float, granularity: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(9, 140, generator=generator) * (spread * torch.randn(9, 140, generator=generator)).exp()
    _, dequantized = weight_of(fp8(weights=weights, granularity=granularity), w)
    dtype = torch.finfo(DTYPES[weights])
    _, scale = cast(w, SIDES[granularity][0], DTYPES[weights])
    error, size = (dequantized.double() - w.double()).abs(), w.double().abs()
    rounding = 1 + 2.0**-20  # of the scale and of the quotient, in float32
    normal = size >= dtype.smallest_normal * scale.double()
    assert (error[normal] <= dtype.eps / 2 * size[normal] * rounding).all()
    below = dtype.smallest_normal * dtype.eps / 2 * scale.double() * rounding
    assert (error[~normal] <= below[~normal]).all()
    assert float(dtype.eps) / 2 == {"e4m3": 2.0**-4, "e5m2": 2.0**-3}[weights]


@each_dtype
@given(exponent=st.integers(-149, 127), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_largest_value_never_overflows(weights: str, exponent: int, seed: int) -> None:
    """Torch's cast to e4m3fn turns everything beyond 464 into NaN."""
    w = torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)).clamp(-1.9, 1.9)
    w = (w.double() * 2.0**exponent).float()
    for granularity in GRANULARITIES:
        packed, dequantized = weight_of(fp8(weights=weights, granularity=granularity), w)
        assert packed["codes"].float().isfinite().all()
        assert dequantized.isfinite().all()
        assert linear(fp8(weights=weights, granularity=granularity), torch.eye(33), w).isfinite().all()


@each_granularity
def test_an_overflow_stays_visible(granularity: str) -> None:
    w = random(8, 300)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = random(3, 300, seed=1)
        x[1, 5] = bad
        y = linear(fp8(granularity=granularity), w, x)
        assert y[1].isnan().all()
        if granularity != "tensor":
            assert y[[0, 2]].isfinite().all()


@each_granularity
def test_only_tensor_scales_let_tokens_of_a_call_touch_each_other(granularity: str) -> None:
    w, x = random(40, 300), random(4, 300, seed=1)
    louder = x.clone()
    louder[3] *= 100.0
    recipe = fp8(granularity=granularity)
    same = torch.equal(linear(recipe, w, x)[:3], linear(recipe, w, louder)[:3])
    assert same == (granularity != "tensor")


@each_granularity
def test_clipping_ranges_serve_float8_too(granularity: str) -> None:
    w = random(40, 300)
    plain, clipped = (weight_of(fp8(granularity=granularity, range=name), w)[1] for name in ("absmax", "mse"))
    assert (clipped - w).square().sum() <= (plain - w).square().sum()
    assert torch.equal(clipped, plain) == (granularity == "tensor")  # one value of 12,000 is not worth clipping for


# ---- layout


@pytest.mark.parametrize(("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2ieee", torch.float8_e5m2)])
def test_layout_holds_every_finite_number_and_inverts_itself(name: str, dtype: torch.dtype) -> None:
    numbers, layout = grid(name), Float8()
    codes = torch.arange(numbers.size).to(torch.uint8)[None]
    stored = layout.encode(codes, numbers)
    assert stored.dtype == dtype
    assert torch.equal(stored.float()[0], numbers.levels())
    assert torch.equal(layout.decode(stored, numbers, numbers.size), codes)
    patterns = torch.arange(256).to(torch.uint8).view(dtype)
    finite = patterns[patterns.float().isfinite()]
    assert set(finite.float().tolist()) == set(numbers.levels().tolist())
    assert torch.equal(
        layout.encode(layout.decode(finite[None], numbers, len(finite)), numbers)[0].float(), finite.float()
    )


def test_layout_refuses_what_it_cannot_hold() -> None:
    layout, blocks = Float8(), fp8().scheme.weight.blocks
    for name in ("int8", "e3m4", "e4m3", "nf4"):
        assert "float8 dtypes for e4m3fn and e5m2ieee only" in (layout.why_not(TensorSpec(name, blocks)) or "")
    with pytest.raises(SpecError, match="float8"):
        check_recipe(Recipe(HfQuantConfig("int8").recipe.scheme, layout="float8"))
    with pytest.raises(FormatError, match="float8_e5m2"):
        layout.decode(torch.zeros(2, 4, dtype=torch.float8_e5m2), grid("e4m3fn"), 4)


# ---- options


def test_defaults_are_channels_and_tokens() -> None:
    assert HfQuantConfig("fp8").recipe == fp8(weights="e4m3fn", granularity="channel", activations="e4m3")
    assert fp8(weights="e5m2") == fp8(weights="e5m2ieee")
    for granularity in GRANULARITIES:
        assert Recipe.from_dict(json.loads(json.dumps(fp8(granularity=granularity).to_dict()))) == fp8(
            granularity=granularity
        )


@pytest.mark.parametrize(
    "options",
    [{"weights": "e3m4"}, {"weights": True}, {"granularity": "group"}, {"activations": "int8"}, {"bits": 8}],
    ids=str,
)
def test_bad_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        HfQuantConfig("fp8", **options)


# ---- models


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**tiny_inputs(model)).logits


def load(folder: Path, like: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return type(like).from_pretrained(folder, **options).eval()


def quantize(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PreTrainedModel:
    """A tiny model, saved in full precision and loaded in FP8."""
    source = tiny_model(kind, dtype=dtype)
    source.save_pretrained(folder)
    return load(folder, source, dtype=dtype, quantization_config=HfQuantConfig("fp8", **options))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
@each_granularity
def test_save_and_reload_is_bit_identical(kind: str, granularity: str, tmp_path: Path) -> None:
    model = quantize(kind, tmp_path / "source", granularity=granularity)
    model.save_pretrained(tmp_path / "fp8")
    (file,) = (tmp_path / "fp8").glob("hfquant*.safetensors")
    with safe_open(file, framework="pt") as stored:
        codes = {stored.get_tensor(name).dtype for name in stored.keys() if name.endswith("codes")}  # noqa: SIM118
    assert codes == {torch.float8_e4m3fn}
    again = load(tmp_path / "fp8", model, device_map="cpu")
    assert torch.equal(logits(model), logits(again))


def test_moving_and_converting_leave_float8_and_scales_alone(tmp_path: Path) -> None:
    model = quantize("llama", tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change in (lambda m: m.to(torch.float16), lambda m: m.to(torch.float32), copy.deepcopy):
        model = change(model)
        for name, module in packed_modules(model):
            for leaf in module.spec.names:
                now, was = model.state_dict()[f"{name}.{leaf}"], before[f"{name}.{leaf}"]
                assert now.dtype == was.dtype
                assert torch.equal(now.view(torch.uint8), was.view(torch.uint8))
    assert logits(model).dtype == torch.float32


def test_embeddings_in_float8_still_generate(tmp_path: Path) -> None:
    model = quantize("llama", tmp_path, embeddings=True)
    assert model.get_input_embeddings()._parameters["codes"].dtype == torch.float8_e4m3fn
    rows = model.get_input_embeddings().weight
    ids = tiny_inputs(model)["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), rows[ids])
    out = model.generate(**tiny_inputs(model), max_new_tokens=4, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 4
    assert logits(model).dtype == torch.bfloat16


def test_lora_trains_and_merges(tmp_path: Path) -> None:
    model = quantize("llama", tmp_path, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    inputs = tiny_inputs(model)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all("lora_" in name for name in trained)
    # What merging must give: the same float8 numbers as quantizing the merged matrix.
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    wanted, _ = weight_of(fp8(), layer.base_layer.weight + layer.get_delta_weight("default"))
    merged = tuned.merge_and_unload().model.layers[0].self_attn.q_proj
    assert torch.equal(merged._parameters["codes"].float(), wanted["codes"].float())


# ---- a trained model


@each_granularity
def test_outlier_channels_hardly_matter(granularity: str, kl: Callable[..., float]) -> None:
    plain, injected = (kl(which, "fp8", granularity=granularity) for which in ("plain", "injected"))
    assert abs(injected / plain - 1) <= 0.20
    assert plain < 0.02


def test_more_mantissa_bits_are_closer(kl: Callable[..., float]) -> None:
    assert kl("plain", "fp8", activations=False) < kl("plain", "fp8") < kl("plain", "fp8", weights="e5m2")
