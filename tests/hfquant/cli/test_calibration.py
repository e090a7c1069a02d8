"""Calibrated methods as a user meets them: options, progress, resuming, the summary, and its copy in `inspect`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfquant as library
from hfquant import HfQuantConfig, SpecError
from hfquant.calibration_state import Settings
from hfquant.cli.findings import notes, percent
from hfquant.findings import BlockFinding, LayerFinding
from hfquant.inspection import inspect_checkpoint, inspect_model
from hfquant.report import REPORT_NAME
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs

SIZES = ("--samples", 4, "--length", 32, "--batch-size", 2)


def gptq(text, **options):
    return HfQuantConfig("gptq", **{"group_size": 32, "data": str(text), "samples": 4, "length": 32, **options})


@pytest.fixture(scope="module")
def calibrated(source, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "gptq"
    library.quantize(source, gptq(text), out)
    return out


@pytest.fixture
def asked(monkeypatch):
    """What the command line asks the library for; nothing is quantized."""
    found: dict = {}

    def quantize(src, config, out, **options):
        found.update(src=src, config=config, out=out, **options)
        raise SpecError("enough")

    monkeypatch.setattr("hfquant.cli.quantize.api.quantize", quantize)
    return found


# ---- options


def test_every_option_reaches_the_library(hfquant, source, tmp_path, asked):
    (tmp_path / "texts.jsonl").write_text('{"body": "one"}\n')
    hfquant(
        "quantize", source, "-o", tmp_path / "out", "--method", "gptq", "--bits", 3, "--group-size", 32, "--data",
        tmp_path / "texts.jsonl", "--samples", 5, "--length", 33, "--batch-size", 3, "--seed", 7, "--column", "body",
        "--no-packing", "--offload", tmp_path / "hidden", "--no-resume", status=2,
    )  # fmt: skip
    config, data = asked["config"], asked["config"].data
    assert config.options == {"bits": 3, "group_size": 32} and config.recipe.scheme.weight.grid == "int3"
    assert (data.samples, data.length, data.batch_size, data.seed) == (5, 33, 3, 7)
    assert (data.column, data.packing, data.split) == ("body", False, "train")
    assert asked["settings"] == Settings(offload=tmp_path / "hidden") and asked["resume"] is False
    hfquant("quantize", source, "-o", tmp_path / "out", "--method", "gptq", "--data", "some/set:de", "--split", "test",
            status=2)  # fmt: skip
    assert asked["config"].data.split == "test" and asked["resume"] is True and asked["settings"] == Settings()


def test_a_recipe_gives_what_the_command_line_does_not(hfquant, source, text, tmp_path, asked):
    recipe = tmp_path / "recipe.yaml"
    entries = ("method: gptq", "bits: 3", "group_size: 32", f"data: {text}", "samples: 9", "seed: 1")
    recipe.write_text("\n  ".join(["quantize:", *entries, "modules_to_not_convert: [o_proj]"]))
    run = ("quantize", source, "-o", tmp_path / "out", "--recipe", recipe)
    assert "enough" in hfquant(*run, status=2).stderr
    assert asked["config"] == HfQuantConfig.from_recipe(recipe)
    hfquant(*run, "--data", "self", "--samples", 2, "--bits", 4, "--skip", "lm_head", status=2)
    changed = HfQuantConfig.from_recipe(recipe, data="self", samples=2, bits=4, modules_to_not_convert=["lm_head"])
    assert asked["config"] == changed and changed.data.seed == 1 and changed.options["group_size"] == 32
    assert "leave --method out" in hfquant(*run, "--method", "gptq", status=2).stderr
    assert "cannot read the recipe" in hfquant(*run[:-1], tmp_path / "absent.yaml", status=2).stderr


DATA_FREE, GPTQ = ("--method", "int4"), ("--method", "gptq", "--data", "TEXT")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*DATA_FREE, "--data", "TEXT"), ["weights alone", "leave data out"]),
        ((*DATA_FREE, "--samples", 3, "--no-packing"), ["weights alone", "leave out --samples, --no-packing"]),
        ((*DATA_FREE, "--offload", "x"), ["leave out --offload"]),
        ((*DATA_FREE, "--no-resume"), ["leave out --no-resume"]),
        ((*DATA_FREE, "--resume"), ["leave out --resume"]),
        ((*GPTQ, "--samples", 0), ["samples", "from 1", "got 0"]),
        ((*GPTQ, "--split", "test"), ["--split is for datasets", "the data is a file"]),
        ((*GPTQ, "--column", "text"), ["--column", "is one text"]),
        ((*GPTQ, "--option", "samples=3"), ["use --samples"]),
        ((*GPTQ, "--device", "cuda"), ["on the CPU", "--device"]),
        ((*GPTQ, "--length", 100000), ["length=100000"]),
        (("--method", "gptq"), ["needs calibration data", "data="]),
        (("--method", "gptq", "--data", "self", "--no-packing"), ["--no-packing", "the model writes"]),
        (("--method", "gptq", "--data", "absent.txt"), ["no calibration file absent.txt"]),
        (("--method", "gptq", "--data", "."), ["is a folder"]),
    ],
)
def test_what_cannot_be_is_one_clean_message_before_any_work(
    hfquant, source, text, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.setattr("hfquant.streaming.Calibration", lambda *a: pytest.fail("started"))
    given = [text if argument == "TEXT" else argument for argument in arguments]
    result = hfquant("quantize", source, "-o", tmp_path / "out", *given, status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_calibration_are_refused_where_there_is_none(source, tmp_path):
    with pytest.raises(SpecError, match="not calibrated: leave settings out"):
        library.quantize(source, HfQuantConfig("int4"), tmp_path / "out", settings=Settings())


# ---- the dry run


def test_a_dry_run_tells_memory_time_and_data_and_reads_no_weights(hfquant, source, text, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    shown = hfquant("quantize", tmp_path / "source", "--method", "gptq", "--data", text, *SIZES, "--dry-run").output
    assert "file text.txt: 4 samples of 32 tokens" in shown
    for word in ("hidden states", "statistics", "largest memory", "forward passes", "time", "nothing was written"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 100
    shown = hfquant("quantize", tmp_path / "source", "--method", "gptq", "--data", text, *SIZES, "--dry-run", "--json")
    assert set(json.loads(shown.stdout)["estimate"]) >= {"memory", "peak_mb", "seconds", "total_seconds"}
    without = hfquant("quantize", tmp_path / "source", "--method", "gptq", "--dry-run").output
    assert "No calibration data is given: name it with --data" in without
    assert "largest memory" not in hfquant("quantize", tmp_path / "source", "--dry-run").output


# ---- the run and its summary


def test_the_command_writes_what_the_library_writes_and_shows_what_it_found(
    hfquant, source, text, calibrated, tmp_path
):
    out = tmp_path / "out"
    shown = hfquant("quantize", source, "-o", out, "--method", "gptq", "--group-size", 32, "--data", text,
                    "--samples", 4, "--length", 32).output  # fmt: skip
    for file in sorted(calibrated.glob("*.safetensors")):
        assert (out / file.name).read_bytes() == file.read_bytes()
    report = json.loads((out / REPORT_NAME).read_text())
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    errors = sorted((layer["error"] for layer in layers), reverse=True)
    listed = re.findall(r"^ *([\d.]+%)  (layers\.\S+) +(\d+)$", shown, re.MULTILINE)
    assert [error for error, *_ in listed] == [percent(error) for error in errors[:5]]
    by_name = {layer["name"].removeprefix("model."): layer for layer in layers}
    assert all(int(count) == by_name[name]["tokens"] == 4 * 32 for _, name, count in listed)
    assert "  ".join(percent(block["error"]) for block in report["blocks"] if block["name"]) in shown
    assert f"{report['calibration']['tokens']} tokens in all" in shown and "peak memory" in shown
    assert all(note in " ".join(shown.split()) for layer in layers for note in layer["notes"])
    lines = [line for line in shown.splitlines() if str(tmp_path) not in line]
    assert len(lines) > 20 and max(map(len, lines)) <= 100


def test_every_note_is_shown_with_the_layers_it_is_about(capsys):
    blocks = [
        BlockFinding("model.layers.0", 0.1, 1.0, [LayerFinding("model.layers.0.a", 0.2, 9, ["damped", "dead [3]"])]),
        BlockFinding("model.layers.1", 0.2, 1.0, [LayerFinding("model.layers.1.a", None, 0, ["damped"])], ["refused"]),
        BlockFinding("", None, 1.0, [], ["kept"]),
    ]
    assert notes(blocks) == {
        "damped": ["layers.0.a", "layers.1.a"], "dead [3]": ["layers.0.a"], "refused": ["layers.1"],
        "kept": ["outside the blocks"],
    }  # fmt: skip
    from hfquant.cli.findings import show_findings
    from hfquant.cli.output import stdout

    show_findings(stdout(), blocks)
    shown = capsys.readouterr().out
    assert "damped (layers.0.a, layers.1.a)" in shown and "dead [3] (layers.0.a)" in shown
    assert re.search(r"^ +- +layers\.1\.a", shown, re.MULTILINE)  # an error that could not be measured is no 0


def test_an_interrupted_run_goes_on_says_so_and_ends_with_the_same_bytes(
    hfquant, source, text, calibrated, tmp_path, monkeypatch, caplog
):
    run = ("quantize", source, "-o", tmp_path / "out", "--method", "gptq", "--group-size", 32, "--data", text,
           "--samples", 4, "--length", 32)  # fmt: skip
    from hfquant.streaming import Shards

    finish = Shards.finish

    def full(self, name, finding):
        if name.endswith(".1"):
            raise OSError(28, "No space left on device")
        finish(self, name, finding)

    with monkeypatch.context() as broken:
        broken.setattr(Shards, "finish", full)
        assert "No space left" in hfquant(*run, status=1).stderr
    assert not (tmp_path / "out").exists() and "going on" not in caplog.text
    other = hfquant(*run, "--seed", 1, status=2).stderr
    assert "interrupted run of something else" in other and "--no-resume" in other
    hfquant(*run)
    assert "going on at block 2 of 2" in caplog.text
    for file in sorted(calibrated.glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- inspect


def test_inspect_shows_the_report_beside_the_model(hfquant, calibrated):
    shown = hfquant("inspect", calibrated).output
    found = inspect_checkpoint(calibrated)
    report = json.loads((calibrated / REPORT_NAME).read_text())
    errors = {layer["name"]: layer["error"] for block in report["blocks"] for layer in block["layers"]}
    assert {layer.name: layer.output_error for layer in found.layers} == errors and len(errors) == 14
    column = re.findall(r"^ *([\d.]+%)  layers", shown, re.MULTILINE)
    assert column == [percent(error) for error in sorted(errors.values(), reverse=True)]
    assert "after each of 2 blocks" in shown and "Calibrated on file text.txt" in shown
    printed = json.loads(hfquant("inspect", calibrated, "--json").stdout)
    assert printed["blocks"] == report["blocks"] and printed["calibration"] == report["calibration"]
    assert max(map(len, shown.splitlines())) <= 100


def test_inspect_with_reference_shows_both_errors(hfquant, calibrated, source):
    shown = hfquant("inspect", calibrated, "--reference", source).output
    rows = re.findall(r"^ *([\d.]+)% +([\d.]+)%  layers", shown, re.MULTILINE)
    weights = [float(weight) for weight, _ in rows]
    assert len(rows) == 14 and weights == sorted(weights, reverse=True)


def test_inspect_counts_formats_where_layers_have_different_ones(hfquant, calibrated, source, text, tmp_path):
    config = HfQuantConfig("fpq", act_bits=4, group_size=32, data=str(text), samples=4, length=32)
    library.quantize(source, config, tmp_path / "fpq")
    formats = json.loads(hfquant("inspect", tmp_path / "fpq", "--json").stdout)["formats"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fpq")
    schemes = {name: module.spec.scheme for name, module in packed_modules(model)}
    shown = hfquant("inspect", tmp_path / "fpq").output
    for of, grids in {
        "weight": {name: scheme.weight.grid for name, scheme in schemes.items()},
        "input": {name: scheme.input.tensor.grid for name, scheme in schemes.items()},
    }.items():
        counted = Counter((name.rpartition(".")[2], grid) for name, grid in grids.items())
        assert counted == {(kind, grid): count for kind, row in formats[of].items() for grid, count in row.items()}
        columns = sorted(set(grids.values()))
        assert len(columns) > 1, "layers differ, or this shows nothing"
        table = shown[re.search(rf"^{of}s .*$", shown, re.MULTILINE).start() :].partition("\n\n")[0].splitlines()
        assert table[0].split() == [f"{of}s", *columns]
        kinds = sorted({kind for kind, _ in counted})
        assert [row.split() for row in table[1:]] == [
            [kind, *(str(counted[kind, grid] or "-") for grid in columns)] for kind in kinds
        ]
    assert not re.search(r"^(weights|inputs) .*int", hfquant("inspect", calibrated).output, re.MULTILINE)


def test_inspect_says_when_no_report_is_there_and_when_it_is_damaged(hfquant, calibrated, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(calibrated)
    model.save_pretrained(tmp_path / "saved")
    shown = hfquant("inspect", tmp_path / "saved").output
    assert "No report beside the model" in shown and "Calibrated on" in shown
    assert json.loads(hfquant("inspect", tmp_path / "saved", "--json").stdout)["blocks"] is None
    for content in ("{", '{"blocks": [{"name": 1}]}', '{"blocks": 3}', "[]"):
        (tmp_path / "saved" / REPORT_NAME).write_text(content)
        assert "is damaged" in hfquant("inspect", tmp_path / "saved", status=1).stderr


def test_a_method_without_calibration_has_nothing_to_show(hfquant, source, tmp_path):
    library.quantize(source, HfQuantConfig("int4"), tmp_path / "int4")
    shown = hfquant("inspect", tmp_path / "int4").output
    assert "No report" not in shown and "Calibrated" not in shown and "hidden states" not in shown


def test_a_model_calibrated_while_loading_can_be_looked_into(source, text, calibrated):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=gptq(text))
    found, stored = inspect_model(model), inspect_checkpoint(calibrated)
    assert {x.name: x.output_error for x in found.layers} == {x.name: x.output_error for x in stored.layers}
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(calibrated)
        assert torch.equal(again(**tiny_inputs(again)).logits, model(**tiny_inputs(again)).logits)


def test_the_findings_of_experts_are_joined(tmp_path):
    from hfquant.testing.tiny import tiny_model

    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    report = library.quantize(tmp_path / "source", HfQuantConfig("gptq", group_size=32, data=ids), tmp_path / "out")
    layers = {layer.name: layer for layer in inspect_checkpoint(tmp_path / "out").layers}
    bank = "model.layers.0.mlp.experts.down_proj"
    parts = [layer for layer in report.blocks[0].layers if layer.name.startswith(f"{bank}[")]
    assert len(parts) == 4 and layers[bank].output_error == max(part.error for part in parts)
    assert layers[bank].tokens == min(part.tokens for part in parts)
    assert sum(map(len, (part.notes for part in parts))) == len(layers[bank].notes)


# ---- the picture


class Axes:
    """Stands for matplotlib's, and notes what is drawn."""

    def __init__(self) -> None:
        self.drawn: dict[str, tuple] = {}

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: self.drawn.__setitem__(name, args)


@pytest.fixture
def drawing(monkeypatch):
    axes = [Axes(), Axes()]

    class Figure:
        def __init__(self, **options):
            pass

        def subplots(self, rows, columns, **options):
            assert (rows, columns) == (2, 1)
            return axes

        def savefig(self, file):
            Path(file).write_bytes(b"picture")

    package, module = types.ModuleType("matplotlib"), types.ModuleType("matplotlib.figure")
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return axes


def test_the_picture_has_a_line_for_the_blocks_and_a_bar_for_each_layer(hfquant, calibrated, tmp_path, drawing):
    hfquant("inspect", calibrated, "--plot", tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes() == b"picture"
    report = json.loads((calibrated / REPORT_NAME).read_text())
    above, below = drawing
    blocks = [100 * block["error"] for block in report["blocks"] if block["name"]]
    assert list(above.drawn["plot"][1]) == blocks and list(above.drawn["plot"][0]) == [0, 1]
    names, widths = below.drawn["barh"]
    assert len(names) == 14 and widths == sorted(widths, reverse=True)
    assert max(widths) == 100 * max(layer["error"] for block in report["blocks"] for layer in block["layers"])


def test_a_picture_that_cannot_be_drawn_is_refused_first(hfquant, calibrated, source, tmp_path, drawing, monkeypatch):
    plot = ("inspect", calibrated, "--plot")
    assert "ends with .png" in hfquant(*plot, tmp_path / "errors.txt", status=2).stderr
    assert "there is no folder" in hfquant(*plot, tmp_path / "absent" / "errors.png", status=2).stderr
    library.quantize(source, HfQuantConfig("int4"), tmp_path / "int4")
    assert "nothing to draw" in hfquant("inspect", tmp_path / "int4", "--plot", tmp_path / "e.png", status=2).stderr
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr("hfquant.cli.inspect.inspect_checkpoint", lambda *a: pytest.fail("looked"))
    assert 'pip install "hfquant[plot]"' in hfquant(*plot, tmp_path / "errors.png", status=1).stderr


# ---- several processes


def test_two_processes_write_what_one_writes_and_one_of_them_tells(source, text, tmp_path):
    library.quantize(source, gptq(text, batch_size=1), tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["quantize", source, "-o", tmp_path / "two", "--method", "gptq", "--group-size", 32, "--data", text]
    arguments += ["--samples", 4, "--length", 32, "--batch-size", 1]
    done = subprocess.run(
        [*launch, "--module", "hfquant.cli.app", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    one, two = (json.loads((tmp_path / name / REPORT_NAME).read_text()) for name in ("one", "two"))
    assert one["mb_after"] == two["mb_after"] and one["calibration"] == two["calibration"]
