"""QA-LoRA: A stays constant within groups whatever an optimizer does, and its merge is exact."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import hfquant
from hfquant import HfQuantConfig
from hfquant.blocks import Blocks
from hfquant.errors import SpecError, UnsupportedError
from hfquant.lora.groups import Groups
from hfquant.lora.pooled import merge_exact, merged_bits, tie_groups
from hfquant.nn import QEmbedding, QLinear
from hfquant.qtensor import Outliers, QTensor
from hfquant.quantize import for_table, pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.swap import packed_modules, swap_out

MODELS = Path(__file__).parents[2] / "models"
TRAINED = MODELS / "tiny-llama"
NESTED = TensorSpec("uint8", Blocks(1, 8))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """A packed layer between two that are not."""

    def __init__(self, q: QTensor, recipe: Recipe, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        n, k = q.shape
        offset = nn.Parameter(normal(n, seed=5).to(dtype)) if bias else None
        self.layer = QLinear(k, n, offset, dtype)
        self.layer.kind = "linear"
        self.layer.hold(*pack(q, recipe))
        self.after = nn.Linear(n, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x))


def small(
    grid: str = "int4", width: int = 8, shape: tuple[int, int] = (6, 44), seed: int = 0, scale: Any = "bfloat16",
    order: bool = False, outliers: int = 0, **how: Any,
) -> Small:  # fmt: skip
    recipe = Recipe(Scheme(TensorSpec(grid, Blocks(1, width), grid.startswith("uint"), scale)))
    q = quantize_linear(normal(*shape, seed=seed) + 0.3, recipe)
    if order:
        q = replace(q, order=torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)).int())
    if outliers:
        index = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed + 1))[:outliers].sort().values
        q = replace(q, outliers=Outliers(index.int(), normal(shape[0], outliers, seed=seed + 2).bfloat16()))
    return Small(q, recipe, **how)


def adapted(model: nn.Module, names: tuple[str, ...] = ("default",), **options: Any) -> PeftModel:
    """Adapters, random and tied."""
    config = LoraConfig(**{"r": 3, "target_modules": ["layer"], "init_lora_weights": False, **options})
    made = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, copy.deepcopy(config))
    made.base_model.set_adapter(list(names))
    tie_groups(made)
    return made


@st.composite
def problems(draw: st.DrawFn) -> tuple[Small, dict[str, Any]]:
    grid = draw(st.sampled_from(["int2", "int3", "int4", "int4n", "int8", "uint2", "uint4", "uint5", "uint8"]))
    model = small(
        grid, draw(st.sampled_from([-1, 1, 4, 5, 16])), draw(st.tuples(st.integers(1, 9), st.integers(5, 40))),
        draw(st.integers(0, 99)), draw(st.sampled_from(["float32", "float16", "bfloat16", NESTED])),
        draw(st.booleans()), draw(st.integers(0, 4)),
    )  # fmt: skip
    options = {"names": draw(st.sampled_from([("one",), ("one", "two")])), "use_rslora": draw(st.booleans())}
    return model, options | {"lora_bias": draw(st.booleans()), "lora_alpha": draw(st.sampled_from([1, 20]))}


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_merged_weight_is_the_sum_in_float64(problem: tuple[Small, dict[str, Any]]) -> None:
    model, options = problem
    before, kept = model.layer.qtensor(), dict(zip(model.layer.spec.names, model.layer.packed(), strict=True))
    old_bias = model.layer.bias.detach().clone()
    tuned = adapted(model, **options)
    layer = tuned.base_model.model.layer
    exact, size, bias = before.dequantize().double(), before.dequantize().abs(), old_bias.double()
    for name in options["names"]:
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name]
        change = layer.scaling[name] * (b.weight.detach().double() @ a.double())
        exact, size = exact + change, size + change.abs().float()
        bias = bias + (layer.scaling[name] * b.bias.detach().double() if options["lora_bias"] else 0)
        if before.outliers is not None:
            assert not a[:, before.outliers.index.long()].any()
    x = normal(7, before.shape[1], seed=3)
    bits, wanted = merged_bits(tuned), tuned(x)
    merged = merge_exact(tuned)
    after = merged.layer.qtensor()
    # Codes count from 0, so that numbers up to the size of a code are rounded.
    step = before.spec.blocks.expand(before.scale_values(), before.shape) * (after.spec.numbers().size + 1)
    if before.order is not None:
        step = torch.empty_like(step.expand(before.shape)).index_copy_(
            1, before.order.long(), step.expand(before.shape)
        )
    assert ((after.dequantize() - exact).abs() <= 3e-7 * (size + step)).all()
    torch.testing.assert_close(merged.layer.bias.double(), bias, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), wanted, rtol=1e-5, atol=2e-5)
    stored = dict(zip(merged.layer.spec.names, merged.layer.packed(), strict=True))
    assert all(torch.equal(stored[name], tensor) for name, tensor in kept.items() if name != "zero")
    assert after.zero is not None and after.zero.dtype == torch.float32
    assert bits[1] == 8 * sum(t.numel() * t.element_size() for t in stored.values()) / before.codes.numel() > bits[0]


def groups_are_constant(layer: Any, name: str = "default") -> bool:
    """Bit for bit, found without `Groups`."""
    a, base = layer.lora_A[name].weight.detach(), layer.get_base_layer()
    q = base.qtensor()
    kept = set() if q.outliers is None else set(q.outliers.index.tolist())
    order = range(q.shape[1]) if q.order is None else q.order.tolist()
    width = q.spec.blocks.sides(q.shape)[1]
    seen: dict[int, Tensor] = {}
    for place, column in enumerate(order):
        if column not in kept and not torch.equal(seen.setdefault(place // width, a[:, column]), a[:, column]):
            return False
    return not a[:, sorted(kept)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon])
@pytest.mark.parametrize("kind", ["plain", "order", "outliers"])
def test_training_keeps_groups_constant_to_the_last_bit(kind: str, optimizer: Any, dtype: torch.dtype) -> None:
    """With gradient accumulation, clipping, weight decay and dropout; RMSprop in bfloat16 rounds the last columns in
    another way than the others, and Muon mixes all of them."""
    model = small(width=7, order=kind == "order", outliers=3 if kind == "outliers" else 0, dtype=dtype)
    tuned = adapted(model, init_lora_weights=True, lora_dropout=0.2).to(dtype)
    layer = tuned.base_model.model.layer
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    steps = optimizer(parameters, lr=0.05, weight_decay=0.1)
    start = layer.lora_A["default"].weight.detach().clone()
    torch.manual_seed(0)
    for step in range(6):
        for part in range(3):
            tuned(normal(5, 44, seed=3 * step + part).to(dtype)).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 0.3)
        steps.step()
        steps.zero_grad()
        assert groups_are_constant(layer)
    trained = layer.lora_A["default"].weight.detach()
    assert trained.dtype == dtype and not torch.equal(trained, start) and trained.isfinite().all()
    assert len(trained.float().unique(dim=1).T) == 7 + (kind == "outliers")  # groups differ; and there is the 0
    merge_exact(tuned)


def test_gradients_are_the_means_of_the_usual_ones() -> None:
    tuned = adapted(small(width=4, shape=(6, 32)))
    twin = copy.deepcopy(tuned)  # copies of parameters have no hooks
    grads = []
    for model in (tuned, twin):
        model(normal(5, 32)).square().sum().backward()
        grads.append(model.base_model.model.layer.lora_A["default"].weight.grad)
    means = grads[1].view(3, 8, 4).mean(2, keepdim=True).expand(3, 8, 4).reshape(3, 32)
    torch.testing.assert_close(grads[0], means, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2)


def test_tying_again_changes_nothing_and_counts_once() -> None:
    tuned = adapted(small(width=7))
    weight = tuned.base_model.model.layer.lora_A["default"].weight
    before = weight.detach().clone()
    assert tie_groups(tuned) == ["base_model.model.layer"]
    assert torch.equal(weight, before) and len(weight._backward_hooks) == 1


def test_new_adapters_keep_the_distribution_that_peft_chose_and_trained_ones_are_averaged() -> None:
    model = get_peft_model(small(width=4, shape=(6, 32)), LoraConfig(r=3, target_modules=["layer"]))
    layer = model.base_model.model.layer
    chosen = layer.lora_A["default"].weight.detach().clone()
    tie_groups(model)
    assert torch.equal(layer.lora_A["default"].weight, chosen[:, ::4].repeat_interleave(4, 1))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(chosen)
        layer.lora_B["default"].weight.fill_(1)
    tie_groups(model)
    means = chosen.double().view(3, 8, 4).mean(2).float().repeat_interleave(4, 1)
    assert torch.equal(layer.lora_A["default"].weight, means)


def test_only_the_named_adapters_are_merged() -> None:
    tuned = adapted(small(), names=("one", "two"))
    x = normal(4, 44)
    tuned.base_model.set_adapter(["two"])
    wanted = tuned(x).detach()
    tuned.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        torch.testing.assert_close(merge_exact(tuned, ["two"])(x), wanted, rtol=1e-5, atol=1e-5)


def test_merged_layers_take_new_values() -> None:
    layer = merge_exact(adapted(small(width=8))).layer
    codes, w = layer.codes.clone(), layer.weight.clone()
    layer.weight = w
    assert torch.equal(layer.codes, codes) and torch.equal(layer.weight, w)
    layer.weight = w + 0.02 * normal(*w.shape)
    assert float((layer.weight - w).norm() / w.norm()) < 0.2


def test_an_adapter_that_is_not_constant_is_refused_and_nothing_is_changed() -> None:
    tuned = adapted(small())
    with torch.no_grad():
        tuned.base_model.model.layer.lora_A["default"].weight[1, 9] += 1e-3
    before = tuned(normal(4, 44))
    with pytest.raises(UnsupportedError, match=r"base_model.model.layer: A of default differs by up to 0.001"):
        merge_exact(tuned)
    assert torch.equal(tuned(normal(4, 44)), before)
    tie_groups(tuned)
    merge_exact(tuned)


def test_adapters_that_are_not_finite_are_refused() -> None:
    tuned = adapted(small())
    with torch.no_grad():
        tuned.base_model.model.layer.lora_B["default"].weight[1, 1] = torch.inf
    with pytest.raises(UnsupportedError, match=r"model.layer: its zero points would not be finite"):
        merge_exact(tuned)


def rotated() -> Small:
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(1, 8))))
    return Small(quantize_linear(normal(6, 32), recipe, rotated=True), recipe)


def with_inputs() -> Small:
    recipe = Recipe(Scheme(TensorSpec("int8", Blocks(1, -1)), InputSpec(TensorSpec("int8", Blocks(1, -1)))))
    return Small(quantize_linear(normal(6, 32), recipe), recipe)


def tiled() -> Small:
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(2, 8))))
    return Small(quantize_linear(normal(6, 32), recipe), recipe)


def table() -> Small:
    recipe = Recipe(Scheme(TensorSpec("int4", Blocks(1, 8))))
    model = small()
    model.layer = QEmbedding(10, 16, None, torch.float32)  # type: ignore[assignment]
    model.layer.kind = "embedding"
    model.layer.hold(*pack(quantize_linear(normal(10, 16), for_table(recipe)), recipe))
    return model


LORA = LoraConfig(target_modules=["layer"])
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "lookup": (lambda: small("nf4"), LORA, "levels of nf4 are not evenly spaced.*use an integer grid"),
    "rotated": (rotated, LORA, "quantize without the rotation"),
    "inputs": (with_inputs, LORA, "it quantizes its input.*such as int4"),
    "tiles": (tiled, LORA, "its rows share zero points: use groups inside of rows"),
    "embedding": (table, LORA, "leave it out of target_modules"),
    "dora": (small, LoraConfig(target_modules=["layer"], use_dora=True), "variant of LoRA.*use plain LoRA"),
    "adalora": (small, AdaLoraConfig(target_modules=["layer"], total_step=9), "a adalora adapter: use LoraConfig"),
    "bias": (
        lambda: small(bias=False),
        LoraConfig(target_modules=["layer"], lora_bias=True),
        "train without lora_bias",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_exact_is_refused_before_training(kind: str) -> None:
    make, config, message = REFUSED[kind]
    tuned = get_peft_model(make(), config)
    for verb in (tie_groups, merge_exact):
        with pytest.raises(UnsupportedError, match=f"(?s)model.layer: .*{message}"):
            verb(tuned)


def test_a_merged_or_missing_adapter_is_refused() -> None:
    tuned = adapted(small())
    tuned.merge_adapter()
    with pytest.raises(UnsupportedError, match="default was merged, which rounded the weight"):
        merge_exact(tuned)
    with pytest.raises(SpecError, match="takes a PeftModel, got a Small"):
        merge_exact(small())
    with pytest.raises(SpecError, match="no adapter on a quantized linear layer"):
        tie_groups(get_peft_model(small(), LoraConfig(target_modules=["after"])))
    with pytest.raises(SpecError, match="a list of names or None, got 'default'"):
        tie_groups(adapted(small()), "default")


def test_groups_without_any_column_left_are_0() -> None:
    model = small(width=2, shape=(4, 8))
    q = replace(model.layer.qtensor(), outliers=Outliers(torch.tensor([2, 3]).int(), normal(4, 2).bfloat16()))
    model = Small(q, Recipe(Scheme(q.spec)))
    groups = Groups.of(model.layer)
    assert groups.counts.tolist() == [2, 0, 2, 2] and groups.of_column.tolist() == [0, 0, 4, 4, 2, 2, 3, 3]
    assert torch.equal(groups.averaged(torch.ones(1, 8)), torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 1]]))


def in_float64(model: Any) -> Any:
    """A copy with dequantized weights, whose arithmetic adds nothing to what is compared."""
    twin = copy.deepcopy(model)
    swap_out(twin, torch.float64)
    for name, norm in list(twin.named_modules()):
        if isinstance(norm, LlamaRMSNorm):  # which computes in float32 whatever it is given
            exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
            exact.weight = norm.weight
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, exact)
    return twin.double()


def held_out(start: int, rows: int = 4) -> Tensor:
    """Token ids [rows, 32] of held-out text."""
    ids = AutoTokenizer.from_pretrained(TRAINED)((MODELS / "heldout.txt").read_text()[:1000])["input_ids"]
    return torch.tensor(ids[start : start + 32 * rows]).view(rows, 32)


def trained(base: nn.Module, batches: list[Tensor], seed: int = 0, rank: int = 4) -> PeftModel:
    """Adapters in all layers of `base`, trained for a step with each of `batches` at a high rate."""
    torch.manual_seed(seed)
    tuned = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    assert len(tie_groups(tuned)) == 28
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    for text in batches:
        tuned(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def rms(change: Tensor) -> float:
    return float(change.double().square().mean().sqrt())


OPTIONS: dict[str, dict[str, Any]] = {
    "signed": {},
    "unsigned, scales quantized": {"symmetric": False, "double_quant": True},
    "columns in 16 bit": {"outliers": 0.02, "group_size": 32},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_model_is_tuned_saved_merged_and_loaded_again(kind: str, tmp_path: Path) -> None:
    """Merging moves logits by less than 1e-5, found in float64, and in float32 by no more than another kernel does."""
    text = held_out(0)
    options = OPTIONS[kind]
    config = HfQuantConfig("int4", **options)
    base = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32, quantization_config=config)
    untouched = copy.deepcopy(base)
    tuned = trained(base, [text] * 3)
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        learned, start = tuned(text).logits, untouched(text).logits
        assert float((learned - start).norm() / start.norm()) > 0.03
        again = PeftModel.from_pretrained(untouched, tmp_path / "adapter")
        assert torch.equal(again(text).logits, learned)
        exact = in_float64(tuned)(text).logits
        with hfquant.use_kernel("reference"):
            other = float((tuned(text).logits - learned).abs().max())
        before, after = merged_bits(tuned)
        expected = 32 / options.get("group_size", 64) - (4 / 64 if "symmetric" in options else 0)
        assert after - before == pytest.approx(expected, abs=1e-9)
        merged = merge_exact(tuned)
        logits = merged(text).logits
        moved = (in_float64(merged)(text).logits - exact).abs().max()
    off = (logits - learned).abs()
    figures = [float(x) for x in (learned.abs().max(), moved, off.max(), off.mean())]
    print("logits up to {:.1f}, moved by {:.2g}, in float32 {:.2g}, mean {:.2g}".format(*figures), f"or {other:.2g}")
    assert float(moved) <= 1e-5 and float(off.mean()) <= 1e-5
    assert float(off.max()) <= 2 * other  # float32 does not tell merging from adding up in another order
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for (name, here), (_, there) in zip(packed_modules(merged), packed_modules(half), strict=True):
        assert here.spec == there.spec and here.spec.scheme.weight.zero == "float32", name
        assert all(torch.equal(a, b) for a, b in zip(here.packed(), there.packed(), strict=True)), name


@pytest.mark.parametrize(("kind", "seed", "rank"), [(kind, 1 + i, 4 << i) for i, kind in enumerate(OPTIONS)])
def test_merging_is_exacter_than_merging_into_float32_weights(kind: str, seed: int, rank: int) -> None:
    """By PEFT, into the same weights dequantized, where all that moves logits is the rounding of float32, too."""
    config = HfQuantConfig("int4", **OPTIONS[kind])
    base = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32, quantization_config=config)
    text = held_out(0)
    with torch.no_grad():
        start = base(text).logits
    tuned = trained(base, [held_out(128 + 32 * step) for step in range(3)], seed, rank)
    dense = copy.deepcopy(tuned)
    swap_out(dense, torch.float32)
    with torch.no_grad():
        learned, exact, usual = tuned(text).logits, in_float64(tuned)(text).logits, dense(text).logits
        merged = merge_exact(tuned)
        off, moved = merged(text).logits - learned, in_float64(merged)(text).logits - exact
        usual_off = dense.merge_and_unload()(text).logits - usual
    figures = [float(change.abs().max()) for change in (learned - start, moved, off, usual_off)]
    print("learned {:.2f}, moved by {:.2g}, in float32 {:.2g}, by PEFT {:.2g};".format(*figures), end=" ")
    print(f"root mean squares {rms(moved):.2g}, {rms(off):.2g}, {rms(usual_off):.2g}")
    assert figures[0] > 1
    assert figures[1] <= 1e-5 and rms(off) < rms(usual_off)
