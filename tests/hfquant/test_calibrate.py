"""Calibration of a loaded model: what each layer sees, what it is quantized to, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfquant import HfQuantConfig
from hfquant.backend import Backend, register, unregister
from hfquant.calibrate import Calibration
from hfquant.calibration_state import OUTSIDE, Settings
from hfquant.coverage import survey
from hfquant.errors import CalibrationError, UnsupportedError
from hfquant.experts import QExperts
from hfquant.findings import BlockFinding
from hfquant.hf import check_in_memory
from hfquant.nn import QEmbedding, QLinear
from hfquant.presets import kbit
from hfquant.qtensor import QTensor
from hfquant.quantize import quantize_linear
from hfquant.recipe import Recipe, Step
from hfquant.rounders import nearest
from hfquant.stats import HESSIAN, Stats, needs
from hfquant.swap import packed_modules
from hfquant.testing.tiny import EXPERTS, KINDS, tiny_inputs, tiny_model

Seen = dict[str, Stats]


@needs(HESSIAN)
def aware(w: Tensor, spec: Any, find: Any, stats: Stats) -> QTensor:
    """Codes that depend on the inputs: nearest for weights that are up to a tenth larger, with their input channel."""
    inputs = stats.seen(HESSIAN)
    assert inputs.gram is not None
    stats.note(f"{inputs.tokens} tokens")
    size = inputs.gram.diagonal().sqrt()
    scaled = w * (1 + 0.1 * size / size.max()).to(w)
    return nearest(scaled, spec, find, stats)


def aware_preset(bits: int = 4) -> Recipe:
    recipe = kbit(f"int{bits}")
    return Recipe(recipe.scheme, rounder=Step("aware"))


@pytest.fixture(autouse=True)
def backend() -> Iterator[Backend]:
    made = Backend("aware", rounders={"aware": aware}, presets={"aware": aware_preset})
    register(made, "tests")
    yield made
    unregister(made, "tests")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What `quantize_linear` was told about each layer, in the order of the calls."""
    found: Seen = {}

    def watched(w: Tensor, recipe: Recipe, stats: Stats, *args: Any, **options: Any) -> QTensor:
        found[stats.name] = stats
        return quantize_linear(w, recipe, stats, *args, **options)

    monkeypatch.setattr("hfquant.layer.quantize_linear", watched)
    return found


def calibrate(
    model: PreTrainedModel,
    method: str = "aware",
    batches: list[dict[str, Tensor]] | None = None,
    settings: Settings | None = None,
    tick: Callable[[str, float], None] | None = None,
    **options: Any,
) -> list[BlockFinding]:
    config = HfQuantConfig(method, **options)
    targets, _ = survey(model, config.modules_to_not_convert, config.embeddings)
    return Calibration(model, targets, config, batches or [tiny_inputs(model)], None, settings, tick).run()


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Every packed tensor of a model."""
    return {
        f"{name}.{leaf}": module._parameters[leaf]
        for name, module in packed_modules(model)
        for leaf in module.packed_names()
    }


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one), [
        n for n in one if not torch.equal(one[n], other[n])
    ]


def layers(findings: list[BlockFinding]) -> dict[str, Any]:
    return {layer.name: layer for block in findings for layer in block.layers}


# The pipeline does what the direct path does where data does not matter.


@pytest.mark.parametrize("everything", [False, True], ids=["default", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_without_data_gives_what_quantizing_on_load_gives(kind: str, everything: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"block_size": 48, "symmetric": False}
    options |= {"embeddings": True, "modules_to_not_convert": []} if everything else {}
    model = tiny_model(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    direct = type(model).from_pretrained(tmp_path, quantization_config=HfQuantConfig("int4", **options))
    findings = calibrate(model, "int4", **options)
    assert_equal(packed(model), packed(direct))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, direct(**inputs).logits)
    assert [block.name for block in findings][-1] == OUTSIDE and len(findings) == 3
    assert not any(layer.notes for layer in layers(findings).values())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_a_target_is_quantized_and_found(kind: str) -> None:
    model = tiny_model(kind)
    targets, _ = survey(model, None, False)
    found = layers(calibrate(model))
    assert {target.name for target in targets} == {name for name, _ in packed_modules(model)}
    expected = set()
    for name, module in packed_modules(model):
        experts = isinstance(module, QExperts)
        expected |= {f"{name}.{p}[{e}]" for p in module.specs for e in range(EXPERTS)} if experts else {name}
    assert set(found) == expected
    assert all(0 < layer.error < 0.5 and layer.tokens for layer in found.values())


# What a layer sees.


def test_blocks_see_what_the_quantized_blocks_before_them_give(seen: Seen) -> None:
    """The first layer of block 1 is told the Gram matrix of inputs that block 0, quantized, makes."""
    model = tiny_model("llama")
    inputs: list[Tensor] = []
    calibrate(model)
    name = "model.layers.1.self_attn.q_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**tiny_inputs(model))
    hook.remove()
    x = inputs[0].flatten(0, 1).double()
    told = seen[name].inputs
    assert told is not None and told.gram is not None
    torch.testing.assert_close(told.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    original = gram_of(tiny_model("llama"), name)
    assert float((told.gram - original).norm() / original.norm()) > 1e-3


def gram_of(model: PreTrainedModel, name: str) -> Tensor:
    inputs: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**tiny_inputs(model))
    x = inputs[0].flatten(0, 1).double()
    return x.T @ x


def test_layers_of_a_block_see_the_quantized_ones_before_them(seen: Seen) -> None:
    model, original = tiny_model("llama"), tiny_model("llama")
    calibrate(model)
    for part, exact in (("self_attn.q_proj", True), ("self_attn.o_proj", False)):
        name = f"model.layers.0.{part}"
        told = seen[name].inputs
        assert told is not None and told.gram is not None
        wanted = gram_of(original, name)
        off = float((told.gram - wanted).norm() / wanted.norm())
        assert off < 1e-5 if exact else off > 1e-3


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_follows_the_attention_takes_a_pass_for_each_group_and_the_last_one(kind: str) -> None:
    model = tiny_model(kind)
    calls: list[int] = []
    last = model.model.layers[1].post_attention_layernorm
    last.register_forward_pre_hook(lambda module, args: calls.append(1))
    calibrate(model)
    # All experts of a layer go together. Besides: the original block, and a run to see what it is made of.
    assert len(calls) == 2 + 1 + 2


def test_batches_of_any_size_give_the_same_codes() -> None:
    ids = torch.randint(3, 256, (6, 13), generator=torch.Generator().manual_seed(1))
    found = []
    for size in (1, 2, 6):
        model = tiny_model("mixtral")
        model.set_experts_implementation("eager")
        calibrate(model, batches=[{"input_ids": part} for part in ids.split(size)])
        found.append(packed(model))
    for other in found[1:]:
        same = [
            float((found[0][name] == other[name]).float().mean()) for name in other if other[name].dtype == torch.uint8
        ]
        assert min(same) > 0.98  # codes at a tie may turn where attention sums in another order


def test_hidden_states_on_the_disk_change_nothing(tmp_path: Path) -> None:
    inputs = [tiny_inputs(tiny_model("llama"), seed) for seed in range(3)]
    for dtype in (torch.bfloat16, torch.float32):
        one, other = tiny_model("llama", dtype=dtype), tiny_model("llama", dtype=dtype)
        found = calibrate(one, batches=inputs)
        again = calibrate(other, batches=inputs, settings=Settings(offload=tmp_path / "states"))
        assert_equal(packed(one), packed(other))
        assert [block.error for block in found] == [block.error for block in again]
        assert not list((tmp_path / "states").rglob("*.safetensors"))  # nobody needs them any more


def test_padding_is_not_counted(seen: Seen) -> None:
    model = tiny_model("mixtral")
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, 9:] = 0
    found = layers(calibrate(model, batches=[inputs]))
    assert found["model.layers.1.self_attn.q_proj"].tokens == 9 + 13
    assert sum(found[f"model.layers.1.mlp.experts.down_proj[{e}]"].tokens for e in range(EXPERTS)) == 2 * (9 + 13)


# Experts that few tokens reach, layers that none does.


def steer(model: PreTrainedModel, favourites: tuple[int, ...]) -> None:
    """Send every token to the same experts, by a constant channel of the router's input."""
    for block in model.model.layers:
        block.post_attention_layernorm.weight.data[0] = 0
        block.mlp.gate.weight.data.zero_()
    hooks = [
        block.mlp.gate.register_forward_pre_hook(lambda m, args: (args[0].clone(),)) for block in model.model.layers
    ]
    for block, hook in zip(model.model.layers, hooks, strict=True):
        hook.remove()
        block.mlp.gate.register_forward_hook(lambda module, args, out: _chosen(out, favourites))


def _chosen(out: Any, favourites: tuple[int, ...]) -> Any:
    logits, weights, index = out
    return logits, torch.full_like(weights, 0.5), torch.tensor(favourites).expand_as(index).contiguous()


def test_an_expert_without_tokens_is_rounded_to_nearest_and_says_so() -> None:
    model, plain = tiny_model("mixtral"), tiny_model("mixtral")
    steer(model, (1, 3))
    found = layers(calibrate(model))
    calibrate(plain, "int4")
    name = "model.layers.0.mlp.experts"
    for expert in range(EXPERTS):
        layer = found[f"{name}.gate_up_proj[{expert}]"]
        mine = model.get_submodule(name).qtensor("gate_up_proj", expert)
        nearest_one = plain.get_submodule(name).qtensor("gate_up_proj", expert)
        starved = expert in (0, 2)
        assert layer.tokens == (0 if starved else 26)
        assert torch.equal(mine.codes, nearest_one.codes) == starved
        assert layer.notes == (["0 tokens reached it, 16 are needed: rounded to nearest"] if starved else ["26 tokens"])


@pytest.mark.parametrize("least", [0, 27])
def test_how_many_tokens_a_layer_needs_is_a_setting(least: int) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    found = layers(calibrate(model, settings=Settings(min_tokens=least)))
    calibrate(plain, "int4")
    same = [torch.equal(one, other) for one, other in zip(packed(model).values(), packed(plain).values(), strict=True)]
    assert all(same) if least else not any(same)
    assert all(("rounded to nearest" in layer.notes[0]) == bool(least) for layer in found.values())


@pytest.mark.parametrize("least", [0, 16])
def test_a_layer_that_is_never_called_is_rounded_to_nearest(least: int) -> None:
    model = tiny_model("llama")
    model.model.layers[1].unused = nn.Linear(64, 8)
    weight = model.model.layers[1].unused.weight.data.clone()
    layer = layers(calibrate(model, settings=Settings(min_tokens=least)))["model.layers.1.unused"]
    assert layer.tokens == 0 and "rounded to nearest" in layer.notes[0]
    expected = quantize_linear(weight, HfQuantConfig("int4").recipe)
    assert torch.equal(model.model.layers[1].unused.qtensor().codes, expected.codes)


def test_a_dead_input_channel_does_no_harm() -> None:
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data[7] = 0
    found = layers(calibrate(model, "gptq", group_size=64, data=[tiny_inputs(model)["input_ids"]]))
    layer = found["model.layers.1.self_attn.q_proj"]
    assert any("1 input channels are 0" in note for note in layer.notes)
    with torch.no_grad():
        assert model(**tiny_inputs(model)).logits.isfinite().all()


def test_a_model_that_overflows_raises_with_the_name_of_the_layer() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e30)
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1e30)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj is NaN or infinite for 26 of 26"):
        calibrate(model)


# What is not in a block.


def test_an_output_layer_sees_what_the_quantized_model_gives(seen: Seen) -> None:
    model = tiny_model("llama")
    found = layers(calibrate(model, modules_to_not_convert=[]))
    assert isinstance(model.lm_head, QLinear) and found["lm_head"].tokens == 26
    inputs: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**tiny_inputs(model))
    x = inputs[0].flatten(0, 1).double()
    told = seen["lm_head"].inputs
    assert told is not None and told.gram is not None
    torch.testing.assert_close(told.gram, x.T @ x, rtol=1e-4, atol=1e-4)


def test_embeddings_are_rounded_to_nearest() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    calibrate(model, embeddings=True)
    calibrate(plain, "int4", embeddings=True)
    assert isinstance(model.model.embed_tokens, QEmbedding)
    assert torch.equal(model.model.embed_tokens.qtensor().codes, plain.model.embed_tokens.qtensor().codes)
    q = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(model.get_submodule(q).qtensor().codes, plain.get_submodule(q).qtensor().codes)


def test_what_follows_the_blocks_sees_one_vector_a_sample() -> None:
    model = tiny_model("bert")
    batches = [tiny_inputs(model, seed) for seed in range(9)]
    batches[0]["attention_mask"][0, 9:] = 0
    found = layers(calibrate(model, batches=batches, modules_to_not_convert=[]))
    assert found["bert.pooler.dense"].tokens == found["classifier"].tokens == 18
    assert found["bert.pooler.dense"].notes == ["18 tokens"]


# The model afterwards.


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_cache_are_as_they_were(training: bool) -> None:
    model = tiny_model("llama")
    model.train(training)
    model.model.layers[0].eval()
    model.config.use_cache = True
    calibrate(model)
    assert model.training is training and model.config.use_cache
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.up_proj.training is training
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert not hooks


def test_mode_and_cache_are_as_they_were_after_an_error() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e30)
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1e30)
    with pytest.raises(CalibrationError):
        calibrate(model)
    assert model.training and model.config.use_cache
    assert all(block.training for block in model.model.layers)
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_gradients_and_dropout_while_calibrating() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, attention_dropout=0.9)).train()
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    batch = {"input_ids": torch.arange(3, 35)[None]}
    calibrate(model, batches=[batch])
    calibrate(twin, batches=[batch])
    assert_equal(packed(model), packed(twin))


def test_progress_goes_from_nothing_to_the_last_part() -> None:
    told: list[tuple[str, float]] = []
    calibrate(tiny_model("llama"), tick=lambda what, share: told.append((what, share)), modules_to_not_convert=[])
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[0] == 0 and 2 / 3 < shares[-1] < 1
    assert list(dict.fromkeys(what for what, _ in told)) == ["model.layers.0", "model.layers.1", "the rest"]


def test_errors_grow_from_block_to_block_and_findings_survive_json() -> None:
    findings = calibrate(tiny_model("llama"))
    assert 0 < findings[0].error < findings[1].error < 1
    assert [BlockFinding.from_dict(block.to_dict()) for block in findings] == findings


def test_data_free_methods_have_no_error_at_eight_bits_to_speak_of() -> None:
    rough, fine = calibrate(tiny_model("llama"), "int4"), calibrate(tiny_model("llama"), "int8")
    assert all(a.error > 8 * b.error > 0 for a, b in zip(rough[:2], fine[:2], strict=True))


def test_the_probe_is_cut_along_the_tokens_of_every_input() -> None:
    """Embeddings [B, L, H] beside a mask [B, L] longer than the probe."""
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    embedded = model.model.embed_tokens(ids).detach()
    batch = {"inputs_embeds": embedded, "attention_mask": torch.ones_like(ids)}
    found = layers(calibrate(model, batches=[batch]))
    assert found["model.layers.0.self_attn.q_proj"].tokens == 120


@pytest.mark.parametrize(("places", "words"), [(("cpu", "meta"), "one block at a time"), (("cuda:0",), "is on cuda")])
def test_a_model_that_is_not_in_memory_is_refused(places: tuple[str, ...], words: str) -> None:
    class Elsewhere(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            return iter([SimpleNamespace(device=torch.device(place)) for place in places])

    with pytest.raises(UnsupportedError, match=words):
        check_in_memory(Elsewhere())
    check_in_memory(nn.Linear(2, 2))


def test_experts_that_are_stored_together_have_one_grid(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def wayward(w: Tensor, spec: Any, find: Any, stats: Stats) -> QTensor:
        grid = "e2m1" if stats.name.endswith("[1]") else spec.grid
        return nearest(w, replace(spec, grid=grid), find, stats)

    monkeypatch.setattr("hfquant.layer.data_free", lambda recipe: recipe)
    made = Backend("wayward", rounders={"wayward": needs(HESSIAN)(wayward)}, presets={"wayward": wayward_preset})
    register(made, "tests")
    try:
        with pytest.raises(UnsupportedError, match=r"\[1\] has other numbers than .*\[0\]"):
            calibrate(tiny_model("mixtral"), "wayward", settings=Settings(min_tokens=0))
    finally:
        unregister(made, "tests")
    assert all(stats.grid_is_given == ("experts" in name) for name, stats in seen.items())


def wayward_preset() -> Recipe:
    return Recipe(kbit("int4").scheme, rounder=Step("wayward"))
