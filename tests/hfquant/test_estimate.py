"""Estimates follow from shapes in the way the statistics and hidden states do, and reality is near."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import CalibrationError, HfQuantConfig, UnsupportedError
from hfquant.calibration_state import Settings
from hfquant.coverage import survey
from hfquant.estimate import estimate
from hfquant.preview import preview
from hfquant.source import empty_model
from hfquant.testing.tiny import tiny_model
from hfquant.throughput import Throughput
from tests import fresh

BUNDLED = Path(__file__).parents[1] / "models"
SPEED = Throughput(1e12, 1e12, 1e12, 1e12, 1e12, 1e-6, 1e-9)


@pytest.fixture(autouse=True)
def known_speed(request, monkeypatch):
    """A machine whose speed is known, so that what follows from it is too."""
    if "on_this_machine" not in request.node.name:
        monkeypatch.setattr("hfquant.estimate.measure", lambda *a: SPEED)


def of(kind="llama", settings=None, **options):
    model = tiny_model(kind)
    model.config.architectures = [type(model).__name__]
    empty = empty_model(model.config, torch.float32)
    options = {"method": "gptq", "data": torch.zeros(40, 16, dtype=torch.int64), "samples": 32, **options}
    return estimate(empty, survey(empty, None, False)[0], HfQuantConfig(**options), settings)


def test_hidden_states_are_two_sets_of_all_tokens_and_one_batch_if_they_lie_on_the_disk():
    batch = 8 * 16 * 64 * 4 / 1e6  # the original model runs on one of them

    def held(**options):
        return pytest.approx(of(**options).memory["hidden states"], abs=1e-3)

    assert held() == (4 + 4 + 1) * batch
    assert held(samples=16) == (2 + 2 + 1) * batch
    assert held(settings=Settings(offload=Path("x"))) == 3 * batch
    assert held(gptaq=0.5) == 4 * 4 * batch


def test_statistics_are_one_gram_matrix_at_a_time():
    widest = 8 * 176**2
    assert of().memory["statistics"] == pytest.approx(widest / 1e6, abs=1e-3)
    assert of(gptaq=0.5).memory["statistics"] == pytest.approx(2 * widest / 1e6, abs=1e-3)
    assert of("mixtral").memory["statistics"] >= 4 * 8 * 64**2 / 1e6  # each expert has its own


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral", "qwen3_moe"])
def test_memory_is_that_of_the_largest_block_and_of_what_is_outside(kind):
    found, model = of(kind), tiny_model(kind)
    size = sum(p.numel() * 4 for p in model.parameters()) / 1e6
    assert 2 * found.memory["block"] + found.memory["outside blocks"] == pytest.approx(size, abs=2e-3)
    biggest = max(found.memory["statistics"] + found.memory["rounding"], found.memory["outside blocks"])
    assert found.peak_mb > found.memory["process"] + found.memory["hidden states"] + biggest
    assert found.peak_mb < sum(found.memory.values()) + size


def test_time_of_passes_and_statistics_grows_with_the_data_and_that_of_rounding_does_not():
    less, more, most = of(samples=8), of(samples=16), of(samples=32)
    assert (less.batches, more.batches, most.batches) == ((1, 8, 16), (2, 8, 16), (4, 8, 16))
    for what in ("forward passes", "statistics"):  # but for the original model, which runs on one batch
        once, twice = more.seconds[what] - less.seconds[what], most.seconds[what] - more.seconds[what]
        assert twice == pytest.approx(2 * once) and once > 0
    assert most.seconds["statistics"] == pytest.approx(4 * less.seconds["statistics"])
    assert more.seconds["rounding"] == less.seconds["rounding"]
    assert more.total_seconds == pytest.approx(sum(more.seconds.values()))


def test_inputs_of_the_original_model_take_more_time():
    assert of(gptaq=0.5).seconds["forward passes"] > of().seconds["forward passes"]


def test_text_that_the_model_writes_takes_time_and_the_whole_model():
    written, read = of(data="self", length=16), of()
    size = sum(p.numel() * 4 for p in tiny_model("llama").parameters()) / 1e6
    assert written.memory["model that writes the text"] == pytest.approx(size, abs=1e-3)
    assert written.seconds["writing the text"] > 0 and "writing the text" not in read.seconds


def test_data_that_is_not_there_is_named_at_once():
    with pytest.raises(CalibrationError, match=r"no calibration file missing\.txt"):
        of(data="missing.txt")


def test_a_model_without_blocks_is_refused_as_in_the_run(monkeypatch):
    def none(model):
        raise UnsupportedError("no list of blocks")

    monkeypatch.setattr("hfquant.estimate.find_chain", none)
    with pytest.raises(UnsupportedError, match="no list of blocks"):
        of()


def test_a_preview_needs_the_configuration_alone(tmp_path):
    (tmp_path / "config.json").write_text((BUNDLED / "tiny-llama" / "config.json").read_text())
    made = preview(tmp_path, HfQuantConfig("gptq", data=str(BUNDLED / "heldout.txt"), samples=8, length=64))
    assert made.estimate["batches"] == (1, 8, 64) and made.calibration["data"] == "file heldout.txt"
    assert json.loads(json.dumps(made.to_dict()))["estimate"]["peak_mb"] == made.estimate["peak_mb"]
    assert preview(tmp_path, HfQuantConfig("int4")).estimate is None


def test_a_model_that_cannot_run_without_values_has_no_estimate_and_a_warning(monkeypatch, caplog):
    def fails(*arguments):
        raise NotImplementedError("needs values")

    monkeypatch.setattr("hfquant.estimate.block_works", fails)
    made = preview(BUNDLED / "tiny-llama", HfQuantConfig("gptq", data="self"))
    assert made.estimate is None and made.bits_per_weight > 4
    assert "no estimate" in caplog.text and "needs values" in caplog.text


# Runs a preview and then the quantization, and prints what was promised and what it took (CPU seconds, MB).
PROGRAM = """
import json, sys, time
import hfquant
from hfquant.preview import preview
src, out, data, options = *sys.argv[1:4], json.loads(sys.argv[4])
config = hfquant.HfQuantConfig(data=data, **options)
promised = preview(src, config).estimate
started = time.process_time()
report = hfquant.quantize(src, config, out)
spent = time.process_time() - started
print(json.dumps({"promised": promised, "seconds": spent, "peak_mb": report.peak_rss_mb}))
"""


def reality(src, out, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = fresh.run(PROGRAM, src, out, BUNDLED / "heldout.txt", json.dumps(options), environment=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["promised"] is not None, done.stderr  # which says why there is no estimate
    return found


def wide_model(folder):
    """A block whose statistics and their factor take far more memory than the libraries do."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=3584, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in (BUNDLED / "tiny-llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


W4A4 = {"method": "fpq", "act_bits": 4}


@pytest.mark.parametrize(
    ("options", "which"),
    [({"method": "gptq"}, "bundled"), ({"method": "awq"}, "bundled"), (W4A4, "bundled"), ({"method": "gptq"}, "wide")],
    ids=str,
)
def test_reality_on_this_machine_is_near(tmp_path, options, which):
    """Time in seconds of one CPU thread, which other processes on the machine add nothing to."""
    src = BUNDLED / "tiny-llama" if which == "bundled" else wide_model(tmp_path / "source")
    found = reality(src, tmp_path / "out", **options, samples=16, length=128)
    promised = found["promised"]
    assert promised["peak_mb"] / 1.5 < found["peak_mb"] < promised["peak_mb"] * 1.5
    assert promised["total_seconds"] / 3 < found["seconds"] < promised["total_seconds"] * 3
    if which == "wide":  # beyond what the process takes anyway
        own = found["peak_mb"] - promised["memory"]["process"]
        expected = promised["peak_mb"] - promised["memory"]["process"]
        assert expected / 1.5 < own < expected * 1.5
