"""Stock PEFT on every backend, feature by feature: the table in docs/finetune.md is what is found here.

`python tests/hfquant/lora/test_matrix.py` writes the table again.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig
from hfquant.experts import QExperts
from hfquant.hadamard import hadamard, inverse_hadamard
from hfquant.lora.check import check_gradients, named_targets, plain_name
from hfquant.nn import QLinear
from hfquant.ranges import absmax
from hfquant.rounders import to_nearest
from hfquant.stats import Stats
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "finetune.md"
START, END = "<!-- PEFT table: written by tests/hfquant/lora/test_matrix.py -->", "<!-- end of PEFT table -->"

SEEN = torch.randint(3, 256, (8, 16), generator=torch.Generator().manual_seed(1))  # what calibrated methods see
LLAMA = {
    "`nf4`": HfQuantConfig("nf4", double_quant=True),
    "`int4`": HfQuantConfig("int4", group_size=32),
    "`int8`": HfQuantConfig("int8"),
    "`llm_int8`": HfQuantConfig("llm_int8"),
    "`fp8`": HfQuantConfig("fp8"),
    "`gptq`": HfQuantConfig("gptq", bits=4, group_size=32, data=SEEN),
    "`awq`": HfQuantConfig("awq", bits=4, group_size=32, data=SEEN),
    "`fpq`": HfQuantConfig("fpq", bits=4, act_bits=8, format="e2m1", act_format="e4m3", rounds=1, data=SEEN),
    "`w8a8`": HfQuantConfig("w8a8", data=SEEN),
    "`w8a8`, static inputs": HfQuantConfig("w8a8", dynamic=False, data=SEEN),
    "`gptq`, rotated": HfQuantConfig("gptq", bits=4, group_size=32, transform="rotate", data=SEEN),
}
EXPERTS = {
    "experts, `int4`": HfQuantConfig("int4", group_size=32),
    "experts, `gptq`": HfQuantConfig("gptq", bits=4, group_size=32, data=SEEN),
}
BACKENDS = LLAMA | EXPERTS
# What an adapter adds, measured in what it should: 1 if all of it arrives. Codes move in steps, so a layer may be off.
ARRIVES = (0.9, 1.1)
WORSE = 1.5  # times the error of rounding to nearest: merging spends some of it on what was added

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")


def targets(model: nn.Module) -> dict:
    """Layers behind a norm, behind attention and behind an activation; or experts and a layer beside them."""
    if any(isinstance(module, QExperts) for module in model.modules()):
        return {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return {"target_modules": ["q_proj", "o_proj", "down_proj"]}


def attached(base: nn.Module, strength: float = 0.3) -> PeftModel:
    """A copy of the model with a stock adapter whose parameters are drawn, so that it has an effect."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, **targets(base)))
    stir(model, strength)
    return model


@torch.no_grad()
def stir(model: nn.Module, strength: float = 0.3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name and parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(strength * noise if "lora_B" in name else noise)


def loss(model: nn.Module) -> Tensor:
    inputs = tiny_inputs(model)
    return model(**inputs, labels=inputs["input_ids"]).loss


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**tiny_inputs(model)).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The packed tensors by plain name."""
    held = packed_modules(model)
    return {f"{plain_name(name)}.{leaf}": m._parameters[leaf].clone() for name, m in held for leaf in m.packed_names()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trains(base: nn.Module, **options) -> None:
    """Every adapter learns, the loss falls, and no packed tensor changes."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **(targets(base) | options)))
    config = targets(base)
    named_targets(model, [*config["target_modules"], *config.get("target_parameters", [])])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for steps in range(4):
        now = loss(model.train())
        now.backward()
        check_gradients(model, min(steps, 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(now.item())
    assert losses[-1] < 0.95 * losses[0], losses
    assert same(bits(model), bits(base))


def prepares(base: nn.Module) -> None:
    """`prepare_model_for_kbit_training` changes no packed bit, and with its checkpointing gradients stay the same."""
    wanted = gradients(attached(base))
    prepared = prepare_model_for_kbit_training(copy.deepcopy(base))
    assert prepared.is_gradient_checkpointing and not any(p.requires_grad for p in prepared.parameters())
    assert prepared.train().get_input_embeddings()(tiny_inputs(prepared)["input_ids"]).requires_grad
    assert same(bits(prepared), bits(base))
    model = get_peft_model(prepared, LoraConfig(r=4, lora_alpha=8, **targets(base)))
    stir(model)
    found = gradients(model)
    assert found.keys() == wanted.keys() and all(grad.any() for grad in found.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def saves_and_loads(base: nn.Module) -> None:
    """The adapter of a folder on a model that never saw it gives the same bits."""
    model = attached(base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(base))


def dense(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All packed weights, dequantized in the basis and orientation of the model."""
    for name, module in packed_modules(model):
        if isinstance(module, QExperts):
            yield from ((f"{plain_name(name)}.{leaf}", module.dequantize(leaf, torch.float32)) for leaf in module.specs)
        else:
            yield plain_name(name), module.qtensor().dequantize(torch.float32)


def rounded(weight: Tensor, like: QLinear) -> Tensor:
    """The matrix rounded to nearest on the numbers of a layer, in its basis, with ranges that are found anew."""
    old = like.qtensor()
    turned = hadamard(weight) if old.rotated else weight
    values = to_nearest(turned, absmax(turned, old.spec, Stats("merged"))).dequantize()
    return inverse_hadamard(values) if old.rotated else values


def merges(base: nn.Module) -> None:
    """Merged weights are the dense sum, quantized: what was added arrives, and the error is one of rounding.

    Of a change this weak, rounding 4-bit codes to the nearest would lose a third; the wrong basis loses it all.
    """
    model = attached(base, strength=0.04)
    wanted = {}
    before = dict(dense(base))
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A"):
            leaf = getattr(layer, "parameter_name", None)
            full = plain_name(name) + (f".{leaf}" if leaf else "")
            wanted[full] = before[full] + layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload(safe_merge=True)
    after = dict(dense(merged))
    assert after.keys() == before.keys() and wanted
    for name, weight in after.items():
        if name not in wanted:
            assert torch.equal(weight, before[name])
            continue
        change = wanted[name] - before[name]
        arrived = float(((weight - before[name]) * change).sum() / change.square().sum())
        assert ARRIVES[0] < arrived < ARRIVES[1], (name, arrived)
    for name, module in packed_modules(merged):
        if name in wanted:
            assert (after[name] - wanted[name]).norm() < WORSE * (rounded(wanted[name], module) - wanted[name]).norm()
    assert not any(hasattr(module, "lora_A") for module in merged.modules())
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(merged))


def takes_two(base: nn.Module) -> None:
    """Two adapters switch, come and go, and switched off they leave the base model, to the bit."""
    alone = logits(base)
    model = attached(base)
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, **targets(base)))
    model.set_adapter("second")
    stir(model, seed=1)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), alone)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.delete_adapter("second")
        model.load_adapter(f"{folder}/second", adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), second)


def trains_dora(base: nn.Module) -> None:
    """DoRA, whose magnitudes come from the dequantized weight."""
    trains(base, use_dora=True)


FEATURES: dict[str, Callable[[nn.Module], None]] = {
    "`get_peft_model`, train": trains,
    "`prepare_model_for_kbit_training`": prepares,
    "save, load": saves_and_loads,
    "merge": merges,
    "several adapters": takes_two,
    "DoRA": trains_dora,
}


def loaded(name: str, folder: Path) -> nn.Module:
    """The tiny model of a backend, of which one block does, quantized."""
    model = tiny_model("mixtral" if name in EXPERTS else "llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(BACKENDS[name]))


def cell(base: nn.Module, feature: str) -> str:
    """Whether a feature works: "yes", or "refused" if an error says that it does not."""
    try:
        FEATURES[feature](base)
    except ValueError as error:
        if "does not work with use_dora" not in str(error):
            raise
        return "refused by PEFT"
    return "yes"


def row(name: str, base: nn.Module) -> str:
    return f"| {name} | " + " | ".join(cell(base, feature) for feature in FEATURES) + " |"


def head() -> list[str]:
    return [f"| backend | {' | '.join(FEATURES)} |", "|---" * (1 + len(FEATURES)) + "|"]


def committed() -> list[str]:
    return PAGE.read_text().split(START)[1].split(END)[0].strip().splitlines()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_of_the_table_is_what_is_found(name, tmp_path):
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in committed()}
    assert row(name, loaded(name, tmp_path)) == rows[name]


def test_the_table_has_every_backend_and_feature():
    lines = committed()
    assert lines[:2] == head()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(BACKENDS)


def main() -> None:
    """Write the table."""
    page = PAGE.read_text()
    lines = head()
    for name in BACKENDS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, loaded(name, Path(folder))))
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before + START, "", *lines, "", END]) + after)


if __name__ == "__main__":
    main()
