"""The demo: one table that follows from the methods asked for, and the copy of it in the README."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hfquant import HfQuantConfig
from hfquant.cli.comparison import parse_methods
from hfquant.cli.demo import METHODS
from hfquant.preview import preview

ROOT = Path(__file__).parents[3]


def page_of_demo():
    """The script that fills the README."""
    spec = importlib.util.spec_from_file_location("demo_table", ROOT / "benchmarks" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_measures_each_method_after_a_reload(hfquant, source, text, tmp_path):
    shown = hfquant(
        "demo", "--model", source, "--data", text, "--methods", "int8,nf4:double_quant=true,int2", "--sequences", 4,
        "--length", 32, "--json", tmp_path / "demo.json",
    ).output  # fmt: skip
    data = json.loads((tmp_path / "demo.json").read_text())
    original, int8, nf4, int2 = data["rows"]
    assert original["fidelity"]["kl"] == 0 and original["fidelity"]["top1"] == 1
    assert 0 < int8["fidelity"]["kl"] < nf4["fidelity"]["kl"] < int2["fidelity"]["kl"]
    for row, config in ((nf4, HfQuantConfig("nf4", double_quant=True)), (int2, HfQuantConfig("int2"))):
        promised = preview(source, config)
        assert row["mb"] == promised.mb_after and row["bits_per_weight"] == promised.bits_per_weight
        assert row["coverage"] == promised.coverage.share
    assert "nf4 double_quant=true" in shown and "hfquant quantize MODEL" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_one_sequence_has_no_interval_and_the_file_is_still_json(hfquant, source, text, tmp_path):
    sizes = ("--sequences", 1, "--length", 32, "--methods", "int8")
    hfquant("demo", "--model", source, "--data", text, *sizes, "--json", tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text(), parse_constant=pytest.fail)["rows"][1]["fidelity"][
        "kl_ci"
    ] == [
        None,
        None,
    ]
    blocked = hfquant("demo", "--model", source, "--data", text, *sizes, "--json", text / "one.json", status=2).stderr
    assert "its folder cannot be made" in blocked


def test_a_missing_method_stops_the_demo_before_it_starts(hfquant, source, text, monkeypatch):
    monkeypatch.setattr("hfquant.cli.demo.compare", lambda *a: pytest.fail("started"))
    arguments = ("demo", "--model", source, "--data", text)
    assert "unknown method 'fp9'" in hfquant(*arguments, "--methods", "int8,fp9", status=2).stderr
    assert "no methods" in hfquant(*arguments, "--methods", " , ", status=2).stderr


def test_the_bundled_model_is_asked_for_by_name_where_it_is_not(hfquant, text, monkeypatch):
    monkeypatch.setattr("hfquant.cli.demo.BUNDLED", "no/such/model")
    assert "run in a clone, or give --model" in hfquant("demo", "--data", text, status=2).stderr


def test_the_methods_of_the_demo_are_of_every_kind():
    assert METHODS.split(",")[:3] == ["int8", "llm_int8", "fp8"]
    assert {"nf4", "int4", "int3", "e2m1", "nf4:double_quant=true", "int4:symmetric=false"} <= set(METHODS.split(","))


def test_options_of_methods_are_parsed():
    one, two = parse_methods("int8, nf4:double_quant=true:block_size=32")
    assert (one.method, one.options) == ("int8", {})
    assert (two.method, two.options) == ("nf4", {"double_quant": True, "block_size": 32})


def test_the_readme_shows_the_committed_numbers():
    page = page_of_demo()
    assert page.section((ROOT / "README.md").read_text()) == page.render(page.committed())


def test_filling_the_readme_changes_nothing_else():
    page = page_of_demo()
    readme = (ROOT / "README.md").read_text()
    filled = page.fill(readme, "| new |")
    assert page.section(filled) == "| new |"
    assert page.fill(filled, page.section(readme)) == readme


def test_the_table_holds_every_row_and_its_numbers():
    page = page_of_demo()
    fidelity = {"kl": 0.0123, "ppl": 9.5, "dppl_ci": [0.1, 0.3], "top1": 0.91, "tokens": 10}
    row = {"label": "int4", "bits_per_weight": 4.25, "mb": 2.4, "coverage": 0.8, "fidelity": fidelity}
    data = {"model": "m", "data": "d.txt", "seconds": 61.2, "rows": [{**row, "coverage": 0.0}, row]}
    lines = page.render(data).splitlines()
    assert any(line.startswith("| int4 | 4.25 | 2.40 | 0.01230 | 9.500 | [+0.100, +0.300] | 91.0% |") for line in lines)
