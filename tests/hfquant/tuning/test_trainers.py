"""TRL's trainer and transformers': the same numbers, said which it was; conversations and what of them is learned."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfquant
from hfquant.conversations import MASK
from hfquant.errors import SpecError, UnsupportedError
from hfquant.locks import LOCK_NAME
from hfquant.optional_packages import installed_version, is_installed
from hfquant.testing.tiny import tiny_model
from hfquant.tuning import trainers
from hfquant.tuning.forecast import forecast
from hfquant.tuning.request import Request, plan
from hfquant.tuning.rows import IGNORED, collate, labels, read_rows
from hfquant.tuning.state import State
from hfquant.tuning.trainers import DISTILL, PLAIN, SFT, as_it_was, build

from .conftest import MODEL

END = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}" + END + "{{ m.role }}" + END + "{{ m.content }}" + END
    + "{% endfor %}{% if add_generation_prompt %}" + END + "assistant" + END + "{% endif %}"
)  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory, text):
    """Some orders, asked for and told, in conversations of several lengths."""
    orders = text.read_text().split("Order ")[1:61]
    rows = []
    for number, order in enumerate(orders):
        said = [{"role": "user", "content": f"Order {number}?"}, {"role": "assistant", "content": order.strip()}]
        rows.append({"id": str(number), "messages": said * (1 + number % 2)})
    file = tmp_path_factory.mktemp("chats") / "orders.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def bare(talker, tmp_path):
    """It without its weights."""
    return shutil.copytree(talker, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))


class Killed(BaseException):
    """In place of the signal."""


def test_both_trainers_learn_the_same_also_where_one_was_killed(recipe, chats, talker, tmp_path):
    """Conversations of several lengths, padded, masked, in two micro-batches, with dropout: all that is counted."""
    train = {"packing": False, "length": 48, "accumulate": 2, "save_every": 2, "steps": 4, "learning_rate": 0.001}
    paths = {name: recipe(name, train={**train, "trainer": name}, evaluate=None) for name in ("trl", "transformers")}

    def kill(what, share):
        if what.startswith("training") and share > 0.7:
            raise Killed

    with pytest.raises(Killed):
        hfquant.finetune(paths["transformers"], talker, tmp_path / "transformers", data=chats, tick=kill)
    found = {name: hfquant.finetune(path, talker, tmp_path / name, data=chats) for name, path in paths.items()}
    losses = {name: [entry["loss"] for entry in report.losses] for name, report in found.items()}
    assert losses["trl"] == pytest.approx(losses["transformers"], rel=1e-5) and len(losses["trl"]) == 4
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in found)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # Adam makes steps of rounding errors where a gradient is nearly 0
        assert (ours[name] - tensor).norm() < 1e-3 * tensor.norm()
    facts = {name: report.training for name, report in found.items()}
    assert facts["trl"]["trainer"].startswith("trl.SFTTrainer 1.")
    assert facts["transformers"]["trainer"].startswith("transformers.Trainer 5.")
    assert facts["trl"]["assistant_only_loss"] and facts["trl"]["loss_tokens"] < facts["trl"]["tokens"]
    assert 0 < found["trl"].losses[0]["mean_token_accuracy"] < 1


def test_the_loss_is_that_of_what_the_assistant_says(recipe, chats, talker, tmp_path):
    """By hand, of all samples in one batch, and of those that were kept back."""
    train = {"packing": False, "length": 40, "samples": 20, "batch_size": 20, "steps": 1}
    path = recipe(quantize=None, lora={"dropout": 0.0}, train=train, evaluate={"sequences": 2})
    report = hfquant.finetune(path, talker, tmp_path / "out", data=chats)
    rows = read_rows(plan(Request(path, talker, tmp_path / "else", data=chats)))
    assert len(rows.train) == 20 and rows.counted is not None
    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32)

    def by_hand(samples):
        total, count = 0.0, 0
        for ids, mask in samples:
            with torch.no_grad():
                logits = model(ids[None]).logits[0].double().log_softmax(-1)
            for place in range(1, len(ids)):
                if mask[place]:
                    total, count = total - float(logits[place - 1, ids[place]]), count + 1
        return total / count, count

    held = [
        (ids, torch.cat([torch.zeros(1), mask]))
        for batch, masks in zip(rows.measure, rows.counted, strict=True)
        for ids, mask in zip(batch, masks, strict=True)
    ]
    loss, count = by_hand(held)
    assert report.stages[0].loss == pytest.approx(loss, rel=1e-6) and report.stages[0].fidelity.tokens == count
    everything = [(row["input_ids"], row[MASK] * row["attention_mask"]) for row in rows.train]
    assert report.losses[0]["loss"] == pytest.approx(by_hand(everything)[0], rel=1e-5)


def test_masks_are_part_of_what_a_run_is(recipe, chats, talker, tmp_path):
    found = {}
    for only in (None, False):
        path = recipe(f"only{only}", train={"length": 64, "assistant_only_loss": only})
        found[only] = read_rows(plan(Request(path, talker, tmp_path / "out", data=chats)))
    assert [row["input_ids"].tolist() for row in found[None].train] == [
        row["input_ids"].tolist() for row in found[False].train
    ]
    assert found[None].sha256 != found[False].sha256
    assert found[None].counted is not None and found[False].counted is None
    batch = collate(found[None].train)
    assert MASK not in batch and torch.equal(batch["labels"], labels(stacked(found[None].train))["labels"])
    learned = (batch["labels"] != IGNORED).float().mean()
    assert 0.3 < learned < 0.9 and (collate(found[False].train)["labels"] != IGNORED).all()
    assert all(set(inputs) == {"input_ids", "attention_mask"} for inputs in found[None].batches(4, 2))


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_samples_in_which_the_assistant_says_nothing_are_left_out(recipe, talker, tmp_path):
    """Cut behind what the user says, there is nothing to learn."""
    silent = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}]
    speaking = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "word " * 60}]
    path = recipe(train={"length": 40, "packing": False}, evaluate=None)
    rows = read_rows(plan(Request(path, talker, tmp_path / "out", data=[silent, speaking, silent, speaking])))
    assert len(rows.train) == 2 and rows.loss_tokens > 2 * 10
    with pytest.raises(hfquant.HfQuantError, match="the assistant says nothing in the 2 samples of 40 tokens"):
        read_rows(plan(Request(path, talker, tmp_path / "out", data=[silent, silent])))


# ---- which trainer


def chosen(recipe, model, data, **train):
    return plan(Request(recipe(train=train), model, None, data=data)).trainer


def test_without_trl_transformers_trains_and_a_recipe_that_asks_for_it_is_refused(
    recipe, bare, text, tmp_path, monkeypatch
):
    assert chosen(recipe, bare, text).name == SFT
    assert chosen(recipe, bare, text, trainer="transformers").name == PLAIN
    monkeypatch.setattr(trainers, "installed_version", lambda package: None)
    found = chosen(recipe, bare, text)
    assert found.name == PLAIN and found.because is None
    told = forecast(recipe(), bare, None, data=text).lines()
    assert any(line.startswith("trainer: transformers.Trainer") for line in told)
    with pytest.raises(SpecError, match=r"recipe\.yaml, line \d+: trainer: trl, and TRL is not .*hfquant\[trl\]"):
        hfquant.finetune(recipe(train={"trainer": "trl"}), bare, tmp_path / "out", data=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, "past its adapter"),
        ({"quantize": {"modules_to_not_convert": ["embed_tokens"]}}, "which is going to be quantized"),
    ],
)
def test_what_trl_would_pass_over_is_trained_by_transformers_and_said(recipe, bare, text, tmp_path, sections, message):
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    found = plan(Request(recipe(**sections), bare, None, data=text)).trainer
    assert found is not None and found.name == PLAIN and message in found.because
    assert any(message in line for line in forecast(recipe(**sections), bare, None, data=text).lines())
    with pytest.raises(SpecError, match=message):
        hfquant.finetune(recipe(**sections, train={"trainer": "trl"}), bare, tmp_path / "out", data=text)


def test_what_trl_cannot_do_is_said(recipe, bare, text, monkeypatch):
    read = plan(Request(recipe(), bare, None, data=text))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = trainers.choose(read.recipe, read.config, read.model_config, torch.device("cuda"))
    assert found is not None and found.name == PLAIN and "one GPU of a process" in found.because
    assert trainers.choose(read.recipe, read.config, read.model_config, torch.device("cpu")).name == SFT
    monkeypatch.setattr(trainers, "installed_version", lambda package: "0.29.1")
    found = trainers.choose(read.recipe, read.config, read.model_config, torch.device("cpu"))
    assert found is not None and found.name == PLAIN and "TRL 0.29.1 is older than 1.0" in found.because


def test_weights_that_are_spread_over_processes_are_trained_by_transformers(recipe, bare, text, monkeypatch):
    monkeypatch.setattr(trainers.sharded, "is_sharded", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    found = chosen(recipe, bare, text)
    assert found.name == PLAIN and "each process holds a part" in found.because
    with pytest.raises(SpecError, match=r"trainer: trl, and .* each process holds a part"):
        chosen(recipe, bare, text, trainer="trl")


def test_training_through_quantization_has_its_own_trainer(recipe, bare, text):
    for distill, name in ((True, DISTILL), (False, PLAIN)):
        sections = {"lora": None, "qat": {"distill": distill}}
        found = plan(Request(recipe(**sections), bare, None, data=text)).trainer
        assert found is not None and (found.name, found.because) == (name, None)
        with pytest.raises(SpecError, match=r"trainer: trl, and 'qat' trains .* with trainers of its own"):
            plan(Request(recipe(**sections, train={"trainer": "trl"}), bare, None, data=text))


# ---- models


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_the_loss_is_the_same_on_other_models_which_stay_as_they_are(kind, tmp_path, monkeypatch):
    """Experts too: TRL would balance them where the model does not ask for it. Nobody is told of the training."""
    from trl.trainer import base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *args, **kwargs: pytest.fail("sent"), raising=False)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 9, 12, 7, 12, 10):
        ids, seen = torch.randint(3, 250, (12,), generator=generator), (torch.arange(12) < length).long()
        rows.append({"input_ids": ids, "attention_mask": seen, MASK: torch.randint(2, (12,), generator=generator)})
    given = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    given |= {"learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "remove_unused_columns": False}
    given |= {"disable_tqdm": True, "save_strategy": "no", "output_dir": str(tmp_path)}
    losses = {}
    for name in (PLAIN, SFT):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["c_attn" if kind == "gpt2" else "q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(kind), config)
        before = model.config.to_dict()
        with as_it_was(model):
            made = build(name, model, given, rows, collate, [])
            made.train()
        losses[name] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        assert model.config.to_dict() == before and "forward" not in vars(model.get_base_model())
    assert losses[SFT] == pytest.approx(losses[PLAIN], rel=1e-5) and len(losses[SFT]) == 3


class Loud(torch.nn.Linear):
    """An output layer that does more than its weight tells."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_model_whose_loss_trl_does_not_know_is_refused(tmp_path):
    """It would train towards something else."""
    model = tiny_model("llama")
    head = Loud(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.arange(3, 15)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    given = {"max_steps": 1, "use_cpu": True, "report_to": [], "output_dir": str(tmp_path)}
    with as_it_was(model), pytest.raises(UnsupportedError, match=r"LlamaForCausalLM itself gives .*transformers"):
        build(SFT, model, given, rows, collate, [])
    with as_it_was(model):
        build(PLAIN, model, given, rows, collate, [])


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("no_such_package") and installed_version("no_such_package") is None
    assert installed_version("torch") == torch.__version__ and installed_version("no_such_other") is None


# ---- one run at a time


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "run"
    first = State(folder, {"recipe": "a"}, resume=True)
    first.note("quantization", 1)
    for resume in (True, False):
        with pytest.raises(SpecError, match=r"another process is writing to .*run: wait for it"):
            State(folder, {"recipe": "a"}, resume)
    first.close()
    again = State(folder, {"recipe": "a"}, resume=True)
    assert again.notes == {"quantization": 1}
    again.close()
    with pytest.raises(SpecError, match="unfinished run with another recipe"):
        State(folder, {"recipe": "b"}, resume=True)
    other = State(folder, {"recipe": "b"}, resume=False)  # the refusal let the folder go
    assert other.notes == {} and sorted(p.name for p in folder.iterdir()) == [LOCK_NAME, "run.json"]
    other.close()


def test_a_run_that_goes_on_with_another_trainer_names_both(tmp_path):
    from hfquant.tuning.run import Work

    state = State(tmp_path / "run", {}, resume=True)
    for name in ("transformers.Trainer 5.23.0", "trl.SFTTrainer 1.16.0", "trl.SFTTrainer 1.16.0"):
        work = Work(SimpleNamespace(trainer=name), state, lambda what, share: None)
        work._note_trainer()
    work._note_training(SimpleNamespace(sha256="0"), {"steps": 1}, [])
    assert state.notes["training"]["trainer"] == "transformers.Trainer 5.23.0, then trl.SFTTrainer 1.16.0"
    state.close()
