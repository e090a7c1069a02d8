"""Packed experts compute what their model's own class computes with the dequantized weights."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hfquant import HfQuantConfig, UnsupportedError, use_kernel
from hfquant.config import HfQuantConfig as Config
from hfquant.coverage import survey
from hfquant.cpu import Library
from hfquant.experts import AT_ONCE, QExperts, RoutedExperts, expert_projections, why_not_experts
from hfquant.stats import Stats
from hfquant.swap import quantize_into, swap_in, swap_out
from hfquant.testing.tiny import tiny_inputs, tiny_model

HIDDEN, WIDE, EXPERTS, TOKENS, TOP = 48, 40, 4, 13, 2
SIZES = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP}
CLASSES = {
    "mixtral": (MixtralExperts, MixtralConfig(**SIZES, intermediate_size=WIDE)),
    "qwen3_moe": (Qwen3MoeExperts, Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=WIDE)),
    "gpt_oss": (GptOssExperts, GptOssConfig(**SIZES, intermediate_size=WIDE)),  # transposed, biased, interleaved
    "nemotron_h": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=HIDDEN, n_routed_experts=EXPERTS, moe_intermediate_size=WIDE),
    ),
    "muse_spark": (  # a norm after each expert
        MuseSparkExperts,
        MuseSparkTextConfig(num_local_experts=EXPERTS, moe_hidden_size=HIDDEN, moe_intermediate_size=WIDE),
    ),
}


class Holder(nn.Module):
    """The least that `survey` needs of a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.all_tied_weights_keys: dict[str, str] = {}
        self.experts = experts


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(kind: str, method: str = "int4", **options) -> tuple[QExperts, nn.Module]:
    """Packed experts, and their original class with the dequantized weights in its eager implementation."""
    cls, config = CLASSES[kind]
    config._experts_implementation = "eager"
    holder = Holder(cls(config))
    with torch.no_grad():
        for seed, parameter in enumerate(holder.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5)
    recipe = Config(method, **options).recipe
    targets, coverage = survey(holder, [], embeddings=False)
    assert [target.kind for target in targets] == ["experts"]
    weights = {name: getattr(holder.experts, name).data for name in expert_projections(holder.experts)}
    swap_in(holder, targets, recipe, wait=True)
    for name, w in weights.items():
        packed = quantize_into(holder.experts, name, w, recipe, Stats(name))
        for key, value in packed.items():
            holder.experts._parameters[key] = nn.Parameter(value, requires_grad=False)
    plain = copy.deepcopy(holder)
    swap_out(plain, torch.float32)
    assert type(plain.experts) is cls and coverage.share > 0.95
    return holder.experts, plain.experts


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, H], expert numbers [T, k] with one expert that gets no token, and weights [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP] for _ in range(TOKENS)])
    return drawn(TOKENS, HIDDEN, seed=seed), index, torch.rand(TOKENS, TOP, generator=generator)


@pytest.mark.parametrize(
    "options", [{"group_size": 16}, {"group_size": -1, "symmetric": False}], ids=["groups", "rows"]
)
@pytest.mark.parametrize("kind", CLASSES)
def test_forward_and_gradients_are_those_of_the_original_class(kind, options):
    packed, plain = both(kind, **options)
    results = []
    for module in (packed, plain):
        x, index, weights = routed()
        x.requires_grad_(), weights.requires_grad_()
        y = module(x, index, weights)
        grads = torch.autograd.grad(y, (x, weights), drawn(*y.shape, seed=9))
        biases = [p for p in module.parameters() if p.requires_grad and p.dim() == 2]
        y = module(x, index, weights)
        results.append([y, *grads, *(torch.autograd.grad(y.square().sum(), biases) if biases else [])])
    for ours, theirs in zip(*([r[:3] for r in results]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert packed.has_bias is (kind == "gpt_oss") and packed.has_gate is (kind != "nemotron_h")


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
@pytest.mark.parametrize("method", ["int4", "nf4", "w8a8"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_few_tokens_run_in_two_calls(kind, method, tokens, monkeypatch):
    calls, original = [], Library.jobs
    monkeypatch.setattr(Library, "jobs", lambda self, *rest: (calls.append(rest[1]), original(self, *rest))[1])
    packed, _ = both(kind, method, **({"transform": None} if method == "w8a8" else {}))
    x, index, weights = (t[:tokens] for t in routed())
    index[-1, 0] = EXPERTS  # served by another rank
    one_by_one = RoutedExperts.forward(packed, x, index, weights)
    for mode in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with mode():
            for _ in range(2):
                # Products are the same to the last bit; sigmoids of another number of elements are not.
                torch.testing.assert_close(packed(x, index, weights), one_by_one.detach(), rtol=2e-6, atol=1e-6)
        assert calls == [len(index[index < EXPERTS].unique())] * 4
    with torch.no_grad():
        assert not packed(x, torch.full_like(index, EXPERTS), weights).any()
        many = [t.repeat(AT_ONCE, *[1] * (t.dim() - 1)) for t in (x, index, weights)]
        calls.clear()
        torch.testing.assert_close(packed(*many)[:tokens], one_by_one, rtol=1e-4, atol=1e-4)
        with use_kernel("reference"):
            torch.testing.assert_close(packed(x, index, weights), one_by_one, rtol=1e-3, atol=1e-3)
        assert calls == []


@torch.no_grad()
def test_every_change_of_the_experts_is_seen():
    packed, _ = both("gpt_oss")
    x, index, weights = routed()
    other = copy.deepcopy(packed)
    before = packed(x, index, weights)
    for change in (
        lambda: other.down_proj_scale.mul_(2),
        lambda: other.gate_up_proj_bias.add_(1),
        lambda: setattr(other, "down_proj_scale", nn.Parameter(packed.down_proj_scale * 3, requires_grad=False)),
        lambda: other.to(torch.bfloat16).to(torch.float32),
    ):
        last = other(x, index, weights)
        change()
        y = other(x, index, weights)
        torch.testing.assert_close(y, RoutedExperts.forward(other, x, index, weights), rtol=2e-6, atol=1e-6)
        assert not torch.equal(y, last)
        assert torch.equal(packed(x, index, weights), before)


def test_gradients_reach_the_biases():
    packed, plain = both("gpt_oss")
    for module in (packed, plain):
        module(*routed()).square().sum().backward()
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        torch.testing.assert_close(getattr(packed, name).grad, getattr(plain, name).grad, rtol=1e-4, atol=1e-5)


def test_slots_of_experts_on_another_rank_are_skipped():
    packed, plain = both("mixtral")
    x, index, weights = routed()
    index[::2, 1] = EXPERTS  # transformers marks them with the number one past the last expert
    torch.testing.assert_close(packed(x, index, weights), plain(x, index, weights), rtol=1e-4, atol=1e-5)
    assert torch.equal(packed(x[:0], index[:0], weights[:0]), x[:0])


def test_orientation_of_dequantized_weights_is_the_models_own():
    packed, plain = both("gpt_oss")
    assert torch.equal(packed.dequantize("gate_up_proj", torch.float32), plain.gate_up_proj)
    assert packed.dequantize("down_proj", torch.bfloat16).shape == (EXPERTS, WIDE, HIDDEN)


def test_biases_of_experts_count_as_kept():
    cls, config = CLASSES["gpt_oss"]
    experts = cls(config)
    _, coverage = survey(Holder(experts), [], embeddings=False)
    biases = sum(p.nbytes for name, p in experts.named_parameters() if name.endswith("_bias"))
    assert biases and [(skip.reason, skip.bytes) for skip in coverage.skipped] == [("biases", biases)]
    assert coverage.quantized + biases == coverage.total == sum(p.nbytes for p in experts.parameters())


def test_casting_keeps_packed_bits_and_casts_biases():
    packed, _ = both("gpt_oss")
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    packed.to(torch.float16)
    for name in packed.packed_names():
        assert torch.equal(packed.state_dict()[name], before[name])
    assert packed.down_proj_bias.dtype == packed.dtype == torch.float16
    assert not any(packed._parameters[name].requires_grad for name in packed.packed_names())


def test_reading_a_packed_weight_says_where_it_went():
    packed, _ = both("mixtral")
    assert not hasattr(packed, "gate_up_proj") and not hasattr(packed, "nonsense")
    with pytest.raises(AttributeError, match=re.escape("read it with dequantize('gate_up_proj', dtype)")):
        _ = packed.gate_up_proj


def test_a_class_that_does_not_describe_itself_is_left_alone_with_a_reason():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(drawn(2, 8, 8)), nn.Parameter(drawn(2, 8, 4))

    assert "has_gate" in (why_not_experts(Unknown()) or "")
    targets, coverage = survey(Holder(Unknown()), [], embeddings=False)
    assert not targets and "forward pass is unknown" in coverage.skipped[0].reason


def test_a_decorated_third_party_class_without_a_gate_is_packed():
    @use_experts_implementation(has_gate=False)
    class Minimal(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            self.up_proj = nn.Parameter(drawn(EXPERTS, WIDE, HIDDEN))
            self.down_proj = nn.Parameter(drawn(EXPERTS, HIDDEN, WIDE))
            self.act_fn = nn.ReLU()

        def forward(self, x, index, weights):
            raise AssertionError("packed experts do not call this")

    module = Minimal(MixtralConfig())
    up, down = module.up_proj.data, module.down_proj.data
    holder = Holder(module)
    recipe = Config("int8").recipe
    swap_in(holder, survey(holder, [], embeddings=False)[0], recipe, wait=True)
    for name, w in (("up_proj", up), ("down_proj", down)):
        for key, value in quantize_into(module, name, w, recipe, Stats(name)).items():
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
    x, index, weights = routed()
    each = torch.relu(torch.einsum("th,ewh->tew", x, module.dequantize("up_proj", torch.float32)))
    each = torch.einsum("tew,ehw->teh", each, module.dequantize("down_proj", torch.float32))
    chosen = each.gather(1, index[..., None].expand(-1, -1, HIDDEN))
    torch.testing.assert_close(module(x, index, weights), (chosen * weights[..., None]).sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_almost_all_expert_bytes_are_packed(kind, tmp_path):
    source = tiny_model(kind)
    experts = [name for name, p in source.named_parameters() if ".experts." in name]
    assert experts and all(source.get_parameter(name).dim() == 3 for name in experts)
    source.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("int4"))
    assert not set(experts) & set(dict(model.named_parameters()))
    packed = [p for name, p in model.named_parameters() if ".experts." in name and name.endswith("_codes")]
    codes = sum(source.get_parameter(name).numel() for name in experts)
    assert sum(p.numel() for p in packed) == codes // 2 and all(p.dtype == torch.uint8 for p in packed)


@pytest.fixture
def moe(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("int4"))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},  # PEFT turns these into parameters itself
    ],
    ids=["parameters", "modules"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PEFT says that nothing matched, and goes on
def test_adapters_for_packed_experts_are_refused_instead_of_training_nothing(moe, targets):
    with pytest.raises(UnsupportedError, match=r"experts\.(gate_up|down)_proj.*modules_to_not_convert"):
        get_peft_model(moe, LoraConfig(**targets))
    with pytest.raises(UnsupportedError, match="packed"):
        inject_adapter_in_model(LoraConfig(**targets), copy.deepcopy(moe), "other")


def test_adapters_beside_packed_experts_train(moe):
    model = get_peft_model(moe, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model(**tiny_inputs(moe)).logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
