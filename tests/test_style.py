"""Rules of the code base that no off-the-shelf tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "hfquant").rglob("*.py"))
SOURCES = [*CORE, *sorted(ROOT.glob("plugins/*/hfquant_*/**/*.py"))]
MAX_LINES = 300
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "compressed_tensors",
    "datasets",
    "pandas",
    "peft",
    "rich",
    "triton",
    "trl",
    "typer",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, Definition]]:
    """The public classes and functions of a module, and the public methods of those classes."""
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if decorators & {"overload", "setter", "deleter"}:
            continue  # the implementation or the getter carries the docstring
        yield inside + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{inside}{node.name}.")


def undocumented(tree: ast.Module) -> list[str]:
    return [f"{name} (line {node.lineno})" for name, node in public(tree.body) if not ast.get_docstring(node)]


def unsafe(tree: ast.Module) -> list[str]:
    """Uses of formats that run code when they are read."""
    found = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            modules = [ast.unparse(node)]
        for name in modules:
            if name in {"torch.load", "torch.save"} or name.split(".")[0] in UNSAFE_MODULES:
                found.append(f"{name} (line {node.lineno})")
    return found


@each_source
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert undocumented(ast.parse(path.read_text())) == []


@each_source
def test_no_pickle(path: Path) -> None:
    """A checkpoint is data: reading one must never run code that somebody else wrote."""
    assert unsafe(ast.parse(path.read_text())) == []


@each_source
def test_no_grab_bag_module(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}, "name it for what it does"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it by what its parts do"


def test_import_is_light() -> None:
    """`import hfquant` loads nothing heavy that transformers' own quantizers do not load anyway."""

    def loaded(*modules: str) -> list[set[str]]:
        """All modules that are there after each of these imports in one process."""
        program = "import sys\n" + "".join(f"import {module}; print(*sys.modules)\n" for module in modules)
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        return [set(line.split()) for line in done.stdout.splitlines()]

    def packages(modules: set[str]) -> set[str]:
        return {name.partition(".")[0] for name in modules}

    before, found = loaded("transformers.quantizers.auto", "hfquant")
    extra = packages(found) - packages(before)
    if "triton" in extra:  # torch's compiler, which comes with transformers' models, looks for it by importing it
        extra -= {"triton"} & packages(*loaded("transformers.modeling_utils"))
    assert not extra & HEAVY
    assert not {name for name in found if name.startswith("hfquant.kernels")}, "kernels load at first use"
    assert not {name for name in extra if name.startswith("hfquant_")}, "plugins load at first use"


def test_contributing_shows_the_import_direction_that_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    checked = [set(re.findall(r"\w+", layer)) for layer in reversed(layers)]
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Import direction")[2]
    shown = section.split("```text")[1].split("```")[0]
    assert [set(group.split()) for group in shown.split("|")] == checked


def test_the_checks_find_what_they_look_for() -> None:
    sample = ast.parse(
        "import pickle\n"
        "from torch import load\n"
        "def documented():\n    'Yes.'\n    torch.load('x')\n"
        "def bare(): pass\n"
        "def _private(): pass\n"
        "class Box:\n    'Yes.'\n    def open(self): pass\n    def __len__(self): return 0\n"
    )
    assert undocumented(sample) == ["bare (line 6)", "Box.open (line 10)"]
    assert sorted(unsafe(sample)) == ["pickle (line 1)", "torch.load (line 2)", "torch.load (line 5)"]
