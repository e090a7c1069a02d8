"""AWQ: what a scale does to the output error, the search, clipping, and how close the trained model stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfquant import HfQuantConfig
from hfquant.blocks import Blocks
from hfquant.errors import CalibrationError, SpecError
from hfquant.eval import Reference, token_batches
from hfquant.folds import find_folds
from hfquant.ranges import Params, absmax, mse
from hfquant.recipe import Recipe, Step
from hfquant.rounders import to_nearest
from hfquant.spec import TensorSpec
from hfquant.stats import CHANNELS, HESSIAN, InputStats, Stats
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model
from hfquant.testing.views import block_views
from hfquant_awq import scale as scales
from hfquant_awq.clip import awq_clip
from hfquant_awq.preset import awq as preset
from hfquant_awq.scale import awq, candidates, output_error, quantized
from tests.models import HELDOUT, MODEL_DIR
from tests.models.outliers import spread

N, K = 12, 70
UINT3 = TensorSpec("uint3", Blocks(1, 16), True, "bfloat16")
SPECS = [
    TensorSpec("int4", Blocks(1, 16)),
    UINT3,
    TensorSpec("uint4", Blocks(1, -1), True),
    TensorSpec("e2m1", Blocks(1, 32), scale="float16"),
    TensorSpec("uint4", Blocks(5, 8), True),
    TensorSpec("nf4", Blocks(1, 16), scale=TensorSpec("uint8", Blocks(1, 256))),
]
each_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.grid}-{spec.blocks.rows}x{spec.blocks.cols}"
)
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x: Tensor) -> Stats:
    inputs = InputStats(x.shape[1], frozenset({HESSIAN}))
    inputs.add(x)
    return Stats(inputs=inputs)


# Scales.


def test_scaling_a_salient_channel_up_helps_and_down_harms() -> None:
    """s multiplies the weight before rounding: Q(W s) / s. The other way round is worse than no scale."""
    x, w = normal(400, K, seed=1), normal(64, K, seed=2)
    x[:, 5] *= 50
    scale = torch.ones(K)
    scale[5] = 4
    spec, gram = TensorSpec("int3", Blocks(1, 16)), x.T @ x
    up, none, down = (output_error(w, s, gram, spec) for s in (scale, torch.ones(K), 1 / scale))
    assert up < 0.5 * none < none < 0.5 * down


@each_spec
@given(seeds)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_the_error_is_that_of_the_outputs_over_all_tokens(spec: TensorSpec, seed: int) -> None:
    x, w, scale = normal(50, K, seed=seed), normal(N, K, seed=seed + 1), normal(K, seed=seed + 2).exp()
    exact = x.double() @ w.double().T
    seen = (x / scale).double() @ quantized(w * scale, spec).double().T
    found = output_error(w, scale, x.T @ x, spec)
    assert found == pytest.approx(float((seen - exact).square().sum()), rel=1e-3)


def searched(kind: str = "llama", index: int = 0, **options: Any) -> tuple[PreTrainedModel, Any]:
    """A model of which one block has been scaled, and the view of that block."""
    model = tiny_model(kind)
    for number, view in enumerate(block_views(model, tiny_inputs(model), preset(bits=3, group_size=16))):
        if number == index:
            with torch.no_grad():
                awq(view, **options)
            return model, view
    raise AssertionError


def gains(view: Any) -> list[float]:
    found = [note.split("error ")[1].split()[0] for note in view.notes if " error " in note]
    return [float(gain) for gain in found]


def test_candidates_reach_from_no_scale_to_the_inputs_own_and_are_centred() -> None:
    model = tiny_model("llama")
    view = next(block_views(model, tiny_inputs(model)))
    view.collect(CHANNELS)
    fold = find_folds(view)[0]
    fold.groups[0].stats.abs_sum[3] = 0  # type: ignore[union-attr]
    names, tried = candidates(fold, UINT3, duo=True, steps=4)
    assert names == [
        *("none", "x^0 / w^1", "x^0.25", "x^0.25 / w^0.75", "x^0.5", "x^0.5 / w^0.5"),
        *("x^0.75", "x^0.75 / w^0.25", "x^1"),
    ]
    assert torch.equal(tried[0], torch.ones_like(tried[0]))
    for scale in tried[1:]:
        live = torch.cat([scale[:3], scale[4:]])
        assert float(live.max() * live.min()) == pytest.approx(1, rel=1e-5)
        assert scale[3] == 1
    mean = fold.groups[0].stats.absmean  # type: ignore[union-attr]
    live = torch.arange(len(mean)) != 3
    ratio = (tried[-1] / mean)[live]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert candidates(fold, UINT3, duo=False, steps=4)[0] == ["none", "x^0.25", "x^0.5", "x^0.75", "x^1"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_the_same_and_no_search_is_worse_than_none(kind: str) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        before = model(**tiny_inputs(model)).logits.double().log_softmax(-1)
        for view in block_views(model, tiny_inputs(model), preset(bits=3, group_size=16)):
            awq(view)
            assert view.trials and all(trial.held for trial in view.trials)
            assert all(gain < 1 for gain in gains(view))
            assert all(group.stats is None for group in view.groups)
        after = model(**tiny_inputs(model)).logits.double().log_softmax(-1)
    assert abs(float((before.exp() * (before - after)).sum(-1).mean())) < 1e-6


def test_the_chosen_scale_has_the_error_that_the_notes_say() -> None:
    original = tiny_model("llama")
    view = next(block_views(original, tiny_inputs(original), preset(bits=3, group_size=16)))
    view.collect(HESSIAN)
    o_proj = original.model.layers[0].self_attn.o_proj.weight.detach()
    (gram,) = [g.stats.gram.float() for g in view.groups if g.name.endswith("o_proj")]  # type: ignore[union-attr]
    model, view = searched(rows=10**6)
    scale = (model.model.layers[0].self_attn.o_proj.weight.detach() / o_proj).median(0).values
    spec = view.recipe.scheme.weight
    gain = output_error(o_proj, scale, gram, spec) / output_error(o_proj, torch.ones_like(scale), gram, spec)
    (note,) = [note for note in view.notes if "-> o_proj" in note]
    assert f"error {gain:.3f} of the unscaled" in note


def test_memory_for_statistics_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, _ = searched("mixtral")
    monkeypatch.setattr(scales, "_STATISTICS", 1)
    one_by_one, _ = searched("mixtral")
    for name, value in at_once.state_dict().items():
        assert torch.equal(value, one_by_one.state_dict()[name]), name


def test_rows_are_sampled_only_where_they_are_quantized_one_by_one() -> None:
    w = normal(100, 32)
    assert scales._some_rows(w, SPECS[0], 10).shape == (10, 32)
    assert torch.equal(scales._some_rows(w, SPECS[0], 100), w)
    assert torch.equal(scales._some_rows(w, TensorSpec("uint4", Blocks(5, 8), True), 10), w)


@pytest.mark.parametrize("option", [{"steps": 0}, {"rows": 0}, {"steps": 1.5}])
def test_searches_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="awq needs whole numbers of steps and rows"):
        searched(**option)


# Clipping.


def clipping_loss(w: Tensor, params: Params, x: Tensor) -> Tensor:
    """Squared error of what each block [R, C] adds to the outputs, summed over its rows."""
    values = to_nearest(w, params).dequantize()
    shape = (w.shape[0], w.shape[1])
    height, width = params.spec.blocks.sides(shape)
    losses = torch.zeros(params.spec.blocks.counts(shape), dtype=torch.float64)
    for j in range(losses.shape[1]):
        columns = slice(j * width, (j + 1) * width)
        by_row = ((values - w)[:, columns].double() @ x[:, columns].double().T).square().sum(1)
        for i in range(losses.shape[0]):
            losses[i, j] = by_row[i * height : (i + 1) * height].sum()
    return losses


@pytest.mark.parametrize("spec", SPECS[:5], ids=lambda spec: f"{spec.grid}-{spec.blocks.rows}x{spec.blocks.cols}")
@given(seeds)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_no_block_is_worse_clipped_than_whole(spec: TensorSpec, seed: int) -> None:
    x = normal(60, 6, seed=seed) @ normal(6, K, seed=seed + 1) + 0.1 * normal(60, K, seed=seed + 2)
    w = normal(N, K, seed=seed + 3)
    clipped = clipping_loss(w, awq_clip(w, spec, stats_of(x)), x)
    whole = clipping_loss(w, absmax(w, spec, Stats()), x)
    assert (clipped <= whole * (1 + 1e-3) + 1e-9).all()
    assert clipped.sum() < whole.sum()


@pytest.mark.parametrize("spec", SPECS[:5], ids=lambda spec: f"{spec.grid}-{spec.blocks.rows}x{spec.blocks.cols}")
def test_inputs_of_one_size_without_correlation_give_the_clipping_of_mse(spec: TensorSpec) -> None:
    """A Gram matrix of powers of two on the diagonal leaves the plain squared error of the weights."""
    w = normal(N, K, seed=5)
    found = awq_clip(w, spec, stats_of(4 * torch.eye(K)), steps=20, shrink=0.5)
    expected = mse(w, spec, Stats(), steps=21, shrink=0.5)
    assert torch.equal(found.scale, expected.scale)


def test_both_ends_of_an_asymmetric_range_shrink() -> None:
    w = torch.cat([normal(1, 30, seed=1), torch.tensor([[-9.0, 30.0]])], dim=1)
    x = torch.eye(32)
    x[30:] = 0  # nobody reads the two largest
    params = awq_clip(w, TensorSpec("uint8", Blocks(1, -1), True), stats_of(x))
    assert float(params.scale) < 39 / 255
    assert params.zero is not None and params.zero.item() == round(9 / 39 * 255)


@each_spec
def test_layers_that_no_token_reached_weigh_columns_alike(spec: TensorSpec) -> None:
    w, log = normal(N, K), list[str]()
    empty = Stats(inputs=InputStats(K, frozenset({HESSIAN})), log=log)
    found = awq_clip(w, spec, empty)
    assert torch.equal(found.scale, awq_clip(w, spec, stats_of(torch.eye(K))).scale)
    assert "no calibration token" in log[0]


def test_clipping_needs_statistics_and_sensible_options() -> None:
    with pytest.raises(CalibrationError, match="calibration data"):
        awq_clip(normal(N, K), UINT3, Stats())
    for option in ({"steps": 0}, {"shrink": 1.0}, {"steps": 2.5}):
        with pytest.raises(SpecError, match="awq_clip needs"):
            awq_clip(normal(N, K), UINT3, stats_of(torch.eye(K)), **option)
    with pytest.raises(SpecError, match="fitted to the data"):
        awq_clip(normal(N, K), TensorSpec("quantile4", Blocks(1, 16)), stats_of(torch.eye(K)))


# The method.


def test_the_recipe_says_what_was_asked_for() -> None:
    recipe = preset()
    assert recipe.scheme.weight == TensorSpec("uint4", Blocks(1, 128), True, "float16")
    assert recipe.transforms == (Step("awq", {"duo": True}),) and recipe.range == Step("awq_clip")
    recipe = preset(bits=3, group_size=-1, symmetric=True, duo=False, clip=False)
    assert recipe.scheme.weight == TensorSpec("int3", Blocks(1, -1))
    assert recipe.transforms == (Step("awq", {"duo": False}),) and recipe.range == Step("absmax")
    assert preset(grid="nf4").scheme.weight.grid == "nf4"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bits": 9}, "bits is 2 to 8, got 9"),
        ({"bits": 3, "grid": "nf4"}, "leave out bits and symmetric"),
        ({"clip": "yes"}, "clip is True or False"),
        ({"group_size": 1}, "group_size is at least 2"),
        ({"alpha": 1}, "alpha"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(SpecError, match=found):
        HfQuantConfig("awq", **options)


@cache
def trained_reference() -> tuple[Reference, list[Tensor]]:
    """Of the trained model on held-out text, and other held-out text to calibrate on."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    rows = torch.cat(token_batches(AutoTokenizer.from_pretrained(MODEL_DIR), HELDOUT, sequences=16, length=256))
    return Reference(model, [rows[:8]]), [rows[8:]]


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """KL per token of the trained model, or of its copy with channels of other sizes, by a method with options."""
    reference, data = trained_reference()
    folder: Path = tmp_path_factory.mktemp("spread")
    spread(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)).save_pretrained(folder)

    def measure(which: str, method: str, **options: Any) -> float:
        config = HfQuantConfig(method, group_size=64, symmetric=False, **options)
        if method == "awq":
            config = HfQuantConfig(method, group_size=64, data=data, **options)
        path = {"plain": MODEL_DIR, "spread": folder}[which]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
        return reference.compare(model).kl

    return measure


@pytest.mark.parametrize(("bits", "bar"), [(4, 0.75), (3, 0.65)])
def test_the_trained_model_stays_closer_than_rounded_to_nearest(
    kl: Callable[..., float], bits: int, bar: float
) -> None:
    assert kl("plain", "awq", bits=bits) <= bar * kl("plain", f"int{bits}")


def test_channels_of_different_sizes_are_evened_out(kl: Callable[..., float]) -> None:
    assert kl("spread", "awq") <= 0.05 * kl("spread", "int4")


def test_the_recipe_survives_json() -> None:
    recipe = preset(bits=3, rounder="nearest")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
