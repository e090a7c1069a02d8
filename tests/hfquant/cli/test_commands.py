"""The commands as a user meets them: what they print, what they write, and how they fail."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfquant as library
from hfquant import HfQuantConfig, build, doctor
from hfquant.backend import Plugin
from hfquant.eval import Reference, token_batches
from hfquant.inspection import inspect_checkpoint
from hfquant.preview import preview
from hfquant.recipe import PRESETS
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests import fresh


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int4"
    library.quantize(source, HfQuantConfig("int4"), out)
    return out


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


# ---- quantize


def test_quantize_writes_the_model_that_the_library_makes(hfquant, source, tmp_path):
    out = tmp_path / "out"
    shown = hfquant("quantize", source, "--method", "int", "--bits", 4, "--no-symmetric", "--output", out).output
    assert str(out) in shown.replace("\n", "")
    config = HfQuantConfig("int4", symmetric=False)
    memory = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    again = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(again)).logits, memory(**tiny_inputs(again)).logits)
    assert AutoTokenizer.from_pretrained(out).vocab_size == 256


def test_every_option_reaches_the_config(hfquant, source):
    def recipe(*arguments):
        return json.loads(hfquant("quantize", source, "--dry-run", "--json", *arguments).stdout)

    given = recipe("--method", "int4", "--block-size", 32, "--range", '{"name": "mse", "norm": 2.4}', "--embeddings")
    assert given["options"] == {"block_size": 32, "range": {"name": "mse", "norm": 2.4}}
    assert "model.embed_tokens" not in [skip["name"] for skip in given["coverage"]["skipped"]]
    given = recipe("--method", "nf4", "--group-size", 32, "--double-quant", "--range", "mse", "--skip", "lm_head")
    assert given["options"] == {"group_size": 32, "double_quant": True, "range": "mse"}
    everything = recipe("--method", "int8", "--skip", "none", "--option", "outliers=0.05")
    assert everything["options"] == {"outliers": 0.05}
    assert "lm_head" not in [skip["name"] for skip in everything["coverage"]["skipped"]]


def test_dry_run_shows_the_preview_and_writes_nothing(hfquant, source, tmp_path):
    out = tmp_path / "out"
    shown = hfquant("quantize", source, "--method", "nf4", "--output", out, "--dry-run").output
    promised = preview(source, HfQuantConfig("nf4"))
    assert f"{promised.bits_per_weight:.3f} bits" in shown and f"{promised.mb_after:.2f} MB" in shown
    assert f"{promised.coverage.share:.1%}" in shown and "Dry run" in shown
    assert not out.exists() and widest(shown) <= 100


def test_overwrite_is_asked_for(hfquant, source, tmp_path):
    out = tmp_path / "out"
    hfquant("quantize", source, "--output", out)
    assert "--overwrite" in hfquant("quantize", source, "--output", out, status=2).output
    hfquant("quantize", source, "--method", "int8", "--output", out, "--overwrite")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["method"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "int44"], ["unknown method 'int44'", "int4"]),
        (["--method", "int4", "--bits", "3"], ["contradicts", "--method int3"]),
        (["--method", "nf4", "--bits", "8"], ["contradicts", "leave --bits out"]),
        (["--option", "colour=blue"], ["no option 'colour'", "block_size"]),
        (["--option", "outliers"], ["key=value"]),
        (["--range", "mse", "--option", "range=kl"], ["twice"]),
        (["--option", "outliers=0.1", "--option", "outliers=0.2"], ["twice"]),
        (["--option", "method=int8"], ["use --method"]),
        (["--option", "embeddings=true"], ["use --embeddings"]),
        (["--skip", "(("], ["no regular expression"]),
        (["--dtype", "int8"], ["dtype is auto", "bfloat16", "'int8'"]),
        (["--method", "nf4", "--no-symmetric"], ["zero point"]),
        ([], ["--output", "--dry-run"]),
    ],
)
def test_bad_input_is_one_clean_message_and_status_2(hfquant, source, arguments, words):
    dry = ["--dry-run"] if arguments else []
    result = hfquant("quantize", source, *arguments, *dry, status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words)


def test_an_unknown_option_is_named_on_the_standard_error(hfquant):
    result = hfquant("quantize", "--colour", status=2)
    assert result.stdout == "" and "--colour" in result.stderr


def test_bits_that_agree_are_accepted(hfquant, source):
    for arguments in (["int4", "--bits", 4], ["nf4", "--bits", 4], ["quantile", "--bits", 3]):
        hfquant("quantize", source, "--method", *arguments, "--dry-run")


def test_verbose_shows_the_traceback_wherever_it_stands(hfquant, tmp_path):
    for arguments in (["inspect", tmp_path, "--verbose"], ["--verbose", "inspect", tmp_path]):
        assert "Traceback" in hfquant(*arguments, status=2).stderr


def test_errors_that_are_not_about_the_input_have_status_1(hfquant, quantized, tmp_path):
    (tmp_path / "config.json").write_text((quantized / "config.json").read_text())
    assert "incomplete" in hfquant("inspect", tmp_path, status=1).stderr


# ---- eval


def test_eval_measures_what_the_library_measures(hfquant, source, quantized, text):
    shown = hfquant(
        "eval", quantized, "--reference", source, "--data", text, "--sequences", 4, "--length", 32, "--json"
    )
    batches = token_batches(AutoTokenizer.from_pretrained(source), text, 4, 32)
    reference = Reference(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), batches)
    expected = reference.compare(AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32))
    printed = json.loads(shown.stdout)
    assert {key: printed[key] for key in asdict(expected)} == json.loads(json.dumps(asdict(expected)))
    assert shown.stderr == ""


def test_eval_of_a_model_against_itself_finds_no_difference(hfquant, source, text):
    shown = hfquant("eval", source, "--reference", source, "--data", text, "--sequences", 2, "--length", 32).output
    assert re.search(r"^KL.* 0\.00000 ", shown, re.MULTILINE) and "100.00%" in shown and widest(shown) <= 100
    one = hfquant("eval", source, "--reference", source, "--data", text, "--sequences", 1, "--length", 32).output
    assert one.count("no interval from one sequence") == 2 and "31 predictions in 1 sequence." in one


def test_eval_without_enough_text_says_how_much_there_is(hfquant, source, quantized, text, tmp_path):
    arguments = ("eval", quantized, "--reference", source, "--length", 32)
    assert "sequences" in hfquant(*arguments, "--data", text, "--sequences", 10**6, status=2).stderr
    assert "is not a file" in hfquant(*arguments, "--data", tmp_path / "absent.txt", status=2).stderr
    (tmp_path / "empty.txt").touch()
    assert hfquant(*arguments, "--data", tmp_path / "empty.txt", status=2).stderr.endswith("give more text\n")


def test_eval_refuses_what_the_models_cannot_do(hfquant, source, quantized, text, tmp_path):
    arguments = ("eval", quantized, "--data", text, "--sequences", 2)
    too_long = hfquant(*arguments, "--reference", source, "--length", 10**5, status=2).stderr
    assert "--length 100000 is more than the" in too_long
    tiny_model("vit").save_pretrained(tmp_path)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    no_text = hfquant(*arguments, "--reference", tmp_path, "--length", 32, status=2).stderr
    assert "predicts no next tokens" in no_text


@pytest.mark.parametrize(
    "arguments", [["--device", "cuda:99"], ["--device", "nonsense"], ["--dtype", "nonsense"], ["--dtype", "int8"]]
)
def test_eval_names_a_dtype_or_device_that_is_not_there(hfquant, source, quantized, text, arguments):
    shown = hfquant(
        "eval", quantized, "--reference", source, "--data", text, "--sequences", 2, "--length", 32, *arguments, status=2
    ).stderr
    assert shown.startswith("error: the device" if "--device" in arguments else "error: dtype is auto")
    assert len(shown.splitlines()) == 1


def test_a_damaged_file_is_an_error_of_status_1(hfquant, source, quantized, text, tmp_path):
    shutil.copytree(quantized, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "hfquant.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged" in hfquant("inspect", tmp_path / "damaged", status=1).stderr
    sizes = ("--sequences", 2, "--length", 32)
    arguments = ("eval", tmp_path / "damaged", "--reference", source, "--data", text, *sizes)
    assert "is damaged" in hfquant(*arguments, status=1).stderr


def test_weights_of_other_shapes_than_the_config_says_are_named(hfquant, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    arguments = ("quantize", tmp_path / "source", "--output", tmp_path / "out")
    assert "other shapes than its config.json" in hfquant(*arguments, status=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_a_folder_is_named(hfquant, source, quantized, text, tmp_path):
    for arguments in (["quantize", text, "--dry-run"], ["inspect", text], ["quantize", source, "--output", text]):
        assert re.search("is a file: name (the|a) folder", hfquant(*arguments, status=2).stderr)
    below = hfquant("quantize", source, "--output", text / "below", status=2).stderr
    assert f"lies below the file {text}" in below
    again = hfquant("inspect", quantized, "--reference", quantized, status=2).stderr
    assert "give the original model" in again


def test_a_failed_file_operation_is_one_message(hfquant, source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfquant.api.copy_companions", full)
    shown = hfquant("quantize", source, "--output", tmp_path / "out", status=1)
    assert shown.stderr == "error: [Errno 28] No space left on device\n" and list(tmp_path.iterdir()) == []


# ---- inspect


def test_inspect_prints_every_layer(hfquant, source, quantized):
    shown = hfquant("inspect", quantized).output
    found = inspect_checkpoint(quantized)
    for layer in found.layers:
        assert layer.name.removeprefix("model.") in shown
    assert "block 64" in shown and f"{found.coverage.share:.1%}" in shown and widest(shown) <= 100
    assert json.loads(hfquant("inspect", quantized, "--json").stdout) == json.loads(json.dumps(found.to_dict()))


def test_inspect_with_reference_orders_by_error(hfquant, source, quantized):
    shown = hfquant("inspect", quantized, "--reference", source).output
    errors = [float(number) for number in re.findall(r"^ *([\d.]+)% +layers", shown, re.MULTILINE)]
    assert len(errors) == 14 and errors == sorted(errors, reverse=True) and errors[0] > 0


def test_inspect_says_what_a_served_format_holds(hfquant, source, quantized, tmp_path):
    shown = hfquant("inspect", quantized).output
    found = inspect_checkpoint(quantized)
    assert len({layer.exact_as for layer in found.layers}) == 2, "groups of 64 do not divide all of them"
    for layer in found.layers:
        (row,) = re.findall(rf"^{re.escape(layer.name.removeprefix('model.'))} .*$", shown, re.MULTILINE)
        assert row.split()[-1] == (layer.exact_as or "-")
    library.quantize(source, HfQuantConfig("int8"), tmp_path / "int8")
    assert "exact as INT8\n" in hfquant("inspect", tmp_path / "int8").output
    library.quantize(source, HfQuantConfig("nf4"), tmp_path / "nf4")
    shown = hfquant("inspect", tmp_path / "nf4").output
    assert "exact as" not in shown and "weights    nf4" not in shown
    layers = json.loads(hfquant("inspect", tmp_path / "nf4", "--json").stdout)["layers"]
    assert {layer["exact_as"] for layer in layers} == {None}


# ---- backends, doctor


def test_backends_lists_every_method_with_its_options(hfquant):
    listed = json.loads(hfquant("backends", "--json").stdout)
    assert {entry["name"] for entry in listed["methods"]} == set(PRESETS.names())
    assert {"name": "nf4", "backend": "core"}.items() <= next(
        e for e in listed["methods"] if e["name"] == "nf4"
    ).items()
    shown = hfquant("backends").output
    assert "double_quant" in shown and "nf4" in shown.split() and widest(shown) <= 100


def test_backends_shows_why_one_is_broken(hfquant, monkeypatch):
    bad = Plugin("bad", "other-package", "0.1", "bad:backend", error="Traceback ...\nImportError: no [wheels]")
    monkeypatch.setattr("hfquant.cli.backends.backends", lambda: [bad])
    shown = hfquant("backends").output
    assert "broken" in shown and "other-package 0.1" in shown and "ImportError: no [wheels]" in shown


@pytest.mark.parametrize("error", [None, "Traceback ...\nImportError: no [wheels]"])
def test_doctor_fails_exactly_if_something_is_broken(hfquant, monkeypatch, error):
    healthy = [check for check in doctor.examine() if check.state != doctor.BROKEN]
    plugin = doctor.Check("plugins", "one", doctor.BROKEN if error else doctor.OK, error or "fine")
    monkeypatch.setattr("hfquant.cli.doctor.examine", lambda: [*healthy, plugin])
    status = 1 if error else 0
    shown = hfquant("doctor", status=status).output
    assert (error or "fine").splitlines()[-1] in shown
    assert ("Something is broken" in shown) == bool(error)
    assert json.loads(hfquant("doctor", "--json", status=status).stdout)["broken"] == bool(error)


def test_doctor_builds_the_kernels_on_request(hfquant, monkeypatch, tmp_path):
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (tmp_path / "odd.cpp").write_text("// flags: -mnobody-knows-[this]\n")
    (tmp_path / "sloppy.cpp").write_text("static int never_used;\n")
    healthy = [check for check in doctor.examine() if check.state != doctor.BROKEN]
    monkeypatch.setattr("hfquant.cli.doctor.examine", lambda: healthy)
    for module in (build, doctor):
        monkeypatch.setattr(module, "cpu_folder", lambda: tmp_path)
    shown = hfquant("doctor", "--build").output
    assert "one.cpp: compiled" in shown and "odd.cpp: left out" in shown and "-mnobody-knows-[this]" in shown
    assert "never_used" in shown and "Nothing is broken" in shown
    made = json.loads(hfquant("doctor", "--build", "--json").stdout)["build"]
    assert set(made["sources"]) == {"one.cpp", "sloppy.cpp"} and set(made["left_out"]) == {"odd.cpp"}
    assert (tmp_path / build.LIBRARY).is_file()
    (tmp_path / "one.cpp").write_text("int one() { return nobody_declared_this; }\n")
    failed = hfquant("doctor", "--build", status=1)
    assert "one.cpp does not compile" in failed.stderr and "nobody_declared_this" in failed.stderr


# ---- the real thing


def test_the_process_prints_results_and_errors_where_they_belong(source, tmp_path):
    program = "import sys; from hfquant.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "quantize", str(source), "--output", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no bars where nobody looks
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    failed = fresh.run(program, "quantize", tmp_path / "absent", "--output", tmp_path / "other")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == f"error: there is no folder {tmp_path / 'absent'}\n"


def test_python_runs_the_package_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hfquant", "backends", "--json"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hfquant", run_name="__main__")
    assert not end.value.code and "core" in capsys.readouterr().out
