"""What a recipe names is what trains, or an error says what is wrong."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig, SpecError
from hfquant.lora.check import check_gradients, named_targets, plain_name
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model

KINDS = ["llama", "gpt2", "mixtral", "qwen3_moe"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A fresh int4 model of a kind."""
    models = {}

    def load(kind: str):
        if kind not in models:
            folder = tmp_path_factory.mktemp(kind)
            tiny_model(kind).save_pretrained(folder)
            models[kind] = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("int4"))
        return copy.deepcopy(models[kind])

    return load


def adapted(model: nn.Module, modules, parameters=None, **options) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=modules, target_parameters=parameters, **options))


def backward(model: nn.Module) -> None:
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


REACHED = {  # kind, targets, parameters -> ends of names of what they reach, in each of the 2 layers
    ("llama", ("q_proj", "mlp.down_proj"), None): {"q_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.down_proj"},
    ("gpt2", ("c_attn", "c_fc"), None): {"c_attn": "attn.c_attn", "c_fc": "mlp.c_fc"},  # Conv1D before it was packed
    ("mixtral", ("q_proj", "w1", "w2", "w3"), None): {
        "q_proj": "self_attn.q_proj", "w1": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj",
        "w3": "mlp.experts.gate_up_proj",
    },
    ("qwen3_moe", ("gate_proj", "up_proj"), None): dict.fromkeys(("gate_proj", "up_proj"), "mlp.experts.gate_up_proj"),
    ("qwen3_moe", ("v_proj",), ("experts.down_proj",)): {
        "v_proj": "self_attn.v_proj", "experts.down_proj": "mlp.experts.down_proj"
    },
}  # fmt: skip


@pytest.mark.parametrize("kind, modules, parameters", REACHED)
def test_names_reach_what_they_mean_and_gradients_reach_that(packed, kind, modules, parameters):
    model = adapted(packed(kind), list(modules), list(parameters or ()) or None)
    found = named_targets(model, [*modules, *(parameters or ())])
    assert list(found) == [*modules, *(parameters or ())]
    for name, weights in found.items():
        assert len(weights) == 2 and all(w.endswith(f".{REACHED[kind, modules, parameters][name]}") for w in weights)
    everything = {weight for weights in found.values() for weight in weights}
    model.train()
    for steps in range(2):
        backward(model)
        assert check_gradients(model, steps) == 2 * len(everything)
        step(model)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_everything_that_is_packed(packed, kind):
    model = packed(kind)
    modules = [(name, getattr(module, "specs", None)) for name, module in packed_modules(model)]
    wanted = {full for name, specs in modules for full in ([f"{name}.{leaf}" for leaf in specs] if specs else [name])}
    reached = named_targets(adapted(model, "all-linear"), "all-linear")["all-linear"]
    assert {name for name in reached if not name.endswith(".mlp.gate.weight")} == wanted  # routers, too


def test_a_pattern_is_matched_as_a_whole_and_by_older_names(packed):
    pattern = r".*\.1\..*(v_proj|gate_proj|up_proj)"
    with pytest.raises(
        SpecError, match=r"names \(model\.layers\.1.*"
    ):  # down_proj is not among them: nothing is missed
        named_targets(adapted(packed("llama"), ["q_proj"]), r".*(q_proj|\.1\..*v_proj)")
    found = named_targets(adapted(packed("llama"), pattern), pattern)
    assert found == {
        pattern: [f"model.layers.1.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")]
    }


def test_a_name_that_reaches_nothing_is_refused_with_the_names_there_are(packed):
    model = adapted(packed("gpt2"), ["c_attn"])
    with pytest.raises(SpecError, match=r"'c_atn' reaches no weight; .* c_attn, c_fc, .*did you mean 'c_attn'\?"):
        named_targets(model, ["c_attn", "c_atn"])
    # Mixtral's experts were called w1, w2, w3: PEFT takes no other names, and passes over these without a word.
    model = adapted(packed("mixtral"), ["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(SpecError, match=r"'gate_proj' reaches no weight.*target_parameters: \['experts\.down_proj', "):
        named_targets(model, ["q_proj", "gate_proj", "up_proj", "down_proj"])


def test_a_name_that_reaches_only_some_is_refused(packed):
    model = adapted(packed("llama"), ["layers.0.self_attn.q_proj"])
    with pytest.raises(
        SpecError, match=r"reaches 1 weights .*layers\.0\..* not 1 others .*layers\.1\.self_attn\.q_proj"
    ):
        named_targets(model, ["q_proj"])
    model = adapted(packed("mixtral"), ["q_proj", "k_proj", "v_proj", "o_proj"])
    with pytest.raises(SpecError, match=r"'all-linear' reaches 8 weights .* not 4 others .*experts\.down_proj"):
        named_targets(model, "all-linear")
    model = adapted(packed("llama"), ["q_proj"], layers_to_transform=[1])  # on purpose
    assert named_targets(model, ["q_proj"]) == {"q_proj": ["model.layers.1.self_attn.q_proj"]}


def test_tied_embeddings(packed):
    """GPT-2's head is its table of tokens: an adapter on either trains, and the other does not count as missed."""
    for target, first in (("lm_head", "lora_B"), ("wte", "lora_embedding_A")):
        model = adapted(packed("gpt2"), [target, "c_attn"])
        assert [name.rpartition(".")[2] for name in named_targets(model, [target])[target]] == [target]
        backward(model)
        assert check_gradients(model) == 6
        table = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and f"{target}." in name}
        assert [bool(grad.any()) for name, grad in table.items() if first in name] == [True]


def test_a_model_without_adapters_has_nothing_to_check(packed):
    with pytest.raises(SpecError, match="get_peft_model"):
        named_targets(packed("llama"), ["q_proj"])
    with pytest.raises(SpecError, match="no parameter of an adapter is trained"):
        check_gradients(packed("llama"))


def test_gradients_that_are_missing_broken_or_zero_name_their_parameter(packed):
    model = adapted(packed("llama"), ["q_proj", "v_proj"])
    with pytest.raises(SpecError, match=r"lora_A\.default\.weight.* and \d+ more|got no gradient"):
        check_gradients(model)
    backward(model)
    assert check_gradients(model) == 8  # lora_B starts at zero: lora_A has no gradient yet
    with pytest.raises(SpecError, match=r"q_proj\.lora_A\.default\.weight.*gradient of zero"):
        check_gradients(model, steps=1)
    layer = model.base_model.model.model.layers[1].self_attn
    layer.v_proj.lora_B.default.weight.grad.zero_()
    with pytest.raises(SpecError, match=r"layers\.1\.self_attn\.v_proj: got a gradient of zero"):
        check_gradients(model)
    layer.q_proj.lora_B.default.weight.grad[0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.default\.weight: got NaN"):
        check_gradients(model)


def test_a_layer_that_is_cut_off_is_found(packed):
    model = adapted(packed("llama"), ["q_proj", "down_proj"])
    cut = model.base_model.model.model.layers[0].mlp.down_proj
    cut.register_forward_hook(lambda module, args, out: out.detach())
    backward(model)
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.down_proj\.lora_A\.default\.weight.*no gradient"):
        check_gradients(model)


def test_plain_names():
    name = "model.layers.0.mlp.experts"
    assert plain_name(f"module.base_model.model.{name}.base_layer.base_layer") == plain_name(name) == name
