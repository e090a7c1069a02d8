"""The order of tests, and fresh environments with built distributions for those that need a real installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Files that take a quarter of a minute or more, the longest first: who runs files side by side begins with them, or
# waits for one of them in the end.
LONGEST = (
    *("test_fpq", "test_fpq_fisher", "test_memory", "test_third_party", "test_recipes", "test_docs", "test_streaming"),
    *("test_packaging", "test_loading", "test_fpq_attention", "test_checkpoint", "test_awq", "test_calibration"),
)
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", "build", "*.so", "*.dylib")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, everything else as it was collected."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def run_command(command: list[str], **options: Any) -> str:
    """Run a command; its standard output, or a failure that shows everything it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def copy_tree(source: Path, copy: Path) -> None:
    """Copy what a distribution is built from, without what was built before."""
    copy.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir() and (path.name in {"hfquant", "plugins", "kernels"} or path.name.startswith("hfquant_")):
            shutil.copytree(path, copy / path.name, ignore=NOT_SOURCE)
        elif path.is_file():
            shutil.copy(path, copy)


def wheel_of(source: Path, scratch: Path) -> Path:
    """Build from a copy: setuptools leaves build/ behind, and a later wheel would contain its stale files."""
    copy = scratch / "source"
    copy_tree(source, copy)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(scratch)]
    run_command([sys.executable, "-m", "pip", "wheel", *options, str(copy)], cwd=scratch)
    (wheel,) = scratch.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def dependencies_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path: every installed distribution except hfquant's own, and the tree's hfquant."""
    folder = tmp_path_factory.mktemp("dependencies")
    for site in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        for path in Path(site).iterdir():
            if "hfquant" not in path.name and path.suffix != ".pth":
                (folder / path.name).symlink_to(path)
    (folder / "hfquant").symlink_to(ROOT / "hfquant")
    return folder


@pytest.fixture(scope="session")
def fresh_environment(dependencies_only: Path) -> Callable[..., Callable[..., str]]:
    """`fresh_environment(folder, *wheels)` makes a virtual environment with the tree's hfquant, no plugin but these.

    What it returns runs a program there, away from the repository, and returns what it printed.
    """

    def create(folder: Path, *wheels: Path) -> Callable[..., str]:
        venv.create(folder, with_pip=False)
        python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run_command([python, "-c", query], cwd=folder).strip())
        (site / "dependencies.pth").write_text(f"{dependencies_only}\n")
        install = ["install", "--quiet", "--no-deps", "--no-index", *map(str, wheels)]
        run_command([sys.executable, "-m", "pip", "--python", python, *install], cwd=folder)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HFQUANT"))}

        def run(program: str, **environment: str) -> str:
            return run_command([python, "-c", program], cwd=folder, env={**clean, **environment})

        return run

    return create


@pytest.fixture(scope="session")
def build_wheel() -> Callable[[Path, Path], Path]:
    """`build_wheel(source, scratch)` builds the distribution in a folder."""
    return wheel_of


@pytest.fixture(scope="session")
def copy_of() -> Callable[[Path, Path], None]:
    """`copy_of(source, copy)` copies the sources of the distribution in a folder."""
    return copy_tree
