"""The diagonal of the Fisher information: gradients that autograd gives too, and weights that are what they say."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from hfquant.attention import listening, use
from hfquant.coverage import survey
from hfquant.errors import CalibrationError, UnsupportedError
from hfquant.fisher import Importance, importance, queries, sequences
from hfquant.stats import DRIFT, FISHER, HESSIAN, InputStats
from hfquant.testing.tiny import HEADS, HIDDEN, KINDS, LABELS, LAYERS, VOCABULARY, tiny_inputs, tiny_model

Batch = dict[str, Tensor]
KIND = pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
PAD = 2  # seen nowhere else
FLOOR = 0.01


def drawn(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], kind: str, seed: int = 0) -> Batch:
    """Token ids that are padded to one length, with labels."""
    ids, keep = drawn(3, VOCABULARY, len(lengths), max(lengths), seed=seed), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        keep[row, :length] = 1
    ids, mask = ids.masked_fill(keep == 0, PAD), keep.long()
    labels = ids.masked_fill(keep == 0, -100) if kind == "llama" else drawn(0, LABELS, len(lengths), seed=seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches_of(kind: str) -> list[Batch]:
    """Two batches, of two samples and of one."""
    if kind != "vit":
        return [texts([7, 13], kind), texts([9], kind, seed=1)]
    images = [tiny_inputs(tiny_model(kind), seed=seed)["pixel_values"] for seed in (0, 1)]
    return [{"pixel_values": x, "labels": drawn(0, LABELS, len(x))} for x in (images[0], images[1][:1])]


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def masks_of(batches: list[Batch]) -> list[Tensor | None]:
    return [batch["attention_mask"].bool() if "attention_mask" in batch else None for batch in batches]


def layers_of(model: PreTrainedModel) -> list[str]:
    return [target.name for target in survey(model, [], False)[0]]


def found_for(model: PreTrainedModel, batches: list[Batch]) -> Importance:
    with torch.no_grad():
        return importance(model, batches, layers_of(model), masks_of(batches))


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-likelihood of all labels; of a language model's, a position's label is the token after it."""
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counted = labels != -100
    return -logits.log_softmax(-1)[counted, labels[counted]].sum()


def by_autograd(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(dL/dO)^2 of the outputs of all layers [..., N], and of both products of all attention modules, in order."""
    model = copy.deepcopy(model).requires_grad_(True)
    outputs: dict[str, Tensor] = {}
    products: list[Tensor] = []

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, output)

    def listener(module: nn.Module, product: int, value: Tensor) -> Tensor:
        products.append(value)
        return value

    for name in layers_of(model):
        model.get_submodule(name).register_forward_hook(keep(name))
    with listening(listener):
        loss = own_loss(model(**without_labels(batch)).logits, batch["labels"])
    squares = [gradient.square() for gradient in torch.autograd.grad(loss, [*outputs.values(), *products])]
    return dict(zip(outputs, squares, strict=False)), squares[len(outputs) :]


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).norm()) <= 1e-4 * float(other.norm())


# ---- gradients


@KIND
def test_sums_over_outputs_and_over_tokens_are_those_of_autograds_gradients(kind: str) -> None:
    model, batches = tiny_model(kind), batches_of(kind)
    found, masks = found_for(model, batches), masks_of(batches)
    exact = [by_autograd(model, batch)[0] for batch in batches]
    assert set(found.tokens) == set(exact[0]) and len(exact[0]) >= 6 * LAYERS
    for name, parts in found.tokens.items():
        rows = [
            each[name] if mask is None or each[name].dim() == 2 else each[name][mask]
            for each, mask in zip(exact, masks, strict=True)
        ]
        flat = [x.reshape(-1, x.shape[-1]) for x in rows]
        assert len(parts) == len(batches)
        for part, x in zip(parts, flat, strict=True):
            close(part, x.sum(1))
        close(found.outputs[name], torch.cat(flat).mean(0))


@KIND
def test_what_is_kept_of_products_is_the_square_of_autograds_gradient(kind: str) -> None:
    model, batches = tiny_model(kind), batches_of(kind)
    use(model)
    found = found_for(model, batches)
    for number, batch in enumerate(batches):
        _, exact = by_autograd(model, batch)
        assert len(found.products) == len(exact) == 2 * LAYERS
        for parts, x in zip(found.products.values(), exact, strict=True):
            close(parts[number], queries(x, sequences(number, len(batches))))
    assert all(product.shape[1] == HEADS for parts in found.products.values() for product in parts)


def test_the_sample_of_long_sequences_has_some_of_their_rows() -> None:
    model, batches = tiny_model("llama"), [texts([100], "llama")]
    use(model)
    found = found_for(model, batches)
    scores = next(iter(found.products.values()))[0]
    close(scores, by_autograd(model, batches[0])[1][0][:, :, ::2])
    assert scores.shape == (1, HEADS, 50, 100)


def test_only_batches_of_the_sample_are_kept_however_long_the_others_are() -> None:
    model = tiny_model("bert")
    use(model)
    found = found_for(model, [texts([5], "bert", seed) for seed in range(9)] + [texts([30], "bert")])
    assert [len(parts) for parts in found.products.values()] == [8] * 2 * LAYERS
    name = next(iter(found.products))[0]
    assert {part.shape[2:] for part in found.of_product(name, 0)} == {(5, 5)}


@given(st.integers(1, 30))
def test_samples_of_products_are_eight_sequences_at_most_from_the_first_batches(batches: int) -> None:
    wanted = [sequences(number, batches) for number in range(batches)]
    assert sum(wanted) == 8 and wanted == sorted(wanted, reverse=True)


@KIND
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny_model(kind)
    first, second, *rest = model.parameters()
    second.requires_grad_(False)
    first.grad = torch.ones_like(first)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found_for(model, batches_of(kind))
    assert first.requires_grad and not second.requires_grad and all(p.requires_grad for p in rest)
    assert first.grad is not None and bool((first.grad == 1).all()) and all(p.grad is None for p in rest)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError), torch.no_grad():
        importance(model, [{"input_ids": torch.zeros(1, 3)}], layers_of(model), [None])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("several", [False, True], ids=["one of the classes", "any of them"])
def test_drawn_labels_give_the_fisher_information(several: bool) -> None:
    """Of logits it is p (1 - p), with p of the softmax for one answer, and of the sigmoid for independent ones."""
    model = tiny_model("bert")
    model.config.problem_type = "multi_label_classification" if several else None
    batch = {"input_ids": drawn(3, VOCABULARY, 4000, 3)}
    found = found_for(model, [batch])
    with torch.no_grad():
        logits = model(**batch).logits
    p = logits.sigmoid() if several else logits.softmax(-1)
    expected, deviation = (p * (1 - p)).mean(0), (p * (1 - p) * (1 - 2 * p).square()).sum(0).sqrt() / len(p)
    assert bool(((found.outputs["classifier"] - expected).abs() <= 4 * deviation).all())
    assert bool((4 * deviation < 0.15 * expected).all()), "or this shows nothing"
    again = found_for(model, [batch])
    assert all(torch.equal(again.outputs[name], value) for name, value in found.outputs.items())


# ---- padding


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_padded_batch_is_its_sequences_one_by_one(kind: str) -> None:
    model, lengths = tiny_model(kind), [4, 13, 8]
    batch = texts(lengths, kind)
    together = found_for(model, [batch])
    rows = [{name: x[row : row + 1] for name, x in batch.items()} for row in range(len(lengths))]
    cut = [
        {name: x[:, :length] if x.dim() == 2 else x for name, x in row.items()}
        for row, length in zip(rows, lengths, strict=True)
    ]
    apart = found_for(model, cut)
    for name in together.tokens:
        close(together.tokens[name][0], torch.cat(apart.tokens[name]))
        close(together.outputs[name], apart.outputs[name])
        weights = [apart.of_tokens([name], number) for number in range(len(lengths))]
        torch.testing.assert_close(together.of_tokens([name], 0), torch.cat(weights), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_drawn_labels_and_gradients_know_nothing_of_what_padding_holds(kind: str) -> None:
    model, batch = tiny_model(kind), without_labels(texts([5, 13], kind))
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    one, two = found_for(model, [batch]), found_for(model, [other])
    for name in one.tokens:
        assert len(one.of_tokens([name], 0)) in (18, 2)  # tokens that are no padding, or one vector a sample
        assert torch.equal(one.tokens[name][0], two.tokens[name][0])


@KIND
def test_weights_of_tokens_that_count_are_one_on_average(kind: str) -> None:
    batches = batches_of(kind)
    found = found_for(tiny_model(kind), batches)
    names = list(found.tokens)
    for some in (names[:1], names[:3]):
        weights = torch.cat([found.of_tokens(some, number) for number in range(len(batches))])
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5) and float(weights.min()) > 0


# ---- weights


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1e-30, 1.0, 1e12]))
def test_weights_of_tokens_are_shares_of_all_layers_sums(seed: int, layers: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.rand(count, generator=generator) * size for count in (5, 3, 9)] for _ in range(layers)]
    found = Importance({f"layer{number}": parts for number, parts in enumerate(rows)})
    weights = torch.cat([found.of_tokens(found.tokens, number) for number in range(3)]).double()
    total = torch.stack([torch.cat(parts).double() for parts in rows]).sum(0)
    expected = (total / total.mean() + FLOOR) / (1 + FLOOR)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


def test_where_nothing_has_an_effect_all_count_alike() -> None:
    found = Importance(
        {"layer": [torch.zeros(5), torch.zeros(2)]},
        {"layer": torch.zeros(4)},
        {("attention", 0): [torch.zeros(2, 4, 3, 3), torch.zeros(1, 4, 2, 2)]},
    )
    assert torch.equal(found.of_tokens(["layer"], 0), torch.ones(5))
    assert torch.equal(found.of_outputs("layer"), torch.ones(4))
    assert [part.unique().tolist() for part in found.of_product("attention", 0)] == [[1.0], [1.0]]


def test_outputs_and_products_without_effect_still_count_a_little() -> None:
    outputs, product = torch.tensor([0.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 8.0]).reshape(1, 1, 2, 2)
    found = Importance({}, {"layer": outputs}, {("attention", 1): [product]})
    torch.testing.assert_close(found.of_outputs("layer"), outputs + FLOOR * 1.5)
    torch.testing.assert_close(found.of_product("attention", 1)[0], product + FLOOR * 2)


class Odd(nn.Module):
    """Calls one layer twice, one for large inputs only, and one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        for name in ("twice", "seldom", "idle"):
            linear = nn.Linear(4, 4)
            nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(len(name)))
            self.add_module(name, linear)

    def can_generate(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Any:
        self.idle(x)
        inner = self.twice(x)
        if x.abs().max() > 1:
            inner = inner + self.seldom(x)
        return SimpleNamespace(logits=self.twice(inner.tanh()))


def test_layers_that_are_called_twice_seldom_or_for_nothing_are_in_place() -> None:
    model = Odd()
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    with torch.no_grad():
        found = importance(model, [{"x": x}, {"x": 2 * x}, {"x": x}], ["twice", "seldom", "idle"], [None] * 3)
    assert [len(part) for part in found.tokens["twice"]] == [6, 6, 6]
    assert [len(part) for part in found.tokens["seldom"]] == [0, 6, 0]
    assert not any(part.any() for part in found.tokens["idle"]) and not found.outputs["idle"].any()
    assert torch.equal(found.of_outputs("idle"), torch.ones(4))
    assert bool(found.tokens["seldom"][1].any()) and bool(found.outputs["seldom"].any())
    for name in ("twice", "seldom"):  # both are sums of the same f
        total = sum(float(part.sum()) for part in found.tokens[name])
        count = sum(map(len, found.tokens[name]))
        assert total == pytest.approx(float(found.outputs[name].sum()) * count, rel=1e-5)


# ---- statistics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHED = frozenset({HESSIAN, DRIFT, FISHER})


def collected(parts: list[tuple[Tensor, Tensor, Tensor | None]], what: frozenset[str] = WEIGHED) -> InputStats:
    stats = InputStats(parts[0][0].shape[1], what)
    for x, moved, weights in parts:
        stats.add(x, moved, weights)
    return stats


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 20))
def test_sums_of_squares_are_weighed(seed: int, tokens: int, features: int) -> None:
    x, moved = normal(tokens, features, seed=seed), normal(tokens, features, seed=seed + 1)
    weights = normal(tokens, seed=seed + 2).exp()
    stats = collected([(x, moved, weights)])
    root = weights.double().sqrt()[:, None]
    left, drift = x.double() * root, (moved - x).double() * root
    assert stats.gram is not None and stats.drift is not None
    limit, scale = 2**-22 * (tokens + 2), left.norm(dim=0)
    assert bool(((stats.gram - left.T @ left).abs() <= limit * scale[:, None] * scale).all())
    assert bool(((stats.drift - drift.T @ left).abs() <= limit * drift.norm(dim=0)[:, None] * scale).all())
    plain = collected([(x, moved, None)])
    for name in ("abs_sum", "square_sum", "absmax", "sample"):
        assert torch.equal(getattr(stats, name), getattr(plain, name)), "these count tokens"
    assert torch.equal(stats.sample, x[:: max(1, tokens // 64)][:64])
    assert torch.equal(stats.weights, weights[:: max(1, tokens // 64)][:64])


def test_weights_of_one_are_no_weights_bit_for_bit() -> None:
    x, moved = normal(5000, 7), normal(5000, 7, seed=1)
    one, none = collected([(x, moved, torch.ones(5000))]), collected([(x, moved, None)])
    assert one.gram is not None and none.gram is not None and torch.equal(one.gram, none.gram)
    assert one.drift is not None and none.drift is not None and torch.equal(one.drift, none.drift)


def test_merged_and_selected_statistics_keep_the_weights_of_their_sample() -> None:
    parts = [(normal(90, 6, seed=n), normal(90, 6, seed=n + 9), normal(90, seed=n + 20).exp()) for n in range(5)]
    whole, one = collected(parts), collected(parts[:2])
    one.merge(collected(parts[2:]))
    assert torch.equal(one.sample, whole.sample) and torch.equal(one.weights, whole.weights)
    assert len(one.weights) == len(one.sample) == len(one.places) == 256
    one.outputs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    some = one.select(torch.tensor([4, 1]))
    counts = some.importance(["a", "b"])
    assert counts is not None and torch.equal(counts, one.weights[:, None] * torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(some.sample, one.sample[:, [4, 1]])
    assert collected([(*parts[0][:2], None)]).importance(["a"]) is None


# ---- what has no classes


def test_models_without_classes_are_refused() -> None:
    regression = tiny_model("bert")
    regression.config.problem_type = "regression"
    single = tiny_model("bert")
    single.classifier = nn.Linear(HIDDEN, 1)
    base = AutoModel.from_config(tiny_model("bert").config)
    for model in (regression, single, base):
        with pytest.raises(UnsupportedError, match='predicts none: use loss="output"'), torch.no_grad():
            importance(model, [without_labels(texts([5], "bert"))], [], [None])


def test_answers_that_overflow_are_reported() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.bias.fill_(torch.inf)
    for batch in (texts([5], "bert"), without_labels(texts([5], "bert"))):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            found_for(model, [batch])


def test_masked_language_models_count_each_of_their_labels() -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_model("bert").config).eval()
    batch = texts([6, 9], "bert")
    batch["labels"] = batch["input_ids"].masked_fill(drawn(0, 3, 2, 9, seed=3) > 0, -100)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    name = "cls.predictions.transform.dense"
    with torch.no_grad():
        found = importance(model, [batch], [name], masks_of([batch]))
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(**without_labels(batch)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, seen)
    close(found.tokens[name][0], gradient.square().sum(-1)[batch["attention_mask"].bool()])


@pytest.mark.parametrize("kind", sorted({"gpt2", "qwen3"} & set(KINDS)))
def test_other_models_give_finite_numbers(kind: str) -> None:
    found = found_for(tiny_model(kind), [without_labels(texts([6, 9], "llama"))])
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in found.outputs.values())
