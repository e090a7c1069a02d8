"""The wheel holds what the tree holds, and each plugin installs alone."""

from __future__ import annotations

import json
import shutil
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
GROUP = "hfquant.backends"
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", "build", "*.so")


def project(folder: Path) -> dict[str, Any]:
    """The [project] table of a folder's pyproject.toml."""
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def tree(folder: Path, package: str) -> dict[str, Path]:
    """Where each file below a source folder belongs in a wheel that installs it as `package`."""
    names = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(NOT_SOURCE(str(folder), [part]) for part in parts):
            names["/".join([*package.split("."), *parts])] = path
    return names


def expected_in_wheel() -> dict[str, Path]:
    """Every file that `pip install .` must install."""
    names = tree(ROOT / "hfquant", "hfquant")
    for name in PLUGINS:
        names |= tree(ROOT / "plugins" / name / f"hfquant_{name}", f"hfquant_{name}")
    for folder in sorted(path for path in (ROOT / "kernels").iterdir() if path.is_dir()):
        owner = "hfquant" if folder.name == "core" else f"hfquant_{folder.name}"
        names |= tree(folder, f"{owner}.kernels")
    return names


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="session")
def root_wheel(build_wheel: Callable[[Path, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("root_wheel"))


def test_wheel_is_the_tree(root_wheel: Path) -> None:
    expected, found = set(expected_in_wheel()), files_in(root_wheel)
    missing, extra = sorted(expected - found), sorted(found - expected)
    assert not missing and not extra, (
        f"missing from the wheel: {missing}; in the wheel but not in the tree: {extra}. "
        "Edit `packages`, `package-dir` and `package-data` in pyproject.toml."
    )


def test_wheel_is_typed(root_wheel: Path) -> None:
    assert "hfquant/py.typed" in files_in(root_wheel)


def test_kernels_folder_is_no_package() -> None:
    """It would shadow the Hub's `kernels` package, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_entry_points_are_the_union_of_the_plugins() -> None:
    union: dict[str, str] = {}
    for name in PLUGINS:
        union |= project(ROOT / "plugins" / name)["entry-points"][GROUP]
    assert project(ROOT)["entry-points"][GROUP] == union


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_metadata_agrees_with_the_root(name: str) -> None:
    root, plugin = project(ROOT), project(ROOT / "plugins" / name)
    for key in ("version", "requires-python", "license"):
        assert plugin[key] == root[key], key
    wanted, allowed = requirements(plugin["dependencies"]), requirements(root["dependencies"])
    assert str(wanted.pop("hfquant").specifier) == f">={root['version']}"
    assert {key: str(value) for key, value in wanted.items()}.items() <= {
        key: str(value) for key, value in allowed.items()
    }.items()


def test_constraints_pin_every_dependency_within_its_range() -> None:
    table = project(ROOT)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = requirements([line for line in lines if line and not line.startswith("#")])
    dependencies = requirements([*table["dependencies"], *table["optional-dependencies"]["dev"]])
    for name, requirement in dependencies.items():
        (pin,) = pins[name].specifier
        assert pin.operator == "==", name
        assert requirement.specifier.contains(pin.version), f"{pins[name]} is outside {requirement}"


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_installs_alone(name: str, build_wheel: Callable, fresh_environment: Callable, tmp_path: Path) -> None:
    folder, package = ROOT / "plugins" / name, f"hfquant_{name}"
    wheel = build_wheel(folder, tmp_path / "wheel")
    assert files_in(wheel) == set(tree(folder / package, package))
    python = fresh_environment(tmp_path / "venv", wheel)
    program = (
        "import json; from importlib.metadata import entry_points\n"
        f"points = entry_points(group={GROUP!r})\n"
        "print(json.dumps({point.name: [point.dist.name, point.load().name] for point in points}))"
    )
    assert json.loads(python(program).splitlines()[-1]) == {name: [project(folder)["name"], name]}
