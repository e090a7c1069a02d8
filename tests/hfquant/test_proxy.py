"""Proxy outliers: the layer behind each input, the spread of its weights, and the columns that follow from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfquant.config import HfQuantConfig
from hfquant.errors import FormatError, UnsupportedError
from hfquant.nn import QLinear
from hfquant.producers import Producer, producers
from hfquant.proxy import producer_std
from hfquant.testing.tiny import HEADS, HIDDEN, KV_HEADS, RAGGED, tiny_model

HEAD = HIDDEN // HEADS


def meta_model(kind: str) -> PreTrainedModel:
    """The model as the loader shows it: no weights, in training mode."""
    model = tiny_model(kind)
    with torch.device("meta"):
        return type(model)(model.config)


def names(model: PreTrainedModel) -> dict[str, str]:
    return {consumer: producer.name for consumer, producer in producers(model).items()}


def decoder(norm_stream: str, head: str) -> dict[str, str]:
    """Llama's mapping, written down from its architecture."""
    expected, stream = {}, norm_stream
    for layer in ("model.layers.0", "model.layers.1"):
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        expected |= dict.fromkeys((f"{attention}.{name}_proj" for name in "qkv"), stream)
        expected[f"{attention}.o_proj"] = f"{attention}.v_proj"
        expected |= dict.fromkeys((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{attention}.o_proj")
        expected[f"{mlp}.down_proj"] = f"{mlp}.up_proj"
        stream = f"{mlp}.down_proj"
    return {**expected, head: stream}


def gpt2() -> dict[str, str]:
    expected, stream = {}, "transformer.wte"
    for layer in ("transformer.h.0", "transformer.h.1"):
        expected[f"{layer}.attn.c_attn"] = stream
        expected[f"{layer}.attn.c_proj"] = f"{layer}.attn.c_attn"
        expected[f"{layer}.mlp.c_fc"] = f"{layer}.attn.c_proj"
        expected[f"{layer}.mlp.c_proj"] = f"{layer}.mlp.c_fc"
        stream = f"{layer}.mlp.c_proj"
    return {**expected, "lm_head": stream}


def bert() -> dict[str, str]:
    expected, stream = {}, "bert.embeddings.word_embeddings"
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        attention = f"{layer}.attention.self"
        expected |= dict.fromkeys((f"{attention}.{name}" for name in ("query", "key", "value")), stream)
        expected[f"{layer}.attention.output.dense"] = f"{attention}.value"
        expected[f"{layer}.intermediate.dense"] = f"{layer}.attention.output.dense"
        expected[f"{layer}.output.dense"] = f"{layer}.intermediate.dense"
        stream = f"{layer}.output.dense"
    return {**expected, "bert.pooler.dense": stream, "classifier": "bert.pooler.dense"}


def vit() -> dict[str, str]:
    expected, stream = {}, "vit.embeddings.patch_embeddings.projection"
    for layer in ("vit.layers.0", "vit.layers.1"):
        attention, mlp = f"{layer}.attention", f"{layer}.mlp"
        expected |= dict.fromkeys((f"{attention}.{name}_proj" for name in "qkv"), stream)
        expected[f"{attention}.o_proj"] = f"{attention}.v_proj"
        expected[f"{mlp}.fc1"] = f"{attention}.o_proj"
        expected[f"{mlp}.fc2"] = f"{mlp}.fc1"
        stream = f"{mlp}.fc2"
    return {**expected, "classifier": stream}


EXPECTED = {
    "llama": decoder("model.embed_tokens", "lm_head"),
    "qwen3": decoder("model.embed_tokens", "lm_head"),
    "gpt2": gpt2(),
    "bert": bert(),
    "vit": vit(),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_linear_layer_has_the_producer_of_its_architecture(kind: str) -> None:
    assert names(meta_model(kind)) == EXPECTED[kind]


def test_the_mapping_does_not_depend_on_device_or_attention_kernel() -> None:
    assert names(tiny_model("llama")) == EXPECTED["llama"]
    eager = meta_model("llama")
    eager.set_attn_implementation("eager")
    assert names(eager) == EXPECTED["llama"]


def rows_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    return producers(model)[name].rows


def test_rows_of_plain_layers_are_the_inputs_themselves() -> None:
    for kind in ("llama", "vit"):
        model = meta_model(kind)
        for name, producer in producers(model).items():
            if "o_proj" not in name or kind == "vit":
                assert torch.equal(producer.rows, torch.arange(model.get_submodule(name).weight.shape[1])), name


def test_rows_of_grouped_value_heads_are_repeated_head_by_head() -> None:
    one_head_each = torch.arange(KV_HEADS * HEAD).view(KV_HEADS, HEAD)
    expected = torch.stack([one_head_each[query // (HEADS // KV_HEADS)] for query in range(HEADS)]).flatten()
    assert torch.equal(rows_of(meta_model("llama"), "model.layers.1.self_attn.o_proj"), expected)


def test_rows_of_fused_projections_are_those_of_the_part_that_is_used() -> None:
    values = torch.arange(2 * HIDDEN, 3 * HIDDEN)  # query, key, value
    assert torch.equal(rows_of(meta_model("gpt2"), "transformer.h.1.attn.c_proj"), values)
    with torch.device("meta"):
        sizes = {"vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": RAGGED, "num_hidden_layers": 1}
        phi3 = AutoModelForCausalLM.from_config(Phi3Config(**sizes, num_attention_heads=HEADS, pad_token_id=0))
    up = torch.arange(RAGGED, 2 * RAGGED)  # gate, up
    found = producers(phi3)["model.layers.0.mlp.down_proj"]
    assert found.name == "model.layers.0.mlp.gate_up_proj"
    assert torch.equal(found.rows, up)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_changing_a_row_of_the_producer_changes_exactly_its_inputs(kind: str) -> None:
    """An oracle that knows no graph: behind activations, values and repeats, the mapped inputs move and no others."""
    model = tiny_model(kind)
    consumers = [n for n in producers(model) if n.endswith(("down_proj", "c_proj", "output.dense", "o_proj"))]
    for consumer in consumers:
        producer, row = producers(model)[consumer], 3
        row = int(producer.rows[row])
        moved = _inputs_that_move(model, consumer, producer, row)
        assert moved.tolist() == (producer.rows == row).nonzero()[:, 0].tolist(), consumer


@torch.no_grad()
def _inputs_that_move(model: PreTrainedModel, consumer: str, producer: Producer, row: int) -> torch.Tensor:
    """Numbers of the inputs of `consumer` that change with one row of the producer's weight."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(consumer).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    module = model.get_submodule(producer.name)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    before = weight[row].clone()
    model(**model.dummy_inputs)
    weight[row] *= 2
    model(**model.dummy_inputs)
    weight[row] = before
    hook.remove()
    return (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero()[:, 0]


def test_the_model_is_left_as_it_was() -> None:
    model = meta_model("llama")
    model.get_parameter("lm_head.weight").requires_grad_(False)
    model.get_submodule("model.layers.0").eval()

    def state() -> tuple:
        flags = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return flags, hooks, [m.training for m in model.modules()], model.config.to_dict(), _attention(model)

    before = state()
    producers(model)
    assert state() == before

    model.forward = None  # stops in the middle
    with pytest.raises(UnsupportedError):
        producers(model)
    del model.forward
    assert state() == before


def _attention(model: PreTrainedModel) -> str:
    return model.config._attn_implementation


def direct_std(model: PreTrainedModel, producer: Producer) -> torch.Tensor:
    """The definition, on loaded weights in float64."""
    module = model.get_submodule(producer.name)
    weight = module.weight.detach().double()
    if isinstance(module, nn.Embedding | Conv1D):
        weight = weight.T
    weight = weight.flatten(1)
    variance = (weight - weight.mean(1, keepdim=True)).square().mean(1)
    return variance.sqrt()[producer.rows]


@pytest.mark.parametrize("kind", EXPECTED)
def test_spread_read_from_files_is_that_of_the_loaded_weights(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = [str(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(files) > 1
    found = producer_std(meta_model(kind), files)
    assert found.keys() == EXPECTED[kind].keys()
    for name, producer in producers(model).items():
        assert found[name].dtype is torch.float32
        torch.testing.assert_close(found[name].double(), direct_std(model, producer), rtol=1e-5, atol=0)


def test_checkpoint_of_the_base_model_and_of_the_model_with_a_head(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "head")
    model.model.save_pretrained(tmp_path / "base")
    meta = meta_model("llama")
    head = producer_std(meta, [str(tmp_path / "head/model.safetensors")])
    base = producer_std(meta, [str(tmp_path / "base/model.safetensors")])
    assert all(torch.equal(head[name], base[name]) for name in EXPECTED["llama"])


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.experts holds fused experts.*outliers=0"):
        producers(meta_model("mixtral"))
    with pytest.raises(UnsupportedError, match=r"safetensors files.*outliers=0"):
        producer_std(meta_model("llama"), None)
    with pytest.raises(UnsupportedError, match=r"outliers of model\.embed_tokens.*modules_to_not_convert"):
        producer_std(meta_model("llama"), [], ["model.embed_tokens"])


def test_weights_that_the_files_do_not_hold_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"something.else": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="hold no tensor that is the weight of"):
        producer_std(meta_model("llama"), [str(tmp_path / "model.safetensors")])


def saved_llama(folder: Path, scaled: int | None = None) -> PreTrainedModel:
    """A bfloat16 model on disk; optionally with one row of a `down_proj` scaled up 20 times."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    if scaled is not None:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.down_proj.weight")[scaled] *= 20
    model.save_pretrained(folder)
    return model


def outlier_columns(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer, QLinear)
    outliers = layer.qtensor().outliers
    assert outliers is not None
    return outliers.index.long()


def test_outlier_columns_are_kept_exactly_through_save_and_reload(tmp_path: Path) -> None:
    original = saved_llama(tmp_path / "original")
    config = HfQuantConfig("int3", outliers=0.05)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert len(layers) == 14
    links = producers(original)
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight
        index = outlier_columns(layer)
        assert len(index) == math.ceil(0.05 * weight.shape[1])
        spread = direct_std(original, links[name])
        rest = torch.ones_like(spread, dtype=torch.bool).index_fill(0, index, False)
        assert spread[index].min() >= spread[rest].max() * (1 - 1e-6)
        dense = layer.qtensor().dequantize(torch.bfloat16)
        assert torch.equal(dense[:, index], weight[:, index])
        assert not torch.equal(dense, weight)
    assert model.config.quantization_config.outlier_columns == {n: len(outlier_columns(m)) for n, m in layers.items()}

    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.config.quantization_config.outlier_columns == model.config.quantization_config.outlier_columns
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_input_that_a_large_row_writes_to_is_chosen(tmp_path: Path) -> None:
    row = 37
    saved_llama(tmp_path, scaled=row)
    config = HfQuantConfig("int3", outliers=1 / HIDDEN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for name in "qkv":
        assert outlier_columns(model.get_submodule(f"model.layers.1.self_attn.{name}_proj")).tolist() == [row]


def test_experts_are_refused_before_loading(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="holds fused experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("int3", outliers=0.05))
