"""Stock PEFT on quantized models: adapters train, merge without being lost, save and reload, in every common kind."""

import copy
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfquant import HfQuantConfig
from hfquant.nn import QEmbedding, QLinear
from hfquant.testing.tiny import tiny_inputs, tiny_model

MODELS = Path(__file__).parents[1] / "models"
TRAINED = MODELS / "tiny-llama"
STEPS = 20


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Held-out token ids [12, 64]: 8 rows to train on, 4 to measure on."""
    ids = AutoTokenizer.from_pretrained(TRAINED)((MODELS / "heldout.txt").read_text()[:8000])["input_ids"]
    return torch.tensor(ids[: 12 * 64]).view(12, 64)


def load(path: Path | str, config: HfQuantConfig | None = None, dtype: torch.dtype = torch.float32):
    how = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how)


def tuned(model, text: Tensor, config: LoraConfig | None = None) -> tuple[PeftModel, list[float]]:
    """A model with an adapter trained for a few steps, and its losses."""
    torch.manual_seed(0)
    model = get_peft_model(model, config or LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(text[:8], labels=text[:8]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    return model(ids).logits.float()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def merged(text, tmp_path_factory):
    """By method: logits of the base, tuned, merged, unmerged and unloaded model, and the quantization errors of the
    base model and of the tuned one (adapter merged in full precision, then quantized)."""
    results = {}

    def measure(name: str, **options):
        if name in results:
            return results[name]
        folder, ids = tmp_path_factory.mktemp(name), text[8:]
        model, losses = tuned(load(TRAINED, HfQuantConfig(name, **options)), text)
        model.save_pretrained(folder / "adapter")
        with model.disable_adapter():
            base = logits(model, ids)
        out = {"losses": losses, "base": base, "tuned": logits(model, ids)}
        model.merge_adapter()
        out["merged"] = logits(model, ids)
        model.unmerge_adapter()
        out["unmerged"] = logits(model, ids)
        del model
        again = PeftModel.from_pretrained(load(TRAINED, HfQuantConfig(name, **options)), folder / "adapter")
        out["reloaded"] = logits(again, ids)
        unloaded = again.merge_and_unload(safe_merge=True)
        out["unloaded"] = logits(unloaded, ids)
        unloaded.save_pretrained(folder / "unloaded")
        out["unloaded again"] = logits(load(folder / "unloaded"), ids)
        full = load(TRAINED)
        out["base error"] = difference(base, logits(full, ids))
        full = PeftModel.from_pretrained(full, folder / "adapter").merge_and_unload()
        full.save_pretrained(folder / "full")
        quantized = load(folder / "full", HfQuantConfig(name, **options))
        out["tuned error"] = difference(logits(quantized, ids), logits(full, ids))
        results[name] = out
        return out

    return measure


METHODS = ["int8", "int4", "nf4"]


@pytest.mark.parametrize("method", METHODS)
def test_lora_trains_and_reloads_bit_for_bit(merged, method):
    out = merged(method)
    assert out["losses"][-1] < 0.7 * out["losses"][0]
    assert torch.equal(out["reloaded"], out["tuned"])


@pytest.mark.parametrize("method", METHODS)
def test_merging_keeps_what_the_adapter_learned(merged, method):
    """At 8 bits to 2%; at 4 bits no worse than quantizing the tuned model from full precision."""
    out = merged(method)
    error, effect = difference(out["merged"], out["tuned"]), difference(out["tuned"], out["base"])
    figures = {"effect": effect, "merge": error, "unmerge": difference(out["unmerged"], out["tuned"])}
    figures |= {name: out[name] for name in ("base error", "tuned error")}
    print(
        method, *(f"{loss:.3f}" for loss in out["losses"][:: STEPS - 1]), *(f"{k} {v:.4f}" for k, v in figures.items())
    )
    assert error <= (0.02 if method == "int8" else out["tuned error"])
    assert error < effect / 2  # rounding to nearest fails this: it leaves the base model as it was
    assert figures["unmerge"] <= (0.02 if method == "int8" else out["tuned error"])


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unload_is_the_merged_model_and_saves_as_it_is(merged, method):
    out = merged(method)
    assert torch.equal(out["unloaded"], out["merged"]) and torch.equal(out["unloaded again"], out["unloaded"])


@pytest.fixture
def llama(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return load(tmp_path / "llama", HfQuantConfig("int4", group_size=32))


@pytest.fixture
def eight_bit(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return load(tmp_path / "llama", HfQuantConfig("int8"))


def test_marks_do_not_claim_another_library(llama, monkeypatch):
    """`num_parameters` and AdaLora demand bitsandbytes of models that carry its marks."""
    assert not hasattr(llama, "is_loaded_in_4bit") and not hasattr(llama, "is_loaded_in_8bit")
    monkeypatch.setattr("peft.tuners.adalora.model.is_bnb_available", lambda: False)
    assert llama.num_parameters() == sum(p.numel() for p in llama.parameters())
    assert_all_adapters_learn(get_peft_model(llama, AdaLoraConfig(target_modules=["q_proj"], total_step=10)))


def assert_all_adapters_learn(model: PeftModel) -> None:
    inputs = tiny_inputs(model)
    model.train()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    dead = [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()]
    assert trainable and not dead and not frozen
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())


LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = {
    "dora": LoraConfig(target_modules=LINEARS, use_dora=True),
    "rslora": LoraConfig(target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    "adalora": AdaLoraConfig(target_modules=LINEARS, total_step=10),
    "loha": LoHaConfig(target_modules=LINEARS),
    "vera": VeraConfig(target_modules=["q_proj"], r=4),
    "oft": OFTConfig(target_modules=LINEARS, oft_block_size=8, r=0),
    "ia3": IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
}


# How far to move each adapter's parameters, so that its effect is well above the rounding of int8.
STRENGTH = {
    "dora": 0.05,
    "rslora": 0.05,
    "adalora": 0.4,
    "loha": 0.2,
    "vera": 0.3,
    "oft": 0.1,
    "ia3": 0.1,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_adapter_trains_and_merges(eight_bit, kind):
    llama = eight_bit
    model = get_peft_model(llama, copy.deepcopy(KINDS[kind]))
    assert_all_adapters_learn(model)
    ids = tiny_inputs(llama)["input_ids"]
    with model.eval().disable_adapter():
        base = logits(model, ids)
    with torch.no_grad():  # most adapters start as the identity: give them something to do
        for seed, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += STRENGTH[kind] * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    before = logits(model, ids)
    after = logits(model.merge_and_unload(), ids)
    effect, error = difference(before, base), difference(after, before)
    print(kind, f"effect {effect:.3f}, merge {error:.3f}")
    assert effect > 0.1 and error < effect / 2
    assert all(type(m) is not torch.nn.Linear for n, m in model.named_modules() if n.endswith("q_proj"))


def test_gpt2_conv1d_layers_take_adapters(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    base = load(tmp_path, HfQuantConfig("int8"))
    assert isinstance(base.transformer.h[0].attn.c_attn, QLinear)
    ids = tiny_inputs(base)["input_ids"]
    # fan_in_fan_out describes Conv1D's weight; packed layers store all weights the usual way, PEFT puts the flag right
    config = LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(base, config)
    assert_all_adapters_learn(model)
    before = logits(model.eval(), ids)
    assert difference(logits(model.merge_and_unload(), ids), before) < 0.02


def test_adapters_on_packed_embeddings(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    base = load(tmp_path, HfQuantConfig("int8", embeddings=True))
    assert isinstance(base.model.embed_tokens, QEmbedding)
    ids = tiny_inputs(base)["input_ids"]
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    assert_all_adapters_learn(model)
    before = logits(model.eval(), ids)
    with model.disable_adapter():
        assert difference(logits(model, ids), before) > 0.05
    assert difference(logits(model.merge_and_unload(), ids), before) < 0.02
