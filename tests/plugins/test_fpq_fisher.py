"""FPQ with errors weighed by their effect on the model's answer: the losses, the whole method, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hfquant
from hfquant import HfQuantConfig, SpecError, processes
from hfquant.attention import Operands
from hfquant.blocks import Blocks
from hfquant.calibrate import Calibration
from hfquant.coverage import survey
from hfquant.errors import UnsupportedError
from hfquant.histogram import Histogram
from hfquant.input_ranges import InputChoice, SeenInput, input_params
from hfquant.reference import as_seen
from hfquant.spec import InputSpec, TensorSpec
from hfquant.stats import DRIFT, FISHER, HESSIAN, InputStats, Stats
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant_fpq.inputs import find
from hfquant_fpq.loss import OutputError
from hfquant_fpq.space import Space, formats
from hfquant_fpq.weights import fpq
from tests.models import BERT_DIR, VIT_DIR, tasks

STATIC = InputSpec(TensorSpec("e2m1", Blocks(-1, -1)), dynamic=False)
CHANNEL = TensorSpec("e2m1", Blocks(1, -1))
TENSOR = TensorSpec("e2m1", Blocks(-1, -1))
N, K, T = 24, 48, 200


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts(*shape: int, seed: int = 0) -> Tensor:
    """Weights of very different size."""
    return normal(*shape, seed=seed).mul(2).exp()


def seen(z: Tensor, x: Tensor, weights: Tensor | None, outputs: Tensor | None) -> Stats:
    stats = InputStats(z.shape[1], frozenset({HESSIAN, DRIFT, FISHER}))
    stats.add(z, x, weights)
    stats.outputs = {} if outputs is None else {"layer": outputs}
    return Stats("layer", inputs=stats)


# ---- losses


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), part=st.booleans())
def test_the_loss_of_a_weight_is_the_weighed_error_up_to_a_constant(seed: int, part: bool) -> None:
    """sum over t, n of a_t b_n (error of output n of token t)^2 / T."""
    w, x = normal(N, K, seed=seed), normal(T, K, seed=seed + 1)
    z, a, b = x + 0.1 * normal(T, K, seed=seed + 2), counts(T, seed=seed + 3), counts(N, seed=seed + 4)
    error = OutputError(w, seen(z, x, a, b).inputs, "layer")
    rows = slice(5, 17) if part else slice(None)
    one, other = (w + size * normal(N, K, seed=seed + place) for place, size in ((5, 0.1), (6, 0.05)))

    def by_definition(q: Tensor) -> Tensor:
        errors = z.double() @ q.double().T - x.double() @ w.double().T
        return ((a.double()[:, None] * b.double() * errors.square()).sum(0) / T)[rows]

    of_rows = error.rows(rows)
    found = of_rows.exact((one - w)[rows]) - of_rows.exact((other - w)[rows])
    expected = by_definition(one) - by_definition(other)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(by_definition(one).max()))
    assert torch.equal(of_rows.rough((one - w)[rows]), of_rows.exact((one - w)[rows])), "narrow layers need no sample"


def test_outputs_of_a_wide_layer_are_weighed_too() -> None:
    w, x, b = normal(4, 1100), normal(250, 1100), counts(4)
    d = 0.1 * normal(4, 1100, seed=5)
    plain = OutputError(w, seen(x, x, None, None).inputs, "layer").rough(d)
    torch.testing.assert_close(OutputError(w, seen(x, x, None, b).inputs, "layer").rough(d), plain * b)


def looked_at(x: Tensor, w: Tensor, quantized: Tensor, importance: Tensor | None) -> SeenInput:
    counted = Histogram()
    counted.add(x)
    return SeenInput("layer", counted, x, float(x.abs().max()), (w,), (quantized,), importance=importance)


@pytest.mark.parametrize("heads", [(), (3,)], ids=["a layer", "heads"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_an_input_is_the_weighed_error(heads: tuple[int, ...], seed: int) -> None:
    x, w = normal(*heads, 64, 24, seed=seed).exp(), normal(*heads, 12, 24, seed=seed + 1)
    q, f = w + 0.1 * normal(*heads, 12, 24, seed=seed + 2), counts(*heads, 64, 12, seed=seed + 3)
    around = looked_at(x, w, q, f)

    def by_definition(choice: InputChoice) -> float:
        errors = as_seen(x, choice.tensor, choice.params).double() @ q.double().mT - x.double() @ w.double().mT
        return float((f.double() * errors.square()).sum()) / x[..., 0].numel()

    space = Space(formats(4))
    choice, loss = find(around, STATIC, space)
    assert loss == pytest.approx(by_definition(choice), rel=1e-4)
    for name in formats(4):
        spec = TensorSpec(name, Blocks(-1, -1))
        for exponent in space.exponents(torch.tensor(around.absmax), name):
            high = around.absmax * 2.0 ** float(exponent)
            assert loss <= by_definition(InputChoice(spec, input_params(-high, high, spec))) * (1 + 1e-4)


def test_an_output_that_alone_counts_is_served_alone() -> None:
    """Of two rows in one block, or two outputs of one input, the choice is that of the one that counts."""
    x, w = normal(T, K) * normal(K, seed=1).exp(), torch.cat([normal(1, K, seed=2), 5 * normal(1, K, seed=3)])
    alone = fpq(w[:1], CHANNEL, seen(x, x, None, None))
    for spec in (CHANNEL, TENSOR):
        both = fpq(w, spec, seen(x, x, None, torch.tensor([1.0, 0.0])))
        assert spec == TENSOR or (both.spec.grid == alone.spec.grid and torch.equal(both.scale[:1], alone.scale))
    for row in (0, 1):
        f = torch.zeros(T, 2)
        f[:, row] = 1
        q = w + 0.1 * normal(2, K, seed=4)
        together, loss = find(looked_at(x, w, q, f), STATIC, Space(formats(4)))
        single, expected = find(looked_at(x, w[row : row + 1], q[row : row + 1], None), STATIC, Space(formats(4)))
        assert loss == pytest.approx(expected, rel=1e-4) and together.tensor == single.tensor


@pytest.mark.parametrize("size", [1.0, 0.25, 64.0])
def test_equal_weights_choose_what_none_choose(size: float) -> None:
    """Powers of two, so that nothing is rounded differently."""
    w, x = normal(N, K), normal(T, K) * normal(K, seed=1).exp()
    z = x + 0.05 * normal(T, K, seed=2)
    for spec in (CHANNEL, TENSOR, TensorSpec("e2m1", Blocks(1, 16))):
        one = fpq(w, spec, seen(z, x, torch.ones(T), torch.full((N,), size)), loss="fisher")
        none = fpq(w, spec, seen(z, x, None, None))
        assert one.spec == none.spec and torch.equal(one.scale, none.scale)
    around = looked_at(x, w, w + 0.05 * normal(N, K, seed=3), None)
    weighed = replace(around, importance=torch.full((T, N), size))
    plain, found = (find(each, STATIC, Space(formats(4)))[0] for each in (around, weighed))
    assert plain.same(found)


# ---- from end to end

MODELS: dict[str, tuple[Any, Path, Callable[[int, int], tasks.Batch]]] = {
    "vit": (AutoModelForImageClassification, VIT_DIR, tasks.image_batch),
    "bert": (AutoModelForSequenceClassification, BERT_DIR, tasks.text_batch),
}
SAMPLES, TEST = 64, 500


def load(kind: str, **options: Any) -> PreTrainedModel:
    auto, folder, _ = MODELS[kind]
    loaded: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32, **options)
    return loaded


def quantized(kind: str, seed: int = tasks.CALIBRATION_SEED, **options: Any) -> PreTrainedModel:
    """A model that is only looked at: the same for the same options, in whatever order and way they are given."""
    return _quantized(kind, seed, **dict(sorted(options.items())))


@functools.cache
def _quantized(kind: str, seed: int, **options: Any) -> PreTrainedModel:
    drawn = tasks.inputs_of(MODELS[kind][2](seed, SAMPLES))
    data = [{name: x[start : start + 32] for name, x in drawn.items()} for start in range(0, SAMPLES, 32)]
    config = HfQuantConfig("fpq", act_bits=4, attention=True, data=data, **{"rounds": 1, **options})
    return load(kind, quantization_config=config)


@torch.no_grad()
def answers(model: PreTrainedModel, kind: str) -> Tensor:
    """Log-probabilities for samples that calibration did not see."""
    log: Tensor = model(**tasks.inputs_of(MODELS[kind][2](tasks.TEST_SEED, TEST))).logits.log_softmax(-1)
    return log


@functools.cache
def exact(kind: str) -> Tensor:
    return answers(load(kind), kind)


def kl(kind: str, **options: Any) -> float:
    """KL (nats) from the full-precision model's predictions."""
    found = answers(quantized(kind, **options), kind)
    return float(F.kl_div(found, exact(kind), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(("kind", "most"), [("bert", 0.8), ("vit", 0.9)])
def test_predictions_stay_nearer_than_with_the_usual_format_without_clipping(kind: str, most: float) -> None:
    """Means of two draws of calibration samples: a few predictions make up much of a KL."""
    seeds = (tasks.CALIBRATION_SEED, tasks.CALIBRATION_SEED + 1)
    found = sum(kl(kind, seed=seed, loss="fisher") for seed in seeds)
    assert found <= most * sum(kl(kind, seed=seed, search="minmax", preshift=False) for seed in seeds)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_same_is_found_again_and_something_else_than_without() -> None:
    kind = "bert"
    first = state(quantized(kind, loss="fisher"))
    again = state(_quantized.__wrapped__(kind, tasks.CALIBRATION_SEED, loss="fisher"))
    other = state(quantized(kind))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    operands = [module.scale for module in quantized(kind, loss="fisher").modules() if isinstance(module, Operands)]
    plain = [module.scale for module in quantized(kind).modules() if isinstance(module, Operands)]
    assert any(not torch.equal(one, two) for one, two in zip(operands, plain, strict=True))


def test_a_search_for_nothing_is_the_same_with_either_loss() -> None:
    assert not HfQuantConfig("fpq", search="minmax", loss="fisher").needs_data
    one, other = (state(quantized("bert", search="minmax", preshift=False, loss=loss)) for loss in ("fisher", "output"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_gptq_rounds_by_the_weighed_sums() -> None:
    data = [{**tiny_inputs(tiny_model("bert")), "labels": torch.tensor([1, 3])}]
    made = {}
    for loss in ("output", "fisher"):
        model = tiny_model("bert")
        config = HfQuantConfig("fpq", rounder="gptq", format="e2m1", loss=loss, data=data)
        Calibration(model, survey(model, None, False)[0], config, data).run()
        made[loss] = {name: module.qtensor().dequantize() for name, module in packed_modules(model)}
    assert made["fisher"].keys() == made["output"].keys()
    assert all(values.isfinite().all() for values in made["fisher"].values())
    assert any(not torch.equal(made["output"][name], values) for name, values in made["fisher"].items())


# ---- what is refused


def calibrated(model: PreTrainedModel, **options: Any) -> None:
    data = [tiny_inputs(model)]
    config = HfQuantConfig("fpq", loss="fisher", data=data, **options)
    Calibration(model, survey(model, None, False)[0], config, data).run()


def untouched(path: Path) -> bool:
    return sorted(found.name for found in path.iterdir()) == ["source"]


def test_streaming_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this is long work")

    tiny_model("llama").save_pretrained(tmp_path / "source")
    for name in ("calibration_batches", "skeleton", "Journal", "load_model"):
        monkeypatch.setattr(f"hfquant.streaming.{name}", never)
    config = HfQuantConfig("fpq", loss="fisher", data=[torch.ones(2, 8, dtype=torch.int64)])
    with pytest.raises(UnsupportedError, match="from_pretrained and a quantization_config, and save the result"):
        hfquant.quantize(tmp_path / "source", config, tmp_path / "out")
    assert untouched(tmp_path)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    config = HfQuantConfig("fpq", loss="fisher", data=[torch.ones(2, 8, dtype=torch.int64)])
    model = tiny_model("llama")
    batches = [tiny_inputs(model, seed=seed) for seed in range(2)]
    with pytest.raises(UnsupportedError, match="one process"):
        Calibration(model, survey(model, None, False)[0], config, batches)


def test_fused_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match='fused experts: use loss="output"'):
        calibrated(tiny_model("mixtral"))


def test_models_without_classes_are_refused(tmp_path: Path) -> None:
    base = AutoModel.from_config(tiny_model("bert").config)
    regression = AutoModelForSequenceClassification.from_config(tiny_model("bert").config)
    regression.config.problem_type = "regression"
    for model in (base, regression):
        before = state(model)
        with pytest.raises(UnsupportedError, match='predicts none: use loss="output"'):
            calibrated(model.eval())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("loss", ["hessian", "", None, True])
def test_an_unknown_loss_is_refused(loss: Any) -> None:
    with pytest.raises(SpecError, match="loss is one of 'output', 'fisher'"):
        HfQuantConfig("fpq", loss=loss)
    with pytest.raises(SpecError, match="loss is one of 'output', 'fisher'"):
        fpq(normal(4, 8), CHANNEL, Stats(), loss=loss)


def test_language_models_are_weighed_by_the_tokens_they_predict(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    data = [torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))]
    config = HfQuantConfig("fpq", loss="fisher", data=data, modules_to_not_convert=[])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(data[0]).logits, model(data[0]).logits)
