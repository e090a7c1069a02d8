"""Somebody else's backend: a distribution of its own, installed beside a broken one, and the page that explains it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
THIRD_PARTY = ROOT / "tests" / "third_party"
PAGE = ROOT / "docs" / "backends.md"


@pytest.fixture(scope="module")
def python(fresh_environment: Callable, build_wheel: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Runs a program in a fresh environment in which both distributions are installed."""
    folder = tmp_path_factory.mktemp("third_party")
    names = ("hfquant_ternary", "hfquant_broken")
    return fresh_environment(folder / "venv", *(build_wheel(THIRD_PARTY / name, folder / name) for name in names))


def last_json(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


FIRST = """
import json, sys
import torch
import hfquant
from hfquant import BackendError, HfQuantConfig
from hfquant.quantize import quantize_linear
from hfquant.testing import conformance
from hfquant.testing.model_checks import load, save
from hfquant.testing.tiny import tiny_model
from pathlib import Path

out, found = Path("."), {}
found["imported"] = sorted(name for name in sys.modules if name in ("hfquant_ternary", "hfquant_broken"))
found["listed"] = {plugin.name: plugin.to_dict() for plugin in hfquant.backends()}
try:
    HfQuantConfig("broken")
except BackendError as error:
    found["asked"] = str(error)

# Equations 1 to 3 of the paper, written down independently: one scale per row, then one per group of 64.
w = torch.randn(24, 176, generator=torch.Generator().manual_seed(0))
exact = HfQuantConfig("ternary", group_size=-1, scale_dtype="float32").recipe
mean = w.abs().mean(1, keepdim=True)
expected = (w / mean).round().clamp(-1, 1)
q = quantize_linear(w, exact)
found["codes differ"] = int((q.codes.float() - 1 != expected).sum())
found["values differ"] = float((q.dequantize() - expected * mean).abs().max())
groups = quantize_linear(w, HfQuantConfig("ternary").recipe).dequantize()
error = 0.0
for part, values in zip(w.split(64, 1), groups.split(64, 1)):
    mean = part.abs().mean(1, keepdim=True).bfloat16().float()
    error = max(error, float((values - (part / mean).round().clamp(-1, 1) * mean).abs().max()))
found["groups differ"] = error

tiny_model("llama", dtype=torch.bfloat16).save_pretrained(out / "plain")
model = load(out / "plain", HfQuantConfig("ternary"))
found["values"] = len(set((model.model.layers[0].mlp.up_proj.qtensor().codes.flatten()).tolist()))
save(model, out / "ternary")
found["config"] = json.loads((out / "ternary" / "config.json").read_text())["quantization_config"]
found["plain"] = HfQuantConfig("int4").plugins
found["conformance"] = conformance("ternary").to_dict()
print(json.dumps(found))
"""

SECOND = """
import json
import hfquant
from hfquant.testing.model_checks import is_identical, reload
from pathlib import Path

is_identical(Path("ternary"), reload("ternary"))
config = json.loads(Path("ternary/config.json").read_text())["quantization_config"]
config["plugins"] = {"gone": {"distribution": "hfquant-gone", "version": "0.1.0"}}
try:
    hfquant.HfQuantConfig.from_dict(config)
except hfquant.BackendError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def found(python: Callable) -> dict:
    return last_json(python(FIRST))


def test_both_are_listed_and_neither_is_imported_early(found: dict) -> None:
    assert found["imported"] == []
    assert sorted(found["listed"]) == ["broken", "ternary"]
    ternary, broken = found["listed"]["ternary"], found["listed"]["broken"]
    assert ternary == {
        "name": "ternary",
        "state": "ok",
        "distribution": "hfquant-ternary",
        "version": "0.1.0",
        "entry_point": "hfquant_ternary:backend",
        "methods": ["ternary"],
        "error": None,
    }
    assert broken["state"] == "broken" and broken["distribution"] == "hfquant-broken" and broken["methods"] == []
    assert "ModuleNotFoundError: No module named 'a_library_that_is_not_installed'" in broken["error"]
    assert re.search(r'hfquant_broken\.py", line \d+', broken["error"])


def test_broken_one_raises_only_when_it_is_asked_for(found: dict) -> None:
    assert "backend 'broken' of hfquant-broken 0.1.0 (broken = hfquant_broken:backend) is broken" in found["asked"]
    assert "a_library_that_is_not_installed" in found["asked"]


def test_ternary_is_what_the_paper_says(found: dict) -> None:
    assert found["codes differ"] == 0
    assert found["values differ"] == 0
    assert found["groups differ"] == 0
    assert found["values"] == 3


def test_checkpoint_names_the_plugin_and_reloads_in_a_fresh_process(found: dict, python: Callable) -> None:
    assert found["config"]["plugins"] == {"ternary": {"distribution": "hfquant-ternary", "version": "0.1.0"}}
    assert found["plain"] == {}
    error = last_json(python(SECOND))  # it raises if a bit differs
    assert error.splitlines()[-1].strip() == "pip install hfquant-gone"


def test_conformance_passes_where_it_is_installed(found: dict) -> None:
    report = found["conformance"]
    assert report["ok"]
    states = {(check["subject"], check["name"]): check["state"] for check in report["checks"]}
    assert set(states.values()) == {"ok"}
    for kind in ("llama", "mixtral", "gpt2"):
        assert states[f"ternary on {kind}", "reload is bit-identical"] == "ok"
        assert states[f"ternary on {kind}", "adapter trains"] == "ok"


# The page


def shown(language: str) -> list[str]:
    """The blocks of the page in a language, `no-run` ones included."""
    return re.findall(rf"^```{language}(?: no-run)?\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_page_shows_the_files_that_are_tested() -> None:
    folder = THIRD_PARTY / "hfquant_ternary"
    assert (folder / "hfquant_ternary.py").read_text() in shown("python")
    assert (folder / "pyproject.toml").read_text() in shown("toml")


def test_backend_stays_short() -> None:
    lines = (THIRD_PARTY / "hfquant_ternary" / "hfquant_ternary.py").read_text().splitlines()
    assert len(lines) <= 60, "the promise is one file of about 60 lines"
