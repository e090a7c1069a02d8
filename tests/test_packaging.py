"""The wheel holds what the tree holds, and each plugin installs alone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from hfquant.build import LIBRARY, find_compiler, read_record
from tests import fresh

ROOT = Path(__file__).parents[1]
GROUP = "hfquant.backends"
IN_WHEEL = f"hfquant/kernels/cpu/{LIBRARY}"
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", "build", "*.so", "*.dylib")


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
    """Compiled without optimization, which takes a fifth of the time: what is in the wheel is the same."""
    folder = tmp_path_factory.mktemp("root_wheel")
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(find_compiler().command)} "$@" -O0\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        return build_wheel(ROOT, folder)


def test_wheel_is_the_tree(root_wheel: Path) -> None:
    expected, found = {*expected_in_wheel(), IN_WHEEL}, files_in(root_wheel)
    missing, extra = sorted(expected - found), sorted(found - expected)
    assert not missing and not extra, (
        f"missing from the wheel: {missing}; in the wheel but not in the tree: {extra}. "
        "Edit `packages`, `package-dir` and `package-data` in pyproject.toml; "
        "if the library is missing, `hfquant doctor --build` says why."
    )


def test_wheel_is_typed(root_wheel: Path) -> None:
    assert "hfquant/py.typed" in files_in(root_wheel)


def test_every_kernel_source_is_compiled_or_left_out_for_a_reason(root_wheel: Path, tmp_path: Path) -> None:
    assert IN_WHEEL in files_in(root_wheel), "not built: `hfquant doctor --build` says why"
    with zipfile.ZipFile(root_wheel) as archive:
        record = read_record(Path(archive.extract(IN_WHEEL, tmp_path)))
    assert record is not None
    assert {*record.sources, *record.left_out} == {path.name for path in (ROOT / "kernels/core/cpu").glob("*.cpp")}


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


# Nothing is on the path but the folders that are named, and the standard library.
ALONE = """
import json, sys
from importlib.metadata import entry_points
own = [path for path in sys.path if path.startswith(sys.base_prefix) and not path.endswith("-packages")]
sys.path[:] = [*sys.argv[2:], *own]
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
points = entry_points(group=sys.argv[1])
print(json.dumps({point.name: [point.dist.name, point.load().name] for point in points}))
"""


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_installs_alone(name: str, build_wheel: Callable, dependencies_only: Path, tmp_path: Path) -> None:
    folder, package = ROOT / "plugins" / name, f"hfquant_{name}"
    wheel = build_wheel(folder, tmp_path / "wheel")
    assert files_in(wheel) == set(tree(folder / package, package))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    done = fresh.run(ALONE, GROUP, tmp_path / "site", dependencies_only, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: [project(folder)["name"], name]}


# ---- the compiled kernels, with small sources in place of the real ones

DISPATCH = """extern "C" __attribute__((weak)) int fancy();
extern "C" __attribute__((visibility("default"))) int answer() { return fancy ? fancy() : 1; }
"""
FANCY = '// flags: -DFANCY=42\nextern "C" int fancy() { return FANCY; }\n'
ODD = "// flags: -mnobody-knows-this\n"
ANSWER = (
    "import ctypes; from hfquant.build import cpu_library as c; p = c(); print(p, p and ctypes.CDLL(str(p)).answer())"
)
NOT_COMPILED = "the CPU kernels were not compiled"


@pytest.fixture
def project_copy(copy_of: Callable[[Path, Path], None], tmp_path: Path) -> Path:
    """The project with three small sources as its kernels, and an `hfquant` that imports in no time."""
    copy = tmp_path / "project"
    copy_of(ROOT, copy)
    (copy / "hfquant" / "__init__.py").write_text("")
    cpu = copy / "kernels" / "core" / "cpu"
    shutil.rmtree(cpu)
    cpu.mkdir()
    for name, text in {"dispatch.cpp": DISPATCH, "fancy.cpp": FANCY, "odd.cpp": ODD}.items():
        (cpu / name).write_text(text)
    return copy


def built(project: Path, what: str, **environment: str) -> tuple[Path, str]:
    """Build a distribution the way pip does: the file, and all that was said."""
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}('out'), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project,
        env={key: value for key, value in os.environ.items() if key != "HFQUANT_NO_KERNELS"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (file,) = (project / "out").iterdir()
    return file.rename(project.parent / file.name), done.stdout


def label(wheel: Path) -> tuple[str, bool]:
    """The tag in a wheel's name, which must be the one in its metadata; and whether it is for any platform."""
    (tag,) = parse_wheel_filename(wheel.name)[3]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        lines = archive.read(name).decode().splitlines()
    assert [line for line in lines if line.startswith("Tag: ")] == [f"Tag: {tag}"]
    return str(tag), "Root-Is-Purelib: true" in lines


def imported_from(folder: Path) -> str:
    """What the kernels in a site folder, its .pth files included, say."""
    program = f"import site; site.addsitedir({str(folder)!r}); {ANSWER}"
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_with_the_library_is_for_this_platform_and_any_python(project_copy: Path, tmp_path: Path) -> None:
    before = files_below(project_copy)
    wheel, said = built(project_copy, "wheel")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert label(wheel) == (f"py3-none-{platform}", False)
    assert {"hfquant/kernels/__init__.py", IN_WHEEL, "hfquant/kernels/cpu/dispatch.cpp"} <= files_in(wheel)
    assert not any(".data/" in name for name in files_in(wheel))
    site = unpacked(wheel, tmp_path / "site")
    assert imported_from(site) == f"{site / IN_WHEEL} 42"
    assert "odd.cpp: left out" in said and NOT_COMPILED not in said
    after = files_below(project_copy)
    assert {name for name in after if not name.startswith(("build/", "hfquant.egg-info/"))} == before.keys()


@pytest.mark.parametrize(
    ("break_it", "environment", "reason"),
    [
        (None, {"CXX": "false"}, "CXX=false"),
        ("int nobody() { return nobody_declared_this; }", {}, "nobody_declared_this"),
    ],
    ids=["no compiler", "broken source"],
)
def test_an_install_never_needs_the_library(
    project_copy: Path, tmp_path: Path, break_it: str | None, environment: dict[str, str], reason: str
) -> None:
    if break_it:
        (project_copy / "kernels" / "core" / "cpu" / "broken.cpp").write_text(break_it)
    wheel, said = built(project_copy, "wheel", **environment)
    assert label(wheel) == ("py3-none-any", True)
    assert IN_WHEEL not in files_in(wheel) and "hfquant/kernels/cpu/dispatch.cpp" in files_in(wheel)
    assert imported_from(unpacked(wheel, tmp_path / "site")) == "None None"
    assert said.count(NOT_COMPILED) == 1 and reason in said and said.count("hfquant doctor --build") == 1


def test_the_kernels_can_be_switched_off_and_none_of_an_earlier_build_is_left(project_copy: Path) -> None:
    wheel, _ = built(project_copy, "wheel")
    assert IN_WHEEL in files_in(wheel)
    wheel, said = built(project_copy, "wheel", HFQUANT_NO_KERNELS="1")
    assert label(wheel) == ("py3-none-any", True) and IN_WHEEL not in files_in(wheel)
    assert NOT_COMPILED not in said and LIBRARY not in said


def test_an_editable_install_has_the_library_next_to_its_sources(project_copy: Path, tmp_path: Path) -> None:
    wheel, _ = built(project_copy, "editable")
    library = project_copy / "kernels" / "core" / "cpu" / LIBRARY
    assert label(wheel) == ("py3-none-any", True)
    assert imported_from(unpacked(wheel, tmp_path / "site")) == f"{library} 42"
    assert not any(name.endswith(LIBRARY) for name in files_in(wheel))
    wheel, _ = built(project_copy, "wheel", HFQUANT_NO_KERNELS="1")
    assert IN_WHEEL not in files_in(wheel)  # what lies in the tree is not what was asked for


def test_a_source_distribution_builds_the_library(project_copy: Path, tmp_path: Path) -> None:
    archive, _ = built(project_copy, "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert IN_WHEEL in files_in(built(folder, "wheel")[0])
