"""Layers that read one tensor run in one call, and nobody can tell: same bits, same names, same weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hfquant
from hfquant import HfQuantConfig, SpecError, ops, use_kernel
from hfquant.blocks import Blocks
from hfquant.nn import QEmbedding, QLinear
from hfquant.qtensor import InputParams
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.swap import swap_out
from hfquant.testing.tiny import tiny_inputs, tiny_model
from hfquant.together import FEW_ROWS

GROUPS = TensorSpec("int4", Blocks(1, 16))
INTEGERS = TensorSpec("int8", Blocks(1, -1))
RECIPES = {
    "int4": Scheme(GROUPS),
    "nf4, double quantization": Scheme(TensorSpec("nf4", Blocks(1, 16), scale=TensorSpec("dyn8", Blocks(1, 256)))),
    "uint3, tiles": Scheme(TensorSpec("uint3", Blocks(16, 32), zero=True, scale="bfloat16")),
    "quantile4": Scheme(TensorSpec("quantile4", Blocks(1, 64))),
    "w8a8": Scheme(INTEGERS, InputSpec(INTEGERS)),
    "w8a8, static": Scheme(INTEGERS, InputSpec(TensorSpec("int8", Blocks(-1, -1)), dynamic=False)),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int, columns: int = 64, scheme: Scheme | None = None, bias: bool = True, seed: int = 0) -> QLinear:
    scheme = scheme or RECIPES["int4"]
    made = QLinear(columns, rows, nn.Parameter(drawn(rows, seed=seed + 7)) if bias else None, torch.float32)
    made.kind = "linear"
    static = InputParams(torch.tensor([0.03])) if scheme.input is not None and not scheme.input.dynamic else None
    recipe = Recipe(scheme)
    made.hold(*pack(quantize_linear(drawn(rows, columns, seed=seed), recipe), recipe, static))
    return made


def trio(**options) -> nn.Module:
    """Three layers with one size of inputs, and another one."""
    holder = nn.Module()
    for seed, (name, rows) in enumerate({"q": 40, "k": 24, "v": 24}.items()):
        holder.add_module(name, layer(rows, seed=seed, **options))
    holder.add_module("o", layer(16, columns=40, seed=5))
    return holder


def optimized(**options) -> nn.Module:
    """`trio` once it has learned who reads what."""
    holder = trio(**options)
    (row,) = hfquant.optimize(holder)
    assert row.layers == ("q", "k", "v") and row.declined == () and row.seen() == []
    with torch.no_grad():
        parts(holder, drawn(1, 64))
    assert row.seen() == [("q", "k", "v")]
    return holder


def parts(holder: nn.Module, x: Tensor) -> list[Tensor]:
    return [getattr(holder, name)(x) for name in "qkv"]


def apart(holder: nn.Module, x: Tensor) -> list[Tensor]:
    """The same through the operator, which knows no siblings."""
    return [ops.linear(x, m.packed(), m.bias, m.key) for m in (holder.q, holder.k, holder.v)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def calls(count_calls: Callable[[str], list[int]]) -> list[int]:
    """How many products each call of several had."""
    return count_calls("jobs")


@pytest.mark.parametrize("name", RECIPES)
def test_one_call_computes_all_to_the_same_bits(name: str, calls: list[int]) -> None:
    @given(
        rows=st.sampled_from([(1,), (1, 1), (2, 3), (FEW_ROWS,)]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        mode=st.sampled_from([torch.no_grad, torch.inference_mode]),
        seed=st.integers(0, 99),
    )
    def check(rows: tuple[int, ...], dtype: torch.dtype, mode: Callable, seed: int) -> None:
        calls.clear()
        with mode():
            for turn in range(3):
                x = drawn(*rows, 64, seed=seed + turn).to(dtype)
                y = parts(holder, x)
                assert_same(y, apart(holder, x))
                assert all(part.is_contiguous() for part in y)
        assert calls == [3, 3, 3]

    holder = optimized(scheme=RECIPES[name], bias=name != "quantile4")
    calls.clear()
    check()


@torch.no_grad()
def test_many_rows_and_watched_inputs_run_layer_by_layer(calls: list[int]) -> None:
    holder = optimized()
    calls.clear()
    many, few = drawn(FEW_ROWS + 1, 64), drawn(1, 64)
    assert_same(parts(holder, many), apart(holder, many))
    with torch.enable_grad():
        x = few.clone().requires_grad_()
        sum(part.square().sum() for part in parts(holder, x)).backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert all(holder.get_submodule(name).bias.grad.abs().sum() > 0 for name in "qkv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(part.dtype == torch.bfloat16 for part in parts(holder, few))
    assert calls == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_changes_in_between_is_another_input(mode: Callable) -> None:
    holder = optimized()
    with mode():
        x = drawn(1, 64, seed=1)
        expected = apart(holder, x)
        first = holder.q(x)
        x.mul_(2)
        changed = apart(holder, x)
        assert_same([first, holder.k(x), holder.v(x)], [expected[0], *changed[1:]])
        assert_same([holder.k(x), holder.k(x), *parts(holder, x)], [changed[1], changed[1], *changed])
        assert torch.equal(holder.v(x.clone()), changed[2])


@torch.no_grad()
def test_a_layer_that_changes_in_between_computes_its_own() -> None:
    holder = optimized()
    x, other = drawn(1, 64, seed=1), layer(24, seed=9)
    for change in (
        lambda: setattr(holder.k, "weight", drawn(24, 64, seed=20)),
        lambda: holder.k.load_state_dict(other.state_dict()),
        lambda: holder.k._parameters["scale"].mul_(3),
        lambda: holder.k.bias.copy_(drawn(24, seed=21)),
        lambda: setattr(holder, "k", copy.deepcopy(other)),
        lambda: setattr(holder, "k", layer(24, seed=31)),
    ):
        before = holder.q(x)
        change()
        assert_same([before, holder.k(x), holder.v(x)], apart(holder, x))
        assert_same(parts(holder, x), apart(holder, x))
    holder.q(x)
    with use_kernel("reference"):
        assert torch.equal(holder.k(x), apart(holder, x)[1])
    holder.to(torch.bfloat16)
    assert_same(parts(holder, x.bfloat16()), apart(holder, x.bfloat16()))


@torch.no_grad()
def test_layers_with_inputs_of_their_own_stop_waiting_for_each_other(calls: list[int]) -> None:
    """As in attention to another sequence: the query reads one tensor, key and value the other."""
    holder = optimized()
    calls.clear()
    for turn in range(4):
        x, other = drawn(1, 64, seed=turn), drawn(1, 64, seed=50 + turn)
        y = [holder.q(x), holder.k(other), holder.v(other)]
        assert_same(y, [apart(holder, x)[0], *apart(holder, other)[1:]])
    assert calls == [3, 2, 2, 2]  # once in vain; then key and value, from the second time on


@torch.no_grad()
def test_neither_inputs_nor_results_are_kept(calls: list[int]) -> None:
    holder = optimized()
    calls.clear()
    x = drawn(1, 64, seed=1)
    held = [weakref.ref(x), weakref.ref(holder.q(x))]  # the others are computed, and never asked for
    assert calls == [3]
    together, _ = holder.q._together
    waiting = together._round.ready
    assert len(waiting) == 2
    held += [weakref.ref(y) for y, _ in waiting.values()]
    del x
    assert not waiting and [reference() for reference in held] == [None] * 4
    parts(holder, drawn(1, 64, seed=2))
    assert not together._round.ready


@torch.no_grad()
def test_a_layer_dies_with_its_model() -> None:
    holder = optimized()
    held = weakref.ref(holder.k)
    holder.k = nn.Identity()
    gc.collect()
    x = drawn(1, 64)
    assert held() is None and torch.equal(holder.q(x), apart(trio(), x)[0])


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_copies_run_their_own_weights(how: Callable, calls: list[int]) -> None:
    holder = optimized()
    other, x = how(holder), drawn(1, 64, seed=1)
    holder.q(x)
    other.k.weight = torch.zeros(24, 64)
    calls.clear()
    for _ in range(2):
        assert_same(parts(other, x), apart(other, x))
    assert calls == [3] and other.q._together[0] is not holder.q._together[0]
    alone = copy.deepcopy(holder.k)
    assert torch.equal(alone(x), apart(holder, x)[1])


@torch.no_grad()
def test_hooks_see_each_layer() -> None:
    holder, x = optimized(), drawn(1, 64, seed=1)
    expected = apart(holder, x)
    holder.k.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    holder.v.register_forward_hook(lambda module, given, y: y.add_(1))
    for _ in range(2):
        y = parts(holder, x)
        assert_same(y, [expected[0], apart(holder, 2 * x)[1], expected[2] + 1])


def test_threads_do_not_mix_their_inputs() -> None:
    holder = optimized()
    inputs = [drawn(1, 64, seed=seed) for seed in range(4)]
    expected, wrong = [apart(holder, x) for x in inputs], []

    def work(number: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(150):
                x = inputs[number].clone() if number else inputs[0]
                if not all(torch.equal(a, b) for a, b in zip(parts(holder, x), expected[number], strict=True)):
                    wrong.append(number)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 0, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert wrong == []


def test_what_cannot_run_together_is_said() -> None:
    holder = trio()
    spec = holder.q.spec
    packed = {**dict(zip(spec.names, holder.q.packed(), strict=True)), "order": torch.arange(64).flip(0).int()}
    holder.q.hold(packed, replace(spec, names=(*spec.names, "order")))
    holder.k.to("meta")
    holder.v.double().dtype = torch.float64
    (row,) = hfquant.optimize(holder)
    assert row.layers == () and row.seen() == []
    assert [reason.partition(":")[0] for reason in row.declined] == ["q", "k", "v"]
    said = ("reordered", "offloaded", "kernel 'reference' runs one layer at a time")
    assert all(words in reason for words, reason in zip(said, row.declined, strict=True))
    with pytest.raises(SpecError, match="no quantized linear layers"):
        hfquant.optimize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def decoded(model: nn.Module, steps: int = 4) -> list[Tensor]:
    """Logits of a prompt and of the tokens after it."""
    ids = tiny_inputs(model)["input_ids"][:1]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        found = [out.logits]
        for _ in range(steps):
            out = model(found[-1][:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_language_models_decode_the_same(kind: str, tmp_path, calls: list[int]) -> None:
    tiny_model(kind, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=HfQuantConfig("int4"))
    expected, names = decoded(model), list(model.state_dict())
    rows = hfquant.optimize(model, exact=True)
    calls.clear()
    assert_same(decoded(model), expected)
    seen = {(row.module.rpartition(".")[2], names) for row in rows for names in row.seen()}
    assert seen == {("self_attn", ("q_proj", "k_proj", "v_proj"))} | (
        {("mlp", ("gate_proj", "up_proj"))} if kind != "mixtral" else set()
    )
    assert calls.count(3) >= 2 * 3 and list(model.state_dict()) == names
    assert_same(decoded(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path / "saved")
    assert_same(decoded(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_output_layer_and_embeddings_decode_quantized_on_request(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    config = HfQuantConfig("int4", group_size=16, modules_to_not_convert=[], embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    assert isinstance(model.lm_head, QLinear) and isinstance(model.get_input_embeddings(), QEmbedding)
    rows = {row.layer: row.kernel for row in hfquant.explain(model)}
    assert rows["lm_head"] == "cpu" and set(rows.values()) == {"cpu"}
    hfquant.optimize(model, exact=True)
    found = decoded(model)
    plain = copy.deepcopy(model)
    swap_out(plain)
    for ours, theirs in zip(found, decoded(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert_same(decoded(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), found)


def test_encoders_too(tmp_path, calls: list[int]) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=HfQuantConfig("nf4"))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(ids).logits
        rows = hfquant.optimize(model)
        assert all(torch.equal(model(ids).logits, expected) for _ in range(3))
    assert {names for row in rows for names in row.seen()} == {("query", "key", "value")}
    assert calls.count(3) == 2 * 2


@pytest.mark.parametrize("first", ["adapters", "optimize"])
def test_adapters_wrap_what_runs_together(first: str, tmp_path, calls: list[int]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("int4"))
    plain = copy.deepcopy(model)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if first == "optimize":
        hfquant.optimize(model, exact=True)
    torch.manual_seed(0)
    tuned = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    reference = get_peft_model(plain, config).eval()
    if first == "adapters":
        hfquant.optimize(tuned, exact=True)
    assert_same(decoded(tuned), decoded(reference))
    assert 3 in calls
    results = []
    for one in (tuned, reference):
        ids = tiny_inputs(one)["input_ids"]
        one(input_ids=ids, labels=ids).loss.backward()
        results.append([p.grad for p in one.parameters() if p.requires_grad])
    assert_same(*results)
    assert_same(decoded(tuned.merge_and_unload()), decoded(reference.merge_and_unload()))


@torch.no_grad()
def test_an_optimized_model_compiles() -> None:
    holder = optimized()
    x = drawn(1, 64, seed=3)
    compiled = torch.compile(lambda x: parts(holder, x), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), apart(holder, x))
