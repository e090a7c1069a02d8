"""Packed experts compute what their model's own class computes with the dequantized weights."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
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
from hfquant.expert_view import ExpertsView
from hfquant.experts import AT_ONCE, QExperts, RoutedExperts, expert_projections, why_not_experts
from hfquant.quantize import pack, quantize_linear
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
def test_a_few_tokens_run_in_two_calls(kind, method, tokens, count_calls):
    calls = count_calls("jobs")
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


def test_fused_weights_are_views_that_no_listing_shows():
    packed, plain = both("gpt_oss")
    for module in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        view = module.gate_up_proj
        assert (view.shape, view.dtype, view.device) == (plain.gate_up_proj.shape, torch.float32, torch.device("cpu"))
        assert torch.equal(view + 0, plain.gate_up_proj) and not view.requires_grad
        assert "gate_up_proj" not in {*module.state_dict(), *dict(module.named_parameters(recurse=False))}
        assert not module.waiting() and not hasattr(module, "nonsense") and not hasattr(module, "up_proj")
    assert packed.to(torch.bfloat16).gate_up_proj.dtype == torch.bfloat16


def adapted(holder: Holder, *names: str) -> None:
    """Give the experts of `holder` stock adapters on all projections, with seeded values."""
    targets = [f"experts.{name}" for name in holder.experts.specs]
    for name in names:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets, init_lora_weights=False)
        inject_adapter_in_model(config, holder, name)
    with torch.no_grad():
        for seed, parameter in enumerate(p for name, p in holder.named_parameters() if "lora_" in name):
            parameter.copy_(drawn(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5)


def adapted_pair(kind: str, *names: str, method: str = "int4", **options) -> tuple[Holder, Holder]:
    """Packed experts and dense ones of the same values with the same stock adapters."""
    packed, plain = both(kind, method, **options)
    plain.specs = packed.specs
    pair = Holder(packed), Holder(plain)
    for holder in pair:
        adapted(holder, *names)
        for wrapper in holder.modules():
            if hasattr(wrapper, "set_adapter"):
                wrapper.set_adapter(list(names))
    return pair


@pytest.mark.parametrize("names", [("one",), ("one", "two")], ids=["one adapter", "two at once"])
@pytest.mark.parametrize("kind", CLASSES)
def test_stock_adapters_on_packed_experts_are_those_on_dense_ones(kind, names):
    results = []
    for holder in adapted_pair(kind, *names):
        x, index, weights = routed()
        x.requires_grad_(), weights.requires_grad_()
        y = holder.experts(x, index, weights)
        learned = {name: p for name, p in holder.named_parameters() if "lora_" in name}
        grads = torch.autograd.grad(y, (x, weights, *learned.values()), drawn(*y.shape, seed=9))
        with torch.no_grad():  # a few tokens run all experts at once
            few = holder.experts(x[:2], index[:2], weights[:2])
        results.append((list(learned), [y, few, *grads], holder.experts.get_base_layer()(x, index, weights)))
    (names_ours, ours, base_ours), (names_theirs, theirs, _) = results
    assert names_ours == names_theirs and len(names_ours) == 4 * len(names)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5)
    assert (ours[0] - base_ours).norm() > 0.1 * base_ours.norm()
    assert all(grad.abs().sum() > 0 for grad in ours[2:])


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest floating-point tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and type(value) is not ExpertsView and value.is_floating_point():
                self.size = max(self.size, value.numel())
        return out


def test_adapting_packed_experts_never_makes_a_weight_of_all_experts():
    seen = []
    for holder in adapted_pair("mixtral", "one"):
        with Largest() as largest:
            holder.experts(*routed()).sum().backward()
        seen.append(largest.size)
    one = 2 * WIDE * HIDDEN
    assert seen[0] <= one < EXPERTS * one <= seen[1]


def turned(packed: QExperts) -> None:
    """Quantize the experts' weights again in the Hadamard basis of their inputs."""
    recipe = Config("int8").recipe
    for projection in list(packed.specs):
        dense = packed.dequantize(projection, torch.float32)
        matrices = dense.transpose(1, 2) if packed.is_transposed else dense
        parts = [pack(quantize_linear(w.contiguous(), recipe, rotated=True), recipe) for w in matrices]
        packed.hold(
            projection, {name: torch.stack([part[name] for part, _ in parts]) for name in parts[0][0]}, parts[0][1]
        )


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
def test_merging_quantizes_the_sum_in_the_basis_of_the_codes(kind, rotated):
    holder, dense = adapted_pair(kind, "one", method="int8")
    packed, inputs = holder.experts.get_base_layer(), routed()
    if rotated:
        turned(packed)
    wanted, base = dense.experts(*inputs), dense.experts.get_base_layer()(*inputs)
    before = {name: packed.get_parameter(name).clone() for name in packed.packed_names()}
    for projection in packed.specs:  # what did not change keeps its codes
        packed.write(projection, packed.dequantize(projection, torch.float32))
    assert all(torch.equal(packed.get_parameter(name), value) for name, value in before.items())
    merged = holder.experts.unload_and_optionally_merge_module(merge=True, safe_merge=rotated, adapter_names=None)
    assert merged is packed and all(spec.rotated is rotated for spec in packed.specs.values())
    assert not any(torch.equal(packed.get_parameter(name), before[name]) for name in before if name.endswith("codes"))
    assert (packed(*inputs) - wanted).norm() < 0.03 * (wanted - base).norm()


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


EVERY_EXPERT = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "target_parameters": EVERY_EXPERT},
        # PEFT turns what transformers 4 called modules into parameters itself
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"},
        {"target_modules": "all-linear"},
    ],
    ids=["parameters", "modules", "pattern", "all-linear"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PEFT looks for the pattern of the rank among modules
def test_every_way_to_name_experts_reaches_packed_ones(moe, targets, tmp_path):
    ids = tiny_inputs(moe)["input_ids"]
    fresh = copy.deepcopy(moe)
    counted = moe.num_parameters(), len(moe.state_dict())
    model = get_peft_model(moe, LoraConfig(r=2, init_lora_weights=False, **targets)).eval()
    found = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith(("mlp.experts", "mlp.experts.base_layer")) for name in found) == 4
    assert sum(name.endswith("q_proj") for name in found) == 2
    logits = model(input_ids=ids, labels=ids)
    logits.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, logits.logits)
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in again.state_dict())
    assert counted == (again.unload().num_parameters(), len(again.unload().state_dict()))


def test_an_adapter_that_does_not_reach_a_packed_weight_is_refused(moe):
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight.*target_modules instead, \"q_proj\""):
        get_peft_model(moe, LoraConfig(target_modules=["v_proj"], target_parameters=["self_attn.q_proj.weight"]))


def test_experts_that_an_adapter_could_not_be_put_on_are_refused(moe, monkeypatch):
    """As if PEFT looked for parameters in another way than hfquant knows."""
    monkeypatch.setattr("hfquant.experts.asked_by", lambda package: False)
    with (
        pytest.raises(UnsupportedError, match=r"experts\.down_proj.*modules_to_not_convert=\[\"experts\"\]"),
        pytest.warns(RuntimeWarning, match="no parameter was matched"),
    ):
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], target_parameters=EVERY_EXPERT), moe, "other")


def test_an_adapter_that_replaces_packed_experts_is_refused():
    packed, _ = both("mixtral")

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    register_parametrization(packed, "down_proj", Twice())
    with pytest.raises(UnsupportedError, match="'down_proj' than to add to it"):
        packed(*routed())


def test_adapters_beside_packed_experts_train(moe):
    model = get_peft_model(moe, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model(**tiny_inputs(moe)).logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
