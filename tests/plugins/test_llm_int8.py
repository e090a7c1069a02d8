"""LLM.int8 against integer arithmetic, full precision, bitsandbytes and itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfquant import HfQuantConfig, ops, use_kernel
from hfquant.errors import SpecError
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.stats import Stats
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant_llm_int8 import find_outliers, keep_columns, llm_int8

INT8 = llm_int8().scheme.weight
LAYER = "layer"
seeds = st.integers(0, 2**31)


def linear(recipe: Recipe, w: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    packed, spec = pack(quantize_linear(w, recipe, Stats(LAYER)), recipe)
    return ops.linear(x, list(packed.values()), bias, spec.key())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: integers [N, K] int32 and the real size of one step [N, 1]."""
    step = x.abs().amax(1, keepdim=True) / 127
    step = torch.where(step > 0, step, 1.0)
    return (x / step).round().int(), step


def vector_wise(w: Tensor, x: Tensor) -> Tensor:
    """x W^T [T, N] with int8 on both sides and an int32 accumulator."""
    (a, step_a), (b, step_b) = rows_to_int8(x), rows_to_int8(w)
    return (a @ b.T).float() * step_a * step_b.T


def on_a_grid(*shape: int, seed: int = 0) -> Tensor:
    """Rows of integers up to exactly 127, times a power of two: int8 holds them without error."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator).float()
    values[:, 0] = 127
    return values * torch.exp2(torch.randint(-9, 1, (shape[0], 1), generator=generator).float())


def with_outliers(x: Tensor, columns: list[int], size: float = 20.0) -> Tensor:
    """A copy of `x` [T, K] with large values of both signs in some columns."""
    sign = torch.where(torch.arange(x.shape[0]) % 2 == 0, 1.0, -1.0)
    return x.index_copy(1, torch.tensor(columns, dtype=torch.int64), (sign * size)[:, None].expand(-1, len(columns)))


def shrink(w: Tensor, columns: list[int], factor: float = 64.0) -> Tensor:
    """A copy of `w` [N, K] whose `columns` are `factor` times smaller."""
    return w.index_copy(1, torch.tensor(columns), w[:, columns] / factor)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- what a layer computes


@pytest.mark.parametrize("threshold", [None, math.inf])
def test_without_a_threshold_it_is_integer_arithmetic(threshold: float | None) -> None:
    recipe = llm_int8(threshold=threshold)
    w, x = on_a_grid(48, 200), on_a_grid(9, 200, seed=1)
    assert torch.equal(linear(recipe, w, x), vector_wise(w, x))  # all sums are exact, in any order
    assert torch.equal(linear(recipe, w, x), F.linear(x.double(), w.double()).float())
    w, x = normal(48, 200), with_outliers(normal(9, 200, seed=1), [3, 77])
    torch.testing.assert_close(linear(recipe, w, x), vector_wise(w, x), rtol=1e-5, atol=1e-5)


def test_threshold_zero_is_full_precision() -> None:
    w, x, bias = normal(48, 200), with_outliers(normal(9, 200, seed=1), [3]), normal(48, seed=2)
    for weight, offset in ((w.bfloat16(), bias), (w.half(), None)):
        exact = F.linear(x, weight.float(), offset)
        with use_kernel("reference"):
            assert torch.equal(linear(llm_int8(threshold=0), weight, x, offset), exact)
        torch.testing.assert_close(linear(llm_int8(threshold=0), weight, x, offset), exact, rtol=1e-5, atol=1e-5)


@given(seed=seeds, threshold=st.floats(0.5, 30), columns=st.sets(st.integers(0, 59), max_size=7))
@settings(max_examples=40, deadline=None)
def test_the_split_is_the_sum_of_both_parts(seed: int, threshold: float, columns: set[int]) -> None:
    w, x = normal(20, 60, seed=seed), with_outliers(normal(6, 60, seed=seed + 1), sorted(columns))
    outlier = (x.abs() >= threshold).any(0)
    codes, step = rows_to_int8(w)
    outliers_in_float = (x * outlier).double() @ (codes.double() * step.double()).T
    wanted = vector_wise(w, x * ~outlier) + outliers_in_float.float()
    torch.testing.assert_close(linear(llm_int8(threshold=threshold), w, x), wanted, rtol=1e-5, atol=1e-4)


@given(seed=seeds, columns=st.sets(st.integers(0, 59), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_kept_columns_are_computed_in_16_bit(seed: int, columns: set[int]) -> None:
    """Also when their inputs are small, as all of these are."""
    chosen = sorted(columns)
    w, x = normal(20, 60, seed=seed).bfloat16(), normal(6, 60, seed=seed + 1)
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, torch.tensor(chosen), False)
    wanted = vector_wise(w.float() * rest, x * rest) + F.linear(x[:, chosen], w[:, chosen].float())
    recipe = llm_int8(outliers={LAYER: chosen})
    torch.testing.assert_close(linear(recipe, w, x), wanted, rtol=1e-5, atol=1e-4)


def test_nothing_to_split_changes_nothing() -> None:
    w, x = normal(20, 60), normal(6, 60, seed=1)
    assert x.abs().max() < 6
    assert torch.equal(linear(llm_int8(), w, x), linear(llm_int8(threshold=None), w, x))
    assert torch.equal(linear(llm_int8(outliers={LAYER: []}), w, x), linear(llm_int8(threshold=None), w, x))


def test_small_columns_with_large_inputs_need_16_bit_weights() -> None:
    """Outliers in the input whose weights int8 rounds away: splitting the input alone does not help."""
    columns = [4, 70, 111]
    w = shrink(normal(96, 256), columns).bfloat16()
    x = normal(32, 256, seed=1)
    x[:, columns] *= 64
    exact = F.linear(x, w.float())
    naive = relative(linear(llm_int8(threshold=None), w, x), exact)
    codes, step = rows_to_int8(w.float())
    weights_in_int8 = F.linear(x, codes * step)
    assert relative(linear(llm_int8(), w, x), exact) < 0.02
    assert relative(weights_in_int8, exact) > 0.05
    assert naive > 0.05


@pytest.mark.parametrize("options", [{"threshold": None}, {}, {"outliers": {LAYER: [2]}}], ids=str)
def test_an_overflow_stays_visible(options: dict[str, Any]) -> None:
    w = normal(8, 60)
    for bad in (torch.nan, torch.inf):
        x = normal(3, 60, seed=1)
        x[1, 5] = bad
        y = linear(llm_int8(**options), w, x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


# ---- bitsandbytes


def peer(w: Tensor, threshold: float) -> nn.Module:
    """bitsandbytes' layer on the CPU."""
    layer = bitsandbytes.nn.Linear8bitLt(
        w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bitsandbytes.nn.Int8Params(w.half(), requires_grad=False).to("cpu")
    return layer.eval()


def test_codes_and_scales_are_bitsandbytes_own() -> None:
    w = normal(64, 256).half()
    layer, packed = peer(w, 6.0), pack(quantize_linear(w, llm_int8()), llm_int8())[0]
    assert torch.equal(packed["scale"].flatten(), layer.weight.SCB / 127)
    difference = (packed["codes"].int() - 128) - layer.weight.CB.int()
    assert difference.abs().max() <= 1  # w * (127 / absmax) and w / (absmax / 127) differ in the last bit: ties
    assert (difference != 0).float().mean() < 1e-3
    exact = on_a_grid(64, 256).half()
    packed = pack(quantize_linear(exact, llm_int8()), llm_int8())[0]
    assert torch.equal(packed["codes"].int() - 128, peer(exact, 6.0).weight.CB.int())


@torch.no_grad()
@pytest.mark.parametrize("columns", [[], [5], [5, 100, 201]], ids=str)
def test_outputs_agree_with_bitsandbytes(columns: list[int]) -> None:
    w = on_a_grid(64, 256).half()
    x = with_outliers(normal(10, 256, seed=1), columns).half()
    ours = linear(llm_int8(), w, x)
    theirs = peer(w, 6.0)(x)
    # Half precision outputs, and their 1 / 127^2 is 1.8e-5 too large.
    assert ours.dtype == theirs.dtype == torch.float16
    assert relative(ours.float(), theirs.float()) < 1e-3
    quantization = relative(ours.float(), F.linear(x.float(), w.float()))
    assert 2e-3 < quantization < 2e-2, "the comparison above must be finer than what is compared"


# ---- which columns are kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_int8_cannot_hold_are_found(dtype: torch.dtype) -> None:
    w = normal(128, 256).to(dtype)
    assert keep_columns(w, INT8, Stats()).tolist() == []
    assert keep_columns(shrink(w, [0, 9, 255]), INT8, Stats()).tolist() == [0, 9, 255]
    assert keep_columns(w, INT8, Stats(), every=True).tolist() == list(range(256))


@given(seed=seeds, spread=st.floats(0, 5), exponent=st.integers(-60, 60))
@settings(max_examples=40, deadline=None)
def test_the_choice_follows_columns_and_ignores_rows_and_size(seed: int, spread: float, exponent: int) -> None:
    w = normal(24, 40, seed=seed) * (spread * normal(1, 40, seed=seed + 1)).exp()
    kept = keep_columns(w, INT8, Stats())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    moved = keep_columns(w[:, order], INT8, Stats())
    assert sorted(order[moved].tolist()) == kept.tolist()
    assert torch.equal(keep_columns(w.flip(0) * 2.0**exponent, INT8, Stats()), kept)
    assert len(kept) < 20, "fewer than half"


def test_empty_columns_and_spoiled_rows_are_not_a_matter_of_columns() -> None:
    w = normal(64, 96)
    w[:, 7] = 0
    assert keep_columns(w, INT8, Stats()).tolist() == []
    assert keep_columns(torch.zeros(4, 8), INT8, Stats()).tolist() == []
    w[:, 20] = 1000.0  # every other column rounds to nothing
    assert keep_columns(w, INT8, Stats()).tolist() == []


def test_exactly_the_injected_channels_are_kept(
    trained: dict[str, Path], quantized: Callable[..., PreTrainedModel]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(trained["plain"])
    injected = AutoModelForCausalLM.from_pretrained(trained["injected"])
    gains = plain.model.layers[0].input_layernorm.weight, injected.model.layers[0].input_layernorm.weight
    channels = (gains[1] / gains[0] == 64).nonzero().flatten().tolist()
    assert len(channels) == 4
    for name, module in packed_modules(quantized("injected", "llm_int8")):
        kept = module._parameters.get("outlier_index")
        reads_a_norm = not name.endswith(("o_proj", "down_proj"))
        assert (kept is not None) == reads_a_norm, name
        assert kept is None or kept.tolist() == channels, name
    kept_in_plain = quantized("plain", "llm_int8").config.quantization_config.outlier_columns
    assert sum(kept_in_plain.values()) <= 8


def test_calibrated_columns_join_those_that_int8_cannot_hold() -> None:
    w = shrink(normal(64, 96), [50])
    assert keep_columns(w, INT8, Stats(LAYER), outliers={LAYER: [7, 3], "other": [1]}).tolist() == [3, 7, 50]
    assert keep_columns(w, INT8, Stats(f"{LAYER}[2]"), outliers={LAYER: [7]}).tolist() == [7, 50]
    with pytest.raises(SpecError, match=r"no entry for layer"):
        keep_columns(w, INT8, Stats(LAYER), outliers={"model.layer": [3]})
    for column in (-1, 96):
        with pytest.raises(SpecError, match="columns 0 to 95"):
            keep_columns(w, INT8, Stats(LAYER), outliers={LAYER: [column]})


# ---- calibration


class Twice(nn.Module):
    """Calls one layer twice, once by keyword; dropout would hide outliers in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.diag(torch.tensor([1.0, 5.9, -6.0, 40.0])))
        self.drop = nn.Dropout(0.999)
        self.shared, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.shared.weight)
        nn.init.constant_(self.shared.bias, 7.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.embed(ids))
        return self.shared(input=self.shared(x) * torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_find_outliers_sees_every_call_and_leaves_no_trace() -> None:
    model = Twice().train()
    assert find_outliers(model, [torch.tensor([[0, 1]])]) == {"shared": [0]}
    assert find_outliers(model, [torch.tensor([[0, 1]]), torch.tensor([[2]])]) == {"shared": [0, 2]}
    assert find_outliers(model, [{"ids": torch.tensor([[3]])}], threshold=30) == {"shared": [3]}
    assert model.training and model.drop.training
    assert not model.shared._forward_pre_hooks
    with pytest.raises(SpecError, match="no linear layer"):
        find_outliers(model, [])
    for threshold in (0, -1.0, math.nan):
        with pytest.raises(SpecError, match="threshold"):
            find_outliers(model, [torch.tensor([[0]])], threshold=threshold)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_found_outliers_are_the_columns_that_layers_see(kind: str) -> None:
    model = tiny_model(kind)
    ids = tiny_inputs(model)["input_ids"]
    found = find_outliers(model, [ids], threshold=2.0)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in found:
            module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.update({name: inputs[0]}))
    model(ids)
    assert found.keys() == seen.keys()
    assert {name for name, _ in model.named_modules() if name.endswith(("proj", "c_attn", "c_fc"))} <= found.keys()
    for name, x in seen.items():
        assert found[name] == [j for j in range(x.shape[-1]) if x[..., j].abs().max() >= 2.0]
    assert any(found.values())


# ---- the batch


def test_one_token_decides_for_the_whole_call() -> None:
    w = normal(20, 60)
    x = normal(4, 60, seed=1)
    quiet, loud = x.clone(), x.clone()
    quiet[3], loud[3] = normal(60, seed=2), with_outliers(x[3:], [5, 6])[0]
    dynamic, fixed = llm_int8(), llm_int8(outliers={LAYER: [5]})
    assert torch.equal(linear(dynamic, w, x)[:3], linear(dynamic, w, quiet)[:3])
    assert not torch.equal(linear(dynamic, w, x)[:3], linear(dynamic, w, loud)[:3])
    for other in (quiet, loud):
        assert torch.equal(linear(fixed, w, x)[:3], linear(fixed, w, other)[:3])


@torch.no_grad()
def test_a_fixed_set_makes_models_batch_invariant(
    trained: dict[str, Path], batches: list[Tensor], quantized: Callable[..., PreTrainedModel]
) -> None:
    source = AutoModelForCausalLM.from_pretrained(trained["injected"], dtype=torch.float32)
    outliers = find_outliers(source, [batches[0][:4]])
    first, second = batches[1][[0, 1], :64], batches[1][[0, 2], :64]
    fixed = quantized("injected", "llm_int8", outliers=outliers)
    assert torch.equal(fixed(first).logits[0], fixed(second).logits[0])
    dynamic = quantized("injected", "llm_int8")
    assert not torch.equal(dynamic(first).logits[0], dynamic(second).logits[0])


# ---- options and models


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -1.0},
        {"threshold": math.nan},
        {"threshold": "6"},
        {"threshold": True},
        {"threshold": 0, "outliers": {}},
        {"threshold": None, "outliers": {}},
        {"columns": 3},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"threshold|columns"):
        HfQuantConfig("llm_int8", **options)


@pytest.mark.parametrize(
    "options", [{}, {"threshold": None}, {"threshold": 0}, {"outliers": {"a": [1]}}, {"threshold": math.inf}], ids=str
)
def test_recipes_are_strict_json(options: dict[str, Any]) -> None:
    recipe = llm_int8(**options)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"threshold": None}, {"threshold": 0}], ids=str)
def test_save_and_reload_is_bit_identical(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_model(kind, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    config = HfQuantConfig("llm_int8", **options)
    model = type(source).from_pretrained(tmp_path / "source", dtype=torch.bfloat16, quantization_config=config).eval()
    model.save_pretrained(tmp_path / "int8")
    again = type(source).from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(logits(model), logits(again))
    if options.get("threshold") == 0:
        torch.testing.assert_close(logits(model), logits(source), rtol=0.05, atol=0.05)


def test_calibrated_models_reload_without_calibration(tmp_path: Path) -> None:
    source = tiny_model("llama")
    source.save_pretrained(tmp_path / "source")
    outliers = find_outliers(source, [tiny_inputs(source)], threshold=2.5)
    config = HfQuantConfig("llm_int8", outliers=outliers)
    model = type(source).from_pretrained(tmp_path / "source", quantization_config=config).eval()
    for name, module in packed_modules(model):
        kept = module._parameters.get("outlier_index")
        assert set(outliers[name]) <= set([] if kept is None else kept.tolist())
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(model), logits(type(source).from_pretrained(tmp_path / "int8")))


def test_experts_keep_the_columns_that_any_of_them_needs(tmp_path: Path) -> None:
    """Fused experts are stored as stacks, which must have one shape."""
    source = tiny_model("mixtral", dtype=torch.bfloat16)
    name, experts = next((n, m) for n, m in source.named_modules() if n.endswith("experts"))
    with torch.no_grad():
        experts.gate_up_proj[0, :, 3] /= 64
        experts.gate_up_proj[1, :, [5, 9]] /= 64
    source.save_pretrained(tmp_path / "source")
    config = HfQuantConfig("llm_int8")
    model = type(source).from_pretrained(tmp_path / "source", dtype=torch.bfloat16, quantization_config=config).eval()
    packed = model.get_submodule(name)
    index = packed._parameters["gate_up_proj_outlier_index"]
    assert index.tolist() == [[3, 5, 9]] * packed.num_experts
    assert model.config.quantization_config.outlier_columns == {f"{name}.gate_up_proj": 3}
    kept = packed.dequantize("gate_up_proj", torch.bfloat16)[:, :, [3, 5, 9]]
    assert torch.equal(kept, experts.gate_up_proj[:, :, [3, 5, 9]])
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(model), logits(type(source).from_pretrained(tmp_path / "int8").eval()))


# ---- a trained model


def test_outlier_channels_ruin_plain_int8_and_not_llm_int8(kl: Callable[..., float]) -> None:
    plain = kl("plain", "llm_int8", threshold=None)
    assert kl("injected", "llm_int8", threshold=None) >= 20 * plain
    assert kl("injected", "llm_int8") <= 0.7 * plain


def test_threshold_zero_changes_no_logit(kl: Callable[..., float]) -> None:
    assert kl("injected", "llm_int8", threshold=0) < 1e-9
