"""The library of compiled kernels: what goes in, what is left out, and what happens where there is no compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from hfquant import build
from hfquant.build import (
    LIBRARY,
    BuildError,
    NoCompilerError,
    build_cpu_library,
    build_library,
    cpu_library,
    digest,
    extra_flags,
    find_compiler,
    read_record,
)

PUBLIC = 'extern "C" __attribute__((visibility("default"))) int'
DISPATCH = f"""#include "answer.h"
extern "C" __attribute__((weak)) int fancy();
{PUBLIC} answer() {{ return fancy ? fancy() : ANSWER; }}
{PUBLIC} threads() {{
#ifdef _OPENMP
    return 2;
#else
    return 1;
#endif
}}
"""
FANCY = '// flags: {}\nextern "C" int fancy() {{ return FANCY; }}\n'
BROKEN = 'extern "C" int fancy() { return nobody_declared_this; }\n'
REAL = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """One source that works alone and answers 1; `fancy.cpp` would change the answer."""
    folder = tmp_path / "the sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 1\n")
    (folder / "dispatch.cpp").write_text(DISPATCH)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def fake_compiler(folder: Path, rule: str) -> str:
    """A compiler that follows a shell `case` rule about its arguments before it compiles."""
    script = folder / "fake c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in {rule}; esac\nexec {REAL} "$@"\n')
    script.chmod(0o755)
    return str(script)


def load(target: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(target / LIBRARY))


def test_a_source_gets_its_flags_and_is_found_through_a_weak_symbol(sources, target):
    (sources / "fancy.cpp").write_text(FANCY.format("-DFANCY=42 -O1"))
    built = build_library(sources, target)
    assert load(target).answer() == 42
    assert built.sources == {"dispatch.cpp": [], "fancy.cpp": ["-DFANCY=42", "-O1"]} and not built.left_out
    assert built.version == find_compiler().version and built.warnings == ""


def test_a_source_with_flags_that_nobody_knows_is_left_out_and_said(sources, target):
    (sources / "fancy.cpp").write_text(FANCY.format("-DFANCY=42 -mnobody-knows-this"))
    built = build_library(sources, target)
    assert load(target).answer() == 1
    assert built.sources == {"dispatch.cpp": []}
    assert list(built.left_out) == ["fancy.cpp"] and "-mnobody-knows-this" in built.left_out["fancy.cpp"]
    assert any("fancy.cpp" in line and "left out" in line for line in built.lines())


def test_flags_that_a_compiler_only_warns_of_leave_the_source_out(sources, target, tmp_path, monkeypatch):
    """As clang does with flags for another processor: "argument unused during compilation"."""
    rule = "*-mother*-Werror*) echo \"error: argument unused: '-mother'\"; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, rule))
    (sources / "fancy.cpp").write_text(FANCY.format("-mother"))
    assert build_library(sources, target).left_out == {"fancy.cpp": "error: argument unused: '-mother'"}


def test_only_a_first_line_counts_as_flags(tmp_path):
    source = tmp_path / "a.cpp"
    for text, flags in [("// flags: -a '-b c'\n", ["-a", "-b c"]), ("\n// flags: -a\n", []), ("", []), ("int a;", [])]:
        source.write_text(text)
        assert extra_flags(source) == flags


def test_what_is_not_marked_is_not_exported(sources, target):
    (sources / "fancy.cpp").write_text(FANCY.format("-DFANCY=42"))
    build_library(sources, target)
    assert hasattr(load(target), "answer") and not hasattr(load(target), "fancy")


def test_a_source_that_does_not_compile_fails_and_leaves_the_old_library(sources, target):
    build_library(sources, target)
    before = (target / LIBRARY).read_bytes()
    (sources / "fancy.cpp").write_text(BROKEN)
    with pytest.raises(BuildError, match=r"fancy\.cpp does not compile") as failed:
        build_library(sources, target)
    assert str(sources / "fancy.cpp") in failed.value.command and "nobody_declared_this" in failed.value.output
    assert "nobody_declared_this" in str(failed.value) and not isinstance(failed.value, NoCompilerError)
    assert (target / LIBRARY).read_bytes() == before and os.listdir(target) == [LIBRARY]


@pytest.mark.skipif(build.MACOS, reason="symbols are looked up when the library is loaded")
def test_a_symbol_that_is_nowhere_fails_when_linking_not_when_loading(sources, target):
    (sources / "user.cpp").write_text(f'extern "C" int nowhere();\n{PUBLIC} use() {{ return nowhere(); }}\n')
    with pytest.raises(BuildError, match="cannot be linked") as failed:
        build_library(sources, target)
    assert "nowhere" in failed.value.output and os.listdir(target) == []


def test_warnings_are_reported(sources, target):
    (sources / "sloppy.cpp").write_text("static int never_used;\n")
    assert "never_used" in build_library(sources, target).warnings


def test_the_library_carries_its_record(sources, target):
    (sources / "fancy.cpp").write_text(FANCY.format("""'-DFANCY=sizeof("é\\\\\\"")' -Wno-nothing"""))
    (sources / "odd.cpp").write_text("// flags: -mnobody-knows-this\n")
    built = build_library(sources, target)
    assert "fancy.cpp" in built.sources and "odd.cpp" in built.left_out
    assert read_record(target / LIBRARY) == built


def test_a_library_without_a_record_is_unknown(tmp_path):
    other = tmp_path / LIBRARY
    other.write_bytes(b"\x7fELF, but not ours")
    assert read_record(other) is None


@pytest.mark.parametrize("name", ["dispatch.cpp", "answer.h", "new.cpp"])
def test_the_digest_tells_whether_sources_changed(sources, target, name):
    built = build_library(sources, target)
    assert built.digest == digest(sources)
    (sources / "notes.txt").write_text("not compiled")
    assert built.digest == digest(sources)
    with (sources / name).open("a") as file:
        file.write("\n")
    assert built.digest != digest(sources)


def test_building_again_replaces_the_library(sources, target):
    build_library(sources, target)
    old = load(target)
    (sources / "answer.h").write_text("#define ANSWER 5\n")
    build_library(sources, target)
    program = f"import ctypes; print(ctypes.CDLL({str(target / LIBRARY)!r}).answer())"
    fresh = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert old.answer() == 1 and fresh.stdout == "5\n"  # whoever has the old one keeps it


def test_openmp_is_used_if_the_compiler_has_it(sources, target, tmp_path, monkeypatch):
    assert build_library(sources, target).openmp and load(target).threads() == 2
    rule = "*-fopenmp*) echo \"error: unsupported option '-fopenmp'\"; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, rule))
    built = build_library(sources, tmp_path / "plain")
    assert not built.openmp and load(tmp_path / "plain").threads() == 1
    assert "one thread" in built.lines()[0]


def test_the_compiler_of_the_environment_is_used_with_its_arguments(sources, target, monkeypatch):
    (sources / "answer.h").write_text("")
    monkeypatch.setenv("CXX", f"{REAL} -DANSWER=7")
    assert build_library(sources, target).compiler == f"{REAL} -DANSWER=7" and load(target).answer() == 7


@pytest.mark.parametrize("value", ["false", "a-compiler-that-nobody-has -x", "'never closed"])
def test_the_compiler_of_the_environment_is_never_replaced(sources, target, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(NoCompilerError) as failed:
        build_library(sources, target)
    assert f"CXX={value}" in str(failed.value) and os.listdir(target) == []


def test_without_a_compiler_the_error_names_what_was_tried(sources, target, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompilerError) as failed:
        build_library(sources, target)
    assert all(name in str(failed.value) for name in ("c++", "g++", "clang++"))


def test_a_compiler_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    """As the c++ of a Mac without developer tools, which is there and only says what to install."""
    monkeypatch.delenv("CXX", raising=False)
    for name, status in [("c++", 1), ("clang++", 0)]:
        (tmp_path / name).write_text(f"#!/bin/sh\necho version of {name}\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (find_compiler().command, find_compiler().version) == (("clang++",), "version of clang++")


def test_a_compiler_that_compiles_nothing_is_an_error(sources, target, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, '*std=c++17*) echo "error: too old"; exit 1'))
    with pytest.raises(BuildError, match="cannot build a C\\+\\+17 library") as failed:
        build_library(sources, target)
    assert failed.value.output == "error: too old"


def test_a_folder_without_sources_is_an_error(tmp_path, target):
    with pytest.raises(BuildError, match=r"no \*\.cpp files"):
        build_library(tmp_path, target)


def test_the_installed_package_is_built_where_its_sources_lie(sources, monkeypatch):
    shutil.copytree(sources, package := sources.parent / "kernels" / "cpu")
    spec = ModuleSpec("hfquant.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(package.parent)]
    monkeypatch.setattr(build.importlib.util, "find_spec", {"hfquant.kernels": spec}.get)
    assert cpu_library() is None
    build_cpu_library()
    assert cpu_library() == package / LIBRARY and load(package).answer() == 1
    monkeypatch.setattr(build.importlib.util, "find_spec", {}.get)
    assert cpu_library() is None
    with pytest.raises(BuildError, match="pip install"):
        build_cpu_library()


def test_the_module_needs_nothing_but_the_standard_library():
    """setup.py loads it by its path in an environment that has setuptools alone."""
    assert importlib.util.find_spec("torch")
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('loaded', {build.__file__!r})\n"
        "sys.modules['loaded'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.LIBRARY, 'torch' in sys.modules, 'hfquant' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [LIBRARY, "False", "False"]
