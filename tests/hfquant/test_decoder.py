"""Decoder layers that run as a whole: the same numbers but for rounding, and never where they would be other ones."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import hfquant
from hfquant import HfQuantConfig, KVCache, use_kernel
from hfquant.decoder import WholeLayer
from hfquant.decoder_probe import AttentionCall
from hfquant.optimizing import LayerUse
from tests.models import HELDOUT, MODEL_DIR

LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
SIZES: dict[str, Any] = {
    **{
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 176,
    },
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
WHOLE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, with biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "SmolLM3": {"no_rope_layer_interval": 8},
}
OTHER_MLPS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    "Arcee": {},  # up and down, and the square of a ReLU
    "Llama": {"hidden_act": "gelu"},
}
DECLINED: dict[str, tuple[dict[str, Any], str | None]] = {
    "Granite": ({"residual_multiplier": 0.3}, "after attention is something else"),  # same parts, other factors
    "Helium": ({"head_dim": 16}, "query is something else"),  # the same parts, positions that turn other pairs
    "DiffLlama": ({}, "attention twice"),
    "Gemma": ({"head_dim": 16}, "query is something else"),  # its norms' gains are one more than their weights
    "StableLm": ({}, "LayerNorm is no norm with one weight"),
    "Olmoe": (
        {"num_experts": 4, "num_experts_per_tok": 2},
        "no kernel runs it as a whole",
    ),  # a norm over all heads at once
    "Phi3": ({}, "self_attn.q_proj is no quantized linear layer"),
    "Olmo2": ({}, None),  # its norms are elsewhere: no decoder layer of this kind
}


def made(name: str, tmp_path, dtype: torch.dtype = torch.float32, method: str = "int4", **more: Any) -> Any:
    """A quantized model with random weights, none of which does nothing."""
    config = getattr(transformers, f"{name.partition(',')[0]}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter) * 0.15 if parameter.dim() > 1 else torch.rand_like(parameter) * 0.3
            parameter.copy_(drawn) if parameter.dim() > 1 else parameter.add_(drawn)
    model.save_pretrained(tmp_path)
    options = {"group_size": 16} if method == "int4" else {"transform": None} if method == "w8a8" else {}
    quantization = HfQuantConfig(method, modules_to_not_convert=[], **options)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantization)


def whole_rows(rows: list[LayerUse]) -> list[LayerUse]:
    """Those of decoder layers."""
    return [row for row in rows if row.module.rpartition(".")[2].isdigit()]


def pair(tmp_path, name: str = "Llama", **options: Any) -> tuple[Any, Any, list[LayerUse]]:
    """A model, the same optimized, and what was said of its decoder layers."""
    model = made(name, tmp_path, **options)
    other = copy.deepcopy(model)
    return model, other, whole_rows(hfquant.optimize(other))


def decoded(
    model: Any, batch: int = 1, steps: int = 5, cache: Any = None, seed: int = 1, **options: Any
) -> list[Tensor]:
    """Logits of a prompt and of fixed tokens after it."""
    ids = torch.randint(3, 250, (batch, 12 + steps), generator=torch.Generator().manual_seed(seed))
    with nullcontext() if torch.is_inference_mode_enabled() else torch.no_grad():
        return list(_logits(model, ids, cache, options))


def _logits(model: Any, ids: Tensor, cache: Any, options: dict[str, Any]) -> Iterator[Tensor]:
    out = model(ids[:, :12], past_key_values=cache, use_cache=True, **options)
    yield out.logits
    for step in range(12, ids.shape[1]):
        out = model(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        yield out.logits


def off(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def calls(count_calls: Callable[[str], list[int]]) -> list[int]:
    """How many steps each call of the library had."""
    return count_calls("steps")


BEFORE, AFTER, DECODE = 6, 8, 9  # steps
CHAINED = DECODE + BEFORE


@pytest.mark.parametrize("name", WHOLE)
def test_decoder_layers_run_as_a_whole(name: str, tmp_path, calls: list[int]) -> None:
    model, other, rows = pair(tmp_path, name, **WHOLE[name])
    assert [(row.layers, row.declined, row.seen()) for row in rows] == [(LAYERS, (), [])] * 2
    calls.clear()
    for batch in (1, 2):
        assert off(decoded(other, batch), decoded(model, batch)) < 5e-6
    assert [row.seen() for row in rows] == [[LAYERS]] * 2
    norms = 2 if name.startswith("Qwen3") else 0
    alone = (
        set() if name == "Mistral" else {DECODE, CHAINED + norms}
    )  # a window that is shorter than the text is a mask
    assert set(calls) == {BEFORE + norms, AFTER} | alone


@pytest.mark.parametrize("name", OTHER_MLPS)
def test_other_mlps_are_called_in_between(name: str, tmp_path, calls: list[int]) -> None:
    model, other, rows = pair(tmp_path, name, **OTHER_MLPS[name])
    assert [(row.layers, row.declined) for row in rows] == [(LAYERS[:4], ())] * 2
    calls.clear()
    for batch in (1, 2):
        assert off(decoded(other, batch), decoded(model, batch)) < 5e-6
    assert [row.seen() for row in rows] == [[LAYERS[:4]]] * 2
    norms = 2 if name.startswith("Qwen3") else 0
    assert set(calls) == {BEFORE + norms, 3, 4}
    for one in (model, other):
        one.model.layers[0].mlp.register_forward_hook(add_one)
        one.model.layers[1].mlp = nn.Identity()
    assert off(decoded(other), decoded(model)) < 5e-6


@pytest.mark.parametrize("name", DECLINED)
def test_other_layers_are_told_from_what_they_compute(name: str, tmp_path, calls: list[int]) -> None:
    more, reason = DECLINED[name]
    model, other, rows = pair(tmp_path, name, **more)
    calls.clear()
    assert same(decoded(other), decoded(model)) and calls == []
    assert [row.layers for row in rows] == ([] if reason is None else [()] * 2)
    assert all(reason in row.declined[0] for row in rows)


@pytest.mark.parametrize("method", ["nf4", "int8", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_as_often_as_before(method: str, dtype: torch.dtype, tmp_path) -> None:
    """Nobody knows which of two roundings is better, but float32 knows how good both are."""
    model, other, rows = pair(tmp_path, dtype=dtype, method=method)
    exact = nn.Module.float(copy.deepcopy(model))
    errors = torch.zeros(2)
    for seed in range(6):
        wanted = decoded(exact, 2, seed=seed)
        for number, one in enumerate((other, model)):
            found = zip(decoded(one, 2, seed=seed), wanted, strict=True)
            errors[number] += sum((a.float() - b).square().sum() for a, b in found)
    assert [row.seen() for row in rows] == [[LAYERS]] * 2
    assert 0 < errors[0] < 1.05 * errors[1]


@torch.no_grad()
def test_the_trained_model_writes_the_same(tmp_path) -> None:
    config = HfQuantConfig("int4", group_size=32, modules_to_not_convert=[])
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, quantization_config=config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = tokenizer(HELDOUT.read_text()[:400], return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 24, "min_new_tokens": 24}
    expected = [model.generate(ids, do_sample=False, **greedy), model.generate(ids, num_beams=3, **greedy)]
    rows = hfquant.optimize(model)
    assert same([model.generate(ids, do_sample=False, **greedy), model.generate(ids, num_beams=3, **greedy)], expected)
    assert all(row.seen() == [LAYERS] for row in whole_rows(rows))


def static(model: Any, batch: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=32)


CACHES: dict[str, Callable[[Any, int], Any]] = {
    "dynamic": lambda model, batch: transformers.DynamicCache(config=model.config),
    "static": static,
    "of few bits": lambda model, batch: KVCache(model.config, keys="int8", values="int8", residual=4),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "hfquant", "hfquant_kv"])
def test_caches_and_attentions_are_those_of_the_model(cache: str, attention: str, tmp_path, calls: list[int]) -> None:
    model, other, _ = pair(tmp_path, num_hidden_layers=3)
    for one in (model, other):
        one.set_attn_implementation(attention)
    made = [CACHES[cache](one, 2) for one in (model, other)]
    calls.clear()
    ours = decoded(other, 2, cache=made[1])
    assert (calls == []) is (attention == "eager")  # which is code of the model's own
    assert (DECODE in calls) is (attention == "sdpa" and cache != "static")  # with a mask for what is not there yet
    assert off(ours, decoded(model, 2, cache=made[0])) < (2e-2 if cache == "of few bits" else 5e-6)


def test_padded_texts_see_their_masks(tmp_path) -> None:
    model, other, _ = pair(tmp_path)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :2] = 0, 0
    ours, theirs = (decoded(one, 3, steps=0, attention_mask=mask)[0] for one in (other, model))
    assert off([ours[mask.bool()]], [theirs[mask.bool()]]) < 5e-6


def test_long_texts_leave_attention_to_torch(tmp_path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfquant.cpu.steps, "NEAR", 14)
    model, other, _ = pair(tmp_path)
    calls.clear()
    assert off(decoded(other), decoded(model)) < 5e-6
    assert calls.count(CHAINED) == 1  # two tokens; the first of them shows which layer follows
    assert calls.count(AFTER) == 2 * (1 + 3)


def test_results_that_were_asked_for_are_all_there(tmp_path) -> None:
    model, other, _ = pair(tmp_path)
    decoded(other)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        ours, theirs = (m(ids, output_hidden_states=True, output_attentions=False) for m in (other, model))
        assert len(ours.hidden_states) == 3 and off(ours.hidden_states, theirs.hidden_states) < 5e-6
        for one in (model, other):
            one.set_attn_implementation("eager")
        ours, theirs = (m(ids, output_attentions=True) for m in (other, model))
    assert len(ours.attentions) == 2 and same(ours.attentions, theirs.attentions)


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook inside": lambda m: m.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, x, y: 2 * y),
    "a hook on attention": lambda m: m.model.layers[1].self_attn.register_forward_pre_hook(lambda *a: None),
    "another forward inside": lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x),
    "another module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "another norm": lambda m: setattr(m.model.layers[1], "input_layernorm", nn.Identity()),
    "training": lambda m: m.train(),
    "adapters": lambda m: get_peft_model(m, LoraConfig(target_modules=["k_proj", "up_proj"], init_lora_weights=False)),
}


@pytest.mark.parametrize("how", WATCHED)
def test_who_watches_or_changes_parts_gets_the_code_of_the_model(how: str, tmp_path) -> None:
    model, other, _ = pair(tmp_path)
    decoded(other)
    for one in (model, other):
        torch.manual_seed(0)
        WATCHED[how](one)
    assert off(decoded(other), decoded(model)) < 5e-6
    assert not same(decoded(model), decoded(made("Llama", tmp_path))) or how in ("training", "a hook on attention")
    for layer in (layer.__dict__["forward"] for layer in other.model.layers):
        assert isinstance(layer, WholeLayer)


def test_gradients_autocast_and_other_kernels_take_the_long_way(tmp_path, calls: list[int]) -> None:
    model, other, _ = pair(tmp_path)
    decoded(other)
    calls.clear()
    grads = []
    for one in (model, other):
        x = one.get_input_embeddings()(torch.arange(3, 9)[None]).detach().requires_grad_()
        one(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(decoded(other), decoded(model))
    with use_kernel("reference"):
        assert same(decoded(other), decoded(model))
    assert calls == []
    assert off(decoded(other), decoded(model)) < 5e-6 and calls != []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", torch.ones(176, 64)),
        lambda m: m.model.layers[1].self_attn.k_proj._parameters["scale"].mul_(2),
        lambda m: m.model.layers[1].input_layernorm.weight.mul_(2),
        lambda m: setattr(m.model.layers[0].post_attention_layernorm, "weight", nn.Parameter(torch.rand(64))),
        lambda m: setattr(m.model.layers[0].mlp.down_proj.bias, "data", torch.rand(64)),
        lambda m: m.model.layers[0].self_attn.v_proj.bias.add_(1),
        lambda m: m.bfloat16(),
        lambda m: setattr(m.model.layers, "_modules", dict(zip("01", reversed(m.model.layers), strict=True))),
    ],
)
@torch.no_grad()
def test_changes_count_from_the_next_token_on(change: Callable[[Any], Any], tmp_path) -> None:
    model, other, _ = pair(tmp_path, attention_bias=True, mlp_bias=True)
    before = decoded(other)
    for one in (model, other):
        torch.manual_seed(0)
        change(one)
    after = decoded(other)
    assert off(after, decoded(model)) < (3e-2 if after[0].dtype == torch.bfloat16 else 5e-6)
    assert not same([one.float() for one in after], before)


def add_one(module: nn.Module, given: Any, y: Tensor) -> Tensor:
    return y + 1


def change_in_place(module: nn.Module, given: Any, y: Tensor) -> None:
    y.add_(1)


def change_weights(module: nn.Module, given: Any) -> None:
    module.self_attn.q_proj._parameters["scale"].mul_(1.1)


@pytest.mark.parametrize(
    ("hook", "before"), [(add_one, False), (change_in_place, False), (lambda *a: None, False), (change_weights, True)]
)
@torch.no_grad()
def test_what_is_ready_for_the_next_layer_is_not_used_for_anything_else(hook: Callable, before: bool, tmp_path) -> None:
    model, other, _ = pair(tmp_path, num_hidden_layers=3)
    decoded(other)
    for one in (model, other):
        layer = one.model.layers[1]
        layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook)
    assert off(decoded(other), decoded(model)) < 5e-6


@torch.no_grad()
def test_a_layer_that_follows_another_one_now_and_then(tmp_path, calls: list[int]) -> None:
    """What a layer made ready is left alone by all but the layer that it is for, with these positions."""
    model, other, _ = pair(tmp_path, num_hidden_layers=3)
    decoded(other)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    turns = [model.model.rotary_emb(x, torch.tensor([[place]])) for place in (3, 4)]

    def run(one: Any, order: tuple[tuple[int, int], ...]) -> Tensor:
        y = x
        for layer, place in order:
            y = one.model.layers[layer](y, position_embeddings=turns[place])
        return y

    for order in (((0, 0), (1, 0), (2, 0)), ((0, 0), (2, 0)), ((0, 0), (1, 1)), ((1, 0), (1, 0)), ((0, 0), (1, 0))):
        assert off([run(other, order)], [run(model, order)]) < 5e-6
    for expected in ([BEFORE, CHAINED, CHAINED, BEFORE, DECODE], [BEFORE, CHAINED, CHAINED, DECODE]):
        calls.clear()
        run(other, ((0, 0), (1, 0), (2, 0)))
        assert calls == expected  # once in vain: the second one was followed by itself


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_optimized_and_run_their_own_weights(how: Callable, tmp_path, calls: list[int]) -> None:
    _, other, _ = pair(tmp_path)
    expected = decoded(other)
    twin = how(other)
    calls.clear()
    assert same(decoded(twin), expected) and CHAINED in calls
    twin.model.layers[1].mlp.up_proj.weight = torch.zeros(176, 64)
    assert same(decoded(other), expected) and not same(decoded(twin), expected)
    layers = [layer.__dict__["forward"] for one in (other, twin) for layer in one.model.layers]
    assert len({id(layer.layer) for layer in layers}) == 4 and len({id(layer.chain) for layer in layers}) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_do_not_mix_their_tokens(mode: Callable, tmp_path) -> None:
    model, other, _ = pair(tmp_path, num_hidden_layers=3)
    expected, wrong = [decoded(model, seed=seed) for seed in range(3)], []

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        with mode():
            wrong.extend(seed for _ in range(15) if off(decoded(other, seed=seed), expected[seed]) > 5e-6)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1, 2, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert wrong == []


def test_models_and_results_are_not_kept_alive(tmp_path) -> None:
    other = pair(tmp_path)[1]
    layer = other.model.layers[1].mlp
    held = [weakref.ref(layer), weakref.ref(decoded(other)[-1])]
    other.model.layers[1].mlp = nn.Identity()
    del layer
    decoded(other)
    gc.collect()
    assert [one() for one in held] == [None, None]
    held = [weakref.ref(other.model.layers[0])]
    del other
    gc.collect()
    assert held[0]() is None


def test_asking_changes_nothing(tmp_path) -> None:
    model = made("Llama", tmp_path)
    names = list(model.state_dict())
    hfquant.optimize(model)
    assert model.config._attn_implementation == "sdpa" and list(model.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [layer.self_attn.config is model.config for layer in model.model.layers] == [True, True]
    first = model.model.layers[0].__dict__["forward"]
    again = whole_rows(hfquant.optimize(model))
    assert [row.layers for row in again] == [LAYERS] * 2
    assert model.model.layers[0].__dict__["forward"] is not first
    rows = hfquant.optimize(model, exact=True)
    assert whole_rows(rows) == [] and "forward" not in model.model.layers[0].__dict__


def test_attention_is_a_step_only_if_nothing_else_changes_it() -> None:
    plain = {"scaling": 0.25, "dropout": 0.0, "sliding_window": 8}
    assert AttentionCall(16, 0, plain, (), True).scale == 0.25
    for more in (
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"is_causal": False},
        {"scaling": None},
        {"output_attentions": True},
    ):
        assert AttentionCall(16, 0, {**plain, **more}, (), True).scale is None


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.model.layers[1].mlp.register_forward_hook(add_one), "hooks"),
        (lambda m: setattr(m.model.layers[1], "forward", m.model.layers[1].forward), "forward was replaced"),
        (lambda m: m.model.layers[1].input_layernorm.double(), "no kernel runs it as a whole"),
        (lambda m: m.model.layers[1].to("meta"), "kernel 'reference' runs one layer at a time"),
        (lambda m: setattr(m.model.layers[1].mlp.act_fn, "forward", lambda x: (x,)), "cannot be asked what it does"),
        (lambda m: setattr(m.model.layers[1].mlp.act_fn, "forward", lambda x: x), "after attention is something else"),
        (lambda m: setattr(m.model.layers[1].self_attn, "layer_idx", None), "its number in the cache is none"),
    ],
)
def test_what_declines_says_why(prepare: Callable[[Any], Any], reason: str, tmp_path) -> None:
    model = made("Llama", tmp_path)
    prepare(model)
    last = whole_rows(hfquant.optimize(model))[-1]
    assert last.layers == () and last.seen() == [] and reason in last.declined[0]
