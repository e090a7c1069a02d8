"""From folder to folder: what is written, what is reported, what is refused, and what a model says about itself."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hfquant
from hfquant import HfQuantConfig, HfQuantError, SpecError
from hfquant.backend import Backend, register, unregister
from hfquant.kernel import REFERENCE, Kernel
from hfquant.preview import preview
from hfquant.report import REPORT_NAME
from hfquant.staging import staged
from hfquant.testing.fakehub import FakeHub
from hfquant.testing.tiny import KINDS, tiny_inputs, tiny_model


def save_source(folder: Path, kind: str = "llama") -> Path:
    tiny_model(kind, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "llama")


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's files, read from their headers with nothing but the format's definition."""
    total = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(end - start for start, end in ends)
    return total


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_megabytes_are_those_of_the_files(source, tmp_path):
    report = hfquant.quantize(source, HfQuantConfig("int4"), tmp_path / "out")
    assert report.mb_before * 1e6 == pytest.approx(tensor_bytes(source), abs=0.5)
    assert report.mb_after * 1e6 == pytest.approx(tensor_bytes(tmp_path / "out"), abs=0.5)
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text()) == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (3, 16), (2, 128), (6, -1)])
def test_bits_per_weight_count_codes_and_scales(source, tmp_path, bits, group):
    """Closed form: whole bytes of codes for each row, and a scale of 16 bit (32 for a whole row) for each group."""
    report = hfquant.quantize(source, HfQuantConfig(f"int{bits}", group_size=group), tmp_path / "out")
    stored = count = 0
    for name, module in tiny_model("llama").named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, cols = module.weight.shape
            scales = 4 if group == -1 else 2 * math.ceil(cols / min(group, cols))
            stored += rows * (math.ceil(cols * bits / 8) + scales)
            count += rows * cols
    assert report.bits_per_weight == pytest.approx(8 * stored / count, rel=1e-12)


def test_the_folder_loads_to_the_same_logits_as_the_model_in_memory(source, tmp_path):
    hfquant.quantize(source, HfQuantConfig("nf4"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    memory = AutoModelForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("nf4"))
    inputs = tiny_inputs(memory)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, memory(**inputs).logits)


def test_tokenizer_files_come_along_and_other_files_do_not(source, tmp_path):
    hfquant.quantize(source, HfQuantConfig("int8"), tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "out/notes.txt").exists()
    assert not list((tmp_path / "out").glob("model*.safetensors"))


def test_the_class_is_the_one_that_the_config_names(tmp_path):
    save_source(tmp_path / "bert", "bert")
    hfquant.quantize(tmp_path / "bert", HfQuantConfig("int8"), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert hfquant.coverage(model).share > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [HfQuantConfig("int4"), HfQuantConfig("nf4", double_quant=True)], ids=["int4", "dq"])
def test_preview_promises_what_quantize_does(tmp_path, kind, config):
    save_source(tmp_path / kind, kind)
    done = hfquant.quantize(tmp_path / kind, config, tmp_path / "out")
    promised = preview(tmp_path / kind, config)
    unknown = {"seconds": None, "peak_rss_mb": None, "output": None}
    assert promised == replace(done, **unknown)


def test_preview_counts_outlier_columns(source, tmp_path):
    config = HfQuantConfig("int4", outliers=0.05)
    assert preview(source, config).mb_after == hfquant.quantize(source, config, tmp_path / "out").mb_after
    assert preview(source, config).mb_after > preview(source, HfQuantConfig("int4")).mb_after


def test_preview_reads_no_weights(source, tmp_path):
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert preview(tmp_path, HfQuantConfig("int4")).mb_after == preview(source, HfQuantConfig("int4")).mb_after


def test_the_config_can_be_used_again(source, tmp_path):
    config = HfQuantConfig("int4", outliers=0.05)
    before = config.to_dict()
    hfquant.quantize(source, config, tmp_path / "out")
    assert config.to_dict() == before


def test_an_output_that_is_not_empty_is_kept_unless_asked(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = hfquant.quantize(source, HfQuantConfig("int8"), out)  # an empty folder is fine
    before = everything(out)
    with pytest.raises(SpecError, match="not empty"):
        hfquant.quantize(source, HfQuantConfig("int4"), out)
    assert everything(out) == before
    second = hfquant.quantize(source, HfQuantConfig("int4"), out, overwrite=True)
    assert second.mb_after < first.mb_after
    assert tensor_bytes(out) == pytest.approx(second.mb_after * 1e6, abs=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["loading", "saving"])
def test_a_failure_leaves_nothing_half_written(source, tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    hfquant.quantize(source, HfQuantConfig("int8"), out)
    before = everything(out)
    target = "hfquant.api.load_model" if moment == "loading" else "hfquant.api.copy_companions"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupt)
    for place, overwrite in ((out, True), (tmp_path / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            hfquant.quantize(source, HfQuantConfig("int4"), place, overwrite=overwrite)
    assert everything(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_between_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def interrupted(self, target):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        (folder / "new").touch()
    assert everything(tmp_path) == {"out/old": b""}


def test_overwrite_never_touches_what_is_no_model(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SpecError, match="no model"):
        hfquant.quantize(source, HfQuantConfig("int4"), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", [".", ".."])
def test_the_source_is_never_replaced(tmp_path, place):
    inside = save_source(tmp_path / "models" / "llama")
    (tmp_path / "models" / "config.json").write_text("{}")
    before = everything(inside)
    with pytest.raises(SpecError, match="its own source"):
        hfquant.quantize(inside, HfQuantConfig("int4"), inside / place, overwrite=True)
    assert everything(inside) == before


def test_bad_requests_are_refused_before_anything_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.setattr("hfquant.api.load_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    cases = [
        ((tmp_path / "absent", HfQuantConfig("int4"), tmp_path / "out"), "no folder"),
        ((tmp_path, HfQuantConfig("int4"), tmp_path / "out"), "no config.json"),
        ((source, HfQuantConfig("int4"), tmp_path / "file"), "is a file"),
        ((source, HfQuantConfig("int4"), tmp_path / "file" / "out"), "below the file"),
        ((source, HfQuantConfig("int4"), "/"), "its own source"),
        ((source, "int4", tmp_path / "out"), "HfQuantConfig"),
    ]
    for arguments, message in cases:
        with pytest.raises(SpecError, match=message):
            hfquant.quantize(*arguments)


def test_a_folder_without_write_permission_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr("hfquant.api.load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # file modes do not bind root
    with pytest.raises(SpecError, match=f"no permission to write in {tmp_path}"):
        hfquant.quantize(source, HfQuantConfig("int4"), tmp_path / "new" / "out")


def test_the_report_is_strict_json_whatever_the_options(source, tmp_path):
    config = HfQuantConfig("llm_int8", threshold=float("inf"))
    hfquant.quantize(source, config, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / REPORT_NAME).read_text(), parse_constant=pytest.fail)
    assert stored["options"] == {"threshold": None}


def test_a_quantized_source_is_refused(source, tmp_path):
    hfquant.quantize(source, HfQuantConfig("int4"), tmp_path / "out")
    with pytest.raises(SpecError, match=r"quantized already \(hfquant\)"):
        hfquant.quantize(tmp_path / "out", HfQuantConfig("int8"), tmp_path / "again")


def test_finding_nothing_to_quantize_is_an_error(source, tmp_path):
    names = ["model.layers", "lm_head"]
    with pytest.raises(SpecError, match=r"nothing in .* can be quantized"):
        hfquant.quantize(source, HfQuantConfig("int4", modules_to_not_convert=names), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_name_their_layer(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(HfQuantError, match=r"model\.layers\.1\.mlp\.up_proj"):
        hfquant.quantize(tmp_path / "damaged", HfQuantConfig("int4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what a model says about itself


@pytest.fixture(scope="module")
def model(source):
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("int4"))


@pytest.fixture
def kernels():
    """Better than the reference: one for another device, one that declines, one that runs; and one that is worse."""
    reason = "needs 9 bits"
    added = (
        Kernel("on-tpu", "dense", "tpu", REFERENCE.run, priority=30),
        Kernel("picky", "dense", "cpu", REFERENCE.run, lambda spec, dtype, capability: reason, priority=20),
        Kernel("good", "dense", "cpu", REFERENCE.run, priority=15),
        Kernel("slow", "bytes", "cpu", REFERENCE.run, priority=-5),
    )
    backend = Backend("kernels-of-a-test", kernels=added)
    register(backend, "tests")
    yield
    unregister(backend, "tests")


def test_explain_names_the_kernel_and_why_better_ones_said_no(model, kernels):
    rows = hfquant.explain(model)
    assert len(rows) == 14  # seven linear layers in each of two blocks
    for row in rows:
        assert (row.kernel, row.device, row.grid, row.layout) == ("good", "cpu", "int4", "dense")
        assert len(row.declined) == 2  # not "slow": it is no better
        assert any("on-tpu" in reason and "cpu" in reason for reason in row.declined)
        assert any("picky" in reason and "needs 9 bits" in reason for reason in row.declined)


def test_explain_agrees_with_what_runs(model, kernels, monkeypatch):
    ran = []
    monkeypatch.setattr("hfquant.kernel.choose", _recording(ran))
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert set(ran) == {row.kernel for row in hfquant.explain(model)} == {"good"}


def _recording(ran):
    from hfquant.kernel import choose

    def record(*args):
        kernel = choose(*args)
        ran.append(kernel.name)
        return kernel

    return record


def test_explain_sees_the_kernel_that_is_forced(model, kernels):
    with hfquant.use_kernel("reference"):
        assert {row.kernel for row in hfquant.explain(model)} == {"reference"}
    with hfquant.use_kernel("on-tpu"):
        row = hfquant.explain(model)[0]
    assert row.kernel is None and any("on-tpu" in reason for reason in row.declined)


def test_explain_lists_every_projection_of_experts(tmp_path):
    save_source(tmp_path / "moe", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", quantization_config=HfQuantConfig("int4"))
    names = [row.layer for row in hfquant.explain(model)]
    for layer in range(2):
        for projection in ("gate_up_proj", "down_proj"):
            assert f"model.layers.{layer}.mlp.experts.{projection}" in names


def test_coverage_accounts_for_every_byte(model, source):
    found = hfquant.coverage(model)
    assert found.total == tensor_bytes(source)
    assert found.quantized + sum(skip.bytes for skip in found.skipped) == found.total


@pytest.mark.parametrize("ask", [hfquant.coverage, hfquant.explain])
def test_a_model_without_quantization_is_told_so(ask):
    with pytest.raises(SpecError, match="LlamaForCausalLM"):
        ask(tiny_model("llama"))


FROM_THE_HUB = """
import json, sys
import hfquant
from hfquant.preview import preview
from hfquant.testing.tiny import tiny_model
from huggingface_hub import HfApi

tiny_model("llama").push_to_hub("me/model")
HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="tokenizer.json", repo_id="me/model")
HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="me/model")
config = hfquant.HfQuantConfig("int4")
promised = preview("me/model", config)
done = hfquant.quantize("me/model", config, sys.argv[1])
print(json.dumps([promised.mb_after, done.mb_after, done.source]))
"""


def test_a_repository_on_the_hub_is_a_source_too(tmp_path):
    with FakeHub() as hub:
        run = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "out")],
            env={**os.environ, **hub.environment()},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    promised, done, source = json.loads(run.stdout.splitlines()[-1])
    assert promised == done == pytest.approx(tensor_bytes(tmp_path / "out") / 1e6) and source == "me/model"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "notes.txt" not in names and "model.safetensors" not in names
