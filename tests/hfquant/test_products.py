"""Calibration of attention's operands: what it sees, in which order, and the ranges that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfquant import HfQuantConfig
from hfquant.attention import CHILD, OPERANDS, PRODUCTS, Operands, leave, note_callers, use
from hfquant.backend import Backend, register, unregister
from hfquant.blocks import Blocks
from hfquant.calibrate import Calibration
from hfquant.chain import find_chain, first_call
from hfquant.coverage import survey
from hfquant.errors import CalibrationError
from hfquant.findings import BlockFinding
from hfquant.input_ranges import InputChoice, SeenInput, input_params
from hfquant.matrices import trace
from hfquant.presets import kbit
from hfquant.products import find_products
from hfquant.qtensor import InputParams, QTensor
from hfquant.recipe import Recipe, Step
from hfquant.reference import static_round_trip
from hfquant.rounders import nearest
from hfquant.spec import InputSpec, TensorSpec
from hfquant.stats import HESSIAN, InputStats, Stats, needs
from hfquant.testing.tiny import HEADS, HIDDEN, KV_HEADS, LAYERS, LENGTH, tiny_inputs, tiny_model

D = HIDDEN // HEADS
GRAMS: dict[str, InputStats] = {}
ASKED: list[tuple[SeenInput, InputChoice]] = []


@needs(HESSIAN)
def watching(w: Tensor, spec: Any, find: Any, stats: Stats) -> QTensor:
    """Nearest codes; what was known about the inputs goes to `GRAMS`."""
    GRAMS[stats.name] = stats.seen(HESSIAN)
    return nearest(w, spec, find, stats)


def asking(seen: SeenInput, given: InputSpec) -> InputChoice:
    """The whole range, which is noted in `ASKED`, in at most 5 rounds."""
    ASKED.append((seen, InputChoice(given.tensor, input_params(-seen.absmax, seen.absmax, given.tensor))))
    return ASKED[-1][1]


vars(asking)["rounds"] = lambda options: 5


def attended(
    grid: str = "int8", dynamic: bool = False, rounder: str = "nearest", ranges: str = "absmax", act: bool = False
) -> Recipe:
    operands = InputSpec(TensorSpec(grid, Blocks(1, -1) if dynamic else Blocks(-1, -1)), dynamic)
    recipe = replace(kbit("int8"), attention=operands, rounder=Step(rounder), input_range=Step(ranges))
    return replace(recipe, scheme=replace(recipe.scheme, input=operands)) if act else recipe


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    made = Backend(
        "attended",
        presets={"attended": attended},
        rounders={"watching": watching},
        input_ranges={"asking": asking},
    )
    register(made, "tests")
    yield
    unregister(made, "tests")


@dataclass
class Calibrated:
    model: PreTrainedModel
    config: HfQuantConfig
    findings: list[BlockFinding]

    def operands(self, block: int = 0) -> Operands:
        return [module for module in self.model.modules() if isinstance(module, Operands)][block]

    def largest(self, name: str, block: int = 0) -> float:
        """The largest magnitude that an operand can have."""
        operands = self.operands(block)
        return float(operands.scale[OPERANDS.index(name)]) * operands.specs[name].tensor.numbers().top


def calibrate(kind: str, batches: list[dict[str, Tensor]], **options: Any) -> Calibrated:
    model = tiny_model(kind)
    leave_alone = options.pop("modules_to_not_convert", None)
    config = HfQuantConfig("attended", data=batches, modules_to_not_convert=leave_alone, **options)
    targets, _ = survey(model, config.modules_to_not_convert, False)
    return Calibrated(model, config, Calibration(model, targets, config, batches).run())


def padded(kind: str) -> dict[str, Tensor]:
    """A batch [2, 13] whose first sequence ends after 8 tokens; the padding is a token that is seen nowhere else."""
    inputs = tiny_inputs(tiny_model(kind))
    inputs["attention_mask"][0, 8:] = 0
    inputs["input_ids"][0, 8:] = 2
    return inputs


def projected(kind: str, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What the first block's projections give in the model as it is: [B, H, L, D] of each batch."""
    model = tiny_model(kind)
    block = find_chain(model).holder[0]
    ends = {"query": ("query", "q_proj"), "key": ("key", "k_proj"), "value": ("value", "v_proj")}
    found: dict[str, list[Tensor]] = {name: [] for name in ends}
    for name, leaves in ends.items():
        (module,) = (m for leaf, m in block.named_modules() if leaf.rpartition(".")[2] in leaves)
        module.register_forward_hook(lambda m, a, out, n=name: found[n].append(out.unflatten(-1, (-1, D)).mT.mT))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: [x.transpose(1, 2) for x in seen] for name, seen in found.items()}


QKV = {"bert": [".*query", ".*key", ".*value"], "vit": ["q_proj", "k_proj", "v_proj"]}


# ---- ranges


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_range_reaches_to_the_largest_value_of_all_tokens(kind: str) -> None:
    batches = [padded(kind), tiny_inputs(tiny_model(kind), seed=1)] if kind == "bert" else []
    batches = batches or [tiny_inputs(tiny_model(kind), seed=seed) for seed in (0, 1)]
    masks = [batch.get("attention_mask", torch.ones(2, 17)).bool() for batch in batches]
    made = calibrate(kind, batches, modules_to_not_convert=QKV[kind])
    for name, seen in projected(kind, batches).items():
        peaks = [x.transpose(1, 2)[mask].abs().max() for x, mask in zip(seen, masks, strict=True)]
        top = TensorSpec("int8", Blocks(-1, -1)).numbers().top
        assert torch.equal(made.operands().scale[OPERANDS.index(name)], max(peaks) / top)


@pytest.mark.parametrize("grid", ["int4", "e2m1"])
def test_probabilities_are_those_of_queries_and_keys_that_are_quantized(grid: str) -> None:
    batch = padded("bert")
    made = calibrate("bert", [batch], grid=grid, modules_to_not_convert=QKV["bert"])
    q, k = (projected("bert", [batch])[name][0] for name in PRODUCTS[0])
    keep = batch["attention_mask"].bool()

    def largest(q: Tensor, k: Tensor) -> float:
        scores = (q @ k.mT / D**0.5).masked_fill(~keep[:, None, None], -torch.inf)
        return float(scores.softmax(-1).transpose(1, 2)[keep].max())

    scales, spec = made.operands().scale, made.operands().specs["query"].tensor
    coarse = (static_round_trip(x, spec, InputParams(scales[n : n + 1])) for n, x in enumerate((q, k)))
    assert made.largest("probability") == pytest.approx(largest(*coarse), rel=1e-5)
    assert made.largest("probability") != pytest.approx(largest(q, k), rel=1e-3), "or this shows nothing"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_does_not_count(kind: str) -> None:
    """A padded batch gives the ranges of its sequences, one by one and without padding."""
    lengths = (8, 13)
    ids = torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    together = calibrate(kind, [{"input_ids": ids, "attention_mask": mask}])
    apart = calibrate(kind, [{"input_ids": ids[n : n + 1, :length]} for n, length in enumerate(lengths)])
    unmasked = calibrate(kind, [{"input_ids": ids}])
    for name in ("query", "key", "value"):
        assert together.largest(name) == pytest.approx(apart.largest(name), rel=1e-5)
        assert together.largest(name) < unmasked.largest(name), "or this shows nothing"


def test_ranges_at_run_time_need_no_search() -> None:
    made = calibrate("llama", [tiny_inputs(tiny_model("llama"))], dynamic=True)
    assert all(spec.dynamic for spec in made.operands().specs.values())
    assert torch.equal(made.operands().scale, torch.ones(4))


# ---- what a search is told


def test_a_search_sees_both_operands_with_as_many_heads() -> None:
    ASKED.clear()
    batch = padded("llama")
    made = calibrate("llama", [batch], ranges="asking")
    keep, count = batch["attention_mask"].bool(), int(batch["attention_mask"].sum())
    name = next(iter(made.config.attention))
    mine = {operand: [(s, c) for s, c in ASKED if s.name == f"{name} ({operand})"] for operand in OPERANDS}
    assert [len(asked) for asked in mine.values()] == [2] * 4, "it ends when a round changes nothing"
    for pair in PRODUCTS:
        for one, other in (pair, pair[::-1]):
            (seen, _), (others, choice) = mine[one][-1], mine[other][-1]
            (exact,), (quantized,) = seen.weights, seen.quantized
            assert choice.params is not None and torch.equal(exact, others.sample)
            assert torch.equal(quantized, static_round_trip(exact, choice.tensor, choice.params))
            assert seen.hist is not None and seen.absmax == seen.hist.absmax
            assert seen.absmax == pytest.approx(made.largest(one), rel=1e-6)
            assert len(seen.sample) == len(exact) == 2 * HEADS and seen.sample.shape[2] == exact.shape[2]
    first = mine["query"][0][0]
    assert torch.equal(first.quantized[0], first.weights[0]), "nothing is known of the other one yet"
    keys, values = mine["key"][0][0], mine["value"][0][0]
    for shared in (keys, values):
        assert torch.equal(shared.sample[0::2], shared.sample[1::2]) and not shared.sample[0].equal(shared.sample[2])
    heads = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
    for operand, number in heads.items():
        assert mine[operand][0][0].hist.total == count * number * D
    assert mine["probability"][0][0].hist.total == count * HEADS * LENGTH
    assert not keys.sample[:HEADS, ~keep[0]].any() and keys.sample[:HEADS, keep[0]].all(-1).any()
    assert not values.sample[:HEADS, :, ~keep[0]].any()
    chances = mine["probability"][0][0].sample.sum(-1).unflatten(0, (2, HEADS))
    assert torch.allclose(chances, keep[:, None].float().expand_as(chances), atol=1e-5)


def test_samples_of_sequences_of_all_lengths_fit_together() -> None:
    ASKED.clear()
    ids = tiny_inputs(tiny_model("bert"))["input_ids"]
    calibrate("bert", [{"input_ids": ids[:1, :5]}, {"input_ids": ids[1:]}], ranges="asking")
    shapes = {seen.name.split("(")[1]: tuple(seen.sample.shape) for seen, _ in ASKED if "(" in seen.name}
    long, both = LENGTH, 2 * HEADS
    assert shapes == {
        "query)": (both, long, D),
        "key)": (both, long, D),
        "probability)": (both, long, long),
        "value)": (both, D, long),
    }


# ---- the order of the work


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "gpt2", "mixtral"])
def test_the_matrices_after_attention_are_known(kind: str) -> None:
    model = tiny_model(kind)
    use(model)
    chain = find_chain(model)
    call, hidden = first_call(model, chain, tiny_inputs(model))
    targets = {target.name for target in survey(model, None, False)[0]}
    name, block = chain.names()[0], chain.holder[0]

    def run() -> Any:
        return call.run(block, hidden)

    with torch.no_grad(), note_callers() as callers:
        groups = trace(name, block, targets, run)
        (product,) = find_products(name, block, groups, run)
    assert callers == [product.module] and model.get_submodule(product.name) is product.module
    before = [group for group in groups if id(group) not in product.after]
    assert groups[: len(before)] == before and len(before) == 1, "the projections of query, key and value"
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("act", [False, True], ids=["weights", "inputs too"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_statistics_behind_attention_are_those_of_quantized_attention(kind: str, act: bool) -> None:
    GRAMS.clear()
    batch = padded(kind)
    made = calibrate(kind, [batch], grid="int4", rounder="watching", act=act)
    name = {"llama": "model.layers.0.self_attn.o_proj", "bert": "bert.encoder.layer.0.attention.output.dense"}[kind]
    seen: list[Tensor] = []
    made.model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        made.model(**batch)
        leave(made.model)
        made.model(**batch)
    keep = batch["attention_mask"].bool()
    quantized, plain = (x[keep] for x in seen)
    given = made.config.recipe.scheme.input
    if given is not None:  # then statistics are those of what the layer sees of its input
        peak = float(quantized.abs().max())
        quantized = static_round_trip(quantized, given.tensor, input_params(-peak, peak, given.tensor))
    found, expected = GRAMS[name].gram, quantized.double().T @ quantized.double()
    assert found is not None and (found - expected).norm() <= 1e-5 * expected.norm()
    assert torch.allclose(GRAMS[name].absmax, quantized.abs().amax(0), rtol=1e-5)
    assert (plain.double().T @ plain.double() - expected).norm() > 1e-2 * expected.norm(), "or this shows nothing"


def test_every_block_has_its_operands_and_a_remark() -> None:
    made = calibrate("llama", [tiny_inputs(tiny_model("llama"))])
    names = [f"model.layers.{number}.self_attn" for number in range(LAYERS)]
    assert list(made.config.attention) == names
    for name, finding in zip(names, made.findings, strict=False):
        operands = made.model.get_submodule(f"{name}.{CHILD}")
        assert isinstance(operands, Operands) and operands.record() == made.config.attention[name]
        assert operands.watcher is None and not operands.training
        assert any(note.startswith(f"{name}: query int8") for note in finding.notes)


def test_values_that_overflow_are_reported_with_their_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Operands.forward

    def spoiled(self: Operands, name: str, x: Tensor) -> Tensor:
        return original(self, name, x * torch.inf if name == "key" else x)

    monkeypatch.setattr(Operands, "forward", spoiled)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn \(key\)"):
        calibrate("llama", [tiny_inputs(tiny_model("llama"))])
