"""FPQ as a method: on models, from the search to checkpoints and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfquant
from hfquant import HfQuantConfig, SpecError, use_kernel
from hfquant.blocks import Blocks
from hfquant.eval import Reference, token_batches
from hfquant.histogram import Histogram
from hfquant.input_ranges import SeenInput
from hfquant.inspection import inspect_checkpoint
from hfquant.qtensor import InputParams
from hfquant.ranges import absmax
from hfquant.recipe import Recipe
from hfquant.reference import static_round_trip
from hfquant.rounders import to_nearest
from hfquant.spec import InputSpec, TensorSpec
from hfquant.stats import Stats
from hfquant.swap import packed_modules
from hfquant.testing import conformance, model_checks
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant_fpq import weights
from hfquant_fpq.inputs import find, fpq
from hfquant_fpq.preset import fpq as preset
from hfquant_fpq.shift import bounded
from hfquant_fpq.space import Space, formats, unsigned_formats
from tests import fresh
from tests.models import HELDOUT, MODEL_DIR
from tests.models.outliers import spread

STATIC = InputSpec(TensorSpec("e2m1", Blocks(-1, -1)), dynamic=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_bits": 8},
        {"bits": 6, "group_size": 32, "act_bits": 6, "inputs": "token", "rounds": 1},
    ],
    ids=str,
)
def test_conformance(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "subprocess", SimpleNamespace(run=fresh.subprocess_run))
    conformance("fpq", models=("llama", "mixtral") if options.get("act_bits") == 8 else ("llama",), **options)


# ---- inputs


def seen(x: Tensor, w: Tensor, quantized: Tensor | None = None) -> SeenInput:
    counted = Histogram()
    counted.add(x)
    return SeenInput("layer", counted, x, float(x.abs().max()), (w,), (w if quantized is None else quantized,))


def error(x: Tensor, w: Tensor, quantized: Tensor, spec: TensorSpec, params: InputParams | None) -> float:
    made = static_round_trip(x, spec, params)
    return float((made.double() @ quantized.double().T - x.double() @ w.double().T).square().sum() / len(x))


@pytest.mark.parametrize("seed", range(4))
def test_an_input_has_the_format_and_the_range_with_the_smallest_error_of_all(seed: int) -> None:
    x, w = normal(64, 24, seed=seed) * normal(24, seed=seed + 1).exp(), normal(12, 24, seed=seed + 2)
    quantized = w + 0.05 * normal(12, 24, seed=seed + 3)
    space = Space(formats(4))
    choice, loss = find(seen(x, w, quantized), STATIC, space)
    assert loss == pytest.approx(error(x, w, quantized, choice.tensor, choice.params), rel=1e-4)
    peak = x.abs().max()
    for name in formats(4):
        spec = TensorSpec(name, Blocks(-1, -1))
        for exponent in space.exponents(peak, name):
            scale = peak * exponent.exp2() / spec.numbers().top
            assert loss <= error(x, w, quantized, spec, InputParams(scale.reshape(1))) * (1 + 1e-4)


def test_experts_keep_the_format_that_was_asked_for() -> None:
    x, w = torch.rand(64, 24, generator=torch.Generator().manual_seed(0)) - 0.5, normal(12, 24)
    free = fpq(seen(x, w), STATIC)
    given = fpq(SeenInput("layer", None, x, float(x.max()), (w,), (w,), grid_is_given=True), STATIC)
    assert free.tensor.grid == "e1m2" and given.tensor.grid == "e2m1"


def test_inputs_that_are_never_negative_have_no_sign_where_that_is_better() -> None:
    x, w = normal(64, 24).softmax(-1), normal(12, 24)
    free, signed = fpq(seen(x, w), STATIC), fpq(seen(x, w), STATIC, names=list(formats(4)))
    assert free.tensor.grid in unsigned_formats(4) and signed.tensor.grid in formats(4)
    losses = [error(x, w, w, choice.tensor, choice.params) for choice in (free, signed)]
    assert losses[0] < 0.5 * losses[1], "twice the levels, half the steps"
    x[3, 3] = -1e-6
    assert fpq(seen(x, w), STATIC).tensor.grid in formats(4)


def test_ranges_of_each_token_leave_the_format_to_be_chosen() -> None:
    x, w = normal(64, 24), normal(12, 24)
    choice = fpq(seen(x, w), InputSpec(TensorSpec("e2m1", Blocks(1, -1))))
    assert choice.params is None and choice.tensor.grid in formats(4)


def test_shifts_are_powers_of_two_within_their_bounds() -> None:
    shifts = torch.tensor([0.0, 1.0, 2.0, 9.0])
    assert bounded(shifts, 3).tolist() == [1.0, 0.5, 0.25, 0.125] and bounded(shifts, 0).tolist() == [1.0] * 4


# ---- the method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 2}, "3 to 8 bits"),
        ({"bits": 16}, "3 to 8 bits"),
        ({"act_bits": 9}, "3 to 8 bits"),
        ({"search": "all"}, "'joint', 'paper', 'minmax'"),
        ({"rounds": 0}, "at least 1"),
        ({"preshift": 1}, "True or False"),
        ({"inputs": "row"}, "'tensor', 'token', 'group'"),
        ({"format": "e3m2"}, "has 6 bits, bits is 4"),
        ({"format": "int4"}, "named like 'e2m1'"),
        ({"act_bits": 8, "act_format": "e2m1"}, "has 4 bits, act_bits is 8"),
        ({"act_format": "e2m1"}, "give act_bits too"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        HfQuantConfig("fpq", **options)


def test_the_recipe_survives_json() -> None:
    for options in ({}, {"act_bits": 4}, {"act_bits": 8, "inputs": "group", "rounder": "gptq"}):
        assert Recipe.from_dict(preset(**options).to_dict()) == preset(**options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """KL per token of the trained model, or of its copy with channels of other sizes; remembered."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = torch.cat(token_batches(tokenizer, HELDOUT, sequences=64, length=256))
    original = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    reference = Reference(original, [rows[:16]])
    folder: Path = tmp_path_factory.mktemp("spread")
    spread(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)).save_pretrained(folder)
    known: dict[str, float] = {}

    def measure(which: str, **options: Any) -> float:
        key = f"{which} {options}"
        if key not in known:
            config = HfQuantConfig("fpq", **options)
            config = HfQuantConfig("fpq", data=[rows[16:]], **options) if config.needs_data else config
            path = {"plain": MODEL_DIR, "spread": folder}[which]
            with use_kernel("reference"):  # what is found must not depend on a processor's order of sums
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
                known[key] = reference.compare(model).kl
        return known[key]

    return measure


BASE = {"act_bits": 4, "preshift": False, "rounds": 1}
MINMAX = {**BASE, "search": "minmax"}


def test_searching_is_far_better_than_the_usual_format_without_clipping(measured: Callable[..., float]) -> None:
    assert measured("plain", **BASE) <= 0.30 * measured("plain", **MINMAX)


def test_shifts_help_where_channels_differ_in_size(measured: Callable[..., float]) -> None:
    assert measured("spread", **{**BASE, "preshift": True}) <= 0.80 * measured("spread", **BASE)


def test_weights_alone_gain_too(measured: Callable[..., float]) -> None:
    assert measured("plain") <= 0.75 * measured("plain", search="minmax")


def test_a_format_that_is_given_is_that_of_every_layer() -> None:
    data = [torch.randint(3, 1000, (4, 32), generator=torch.Generator().manual_seed(0))]
    config = HfQuantConfig("fpq", format="e1m2", act_bits=6, act_format="e4m1", rounds=1, data=data)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, quantization_config=config)
    assert set(formats_of(model).values()) == {("e1m2", "e4m1")}


def test_embeddings_are_searched_too_and_all_their_columns_count_alike() -> None:
    data = [torch.randint(3, 1000, (4, 32), generator=torch.Generator().manual_seed(0))]
    config = HfQuantConfig("fpq", embeddings=True, data=data)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, quantization_config=config)
    table = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).get_input_embeddings().weight.detach()
    spec = preset().scheme.weight
    found = model.get_input_embeddings().qtensor().dequantize()
    searched, usual = (to_nearest(table, ranged(table, spec, Stats())).dequantize() for ranged in (weights.fpq, absmax))
    assert torch.equal(found, searched)
    assert (found - table).norm() < (usual - table).norm()


def test_nothing_to_search_for_takes_no_data() -> None:
    assert not HfQuantConfig("fpq", search="minmax").needs_data
    assert HfQuantConfig("fpq", search="minmax", act_bits=4, preshift=False).needs_data, "static inputs have a range"
    assert HfQuantConfig("fpq", format="e2m1").needs_data, "the largest values are searched"


# ---- what becomes of the formats


def formats_of(model: PreTrainedModel) -> dict[str, tuple[str, str]]:
    schemes = {name: module.spec.scheme for name, module in packed_modules(model)}
    return {name: (scheme.weight.grid, scheme.input.tensor.grid) for name, scheme in schemes.items()}


IDS = torch.randint(3, 1000, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded() -> PreTrainedModel:
    """The trained model, quantized while loading; the tests only look at it."""
    config = HfQuantConfig("fpq", act_bits=4, data=[IDS])
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, quantization_config=config)


@torch.no_grad()
def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert formats_of(one) == formats_of(other)
    assert torch.equal(one(IDS[:2]).logits, other(IDS[:2]).logits)


def test_formats_survive_saving_and_loading(loaded: PreTrainedModel, tmp_path: Path) -> None:
    assert len(set(formats_of(loaded).values())) > 1, "layers differ, or this shows nothing"
    loaded.save_pretrained(tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32), loaded)


def test_the_command_line_way_gives_the_same_and_inspect_tells(loaded: PreTrainedModel, tmp_path: Path) -> None:
    config = HfQuantConfig("fpq", act_bits=4, data=[IDS])
    hfquant.quantize(MODEL_DIR, config, tmp_path / "out", dtype="float32")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same(streamed, loaded)
    found = inspect_checkpoint(tmp_path / "out")
    told = {layer.name: layer.grid for layer in found.layers}
    assert told == {name: weight for name, (weight, _) in formats_of(streamed).items()}
    reported = {layer.name: (layer.grid, layer.input_grid) for block in found.blocks or () for layer in block.layers}
    assert reported == formats_of(streamed)


def test_weights_of_four_bits_take_four_bits() -> None:
    model = tiny_model("llama")
    model.name_or_path = ""
    config = HfQuantConfig("fpq", data=[tiny_inputs(model)["input_ids"]])
    from hfquant.calibrate import Calibration
    from hfquant.coverage import survey

    Calibration(model, survey(model, None, False)[0], config, [tiny_inputs(model)]).run()
    for _, module in packed_modules(model):
        assert module.spec.layout == "dense"
        assert module._parameters["codes"].numel() == module.in_features * module.out_features // 2
