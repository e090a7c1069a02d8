"""Every check can find what it looks for."""

from __future__ import annotations

import ast
import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from packaging.requirements import Requirement

from hfquant import cpu, doctor, gpu
from hfquant.backend import Plugin
from hfquant.build import LIBRARY, build_library
from hfquant.doctor import BROKEN, NOTE, OK, Check, check_folder, check_library, check_requirement, examine, is_broken
from tests import fresh


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        ("torch>=2", OK, version("torch")),
        ("torch>=999", BROKEN, "pip install 'torch>=999'"),
        ("torch<1", BROKEN, "outside <1"),
        ("a-library-that-nobody-has>=1", BROKEN, "not installed"),
    ],
)
def test_versions_are_held_against_their_range(line, state, words):
    check = check_requirement(Requirement(line))
    assert check.state == state and words in check.detail


def test_requirements_are_those_of_the_project(monkeypatch):
    lines = ["torch>=999", 'datasets>=4; extra == "datasets"', 'ruff; extra == "dev"', 'nothing; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    found = {check.name: check.state for check in examine()}
    assert found["torch"] == BROKEN
    assert found["datasets"] == NOTE  # an optional library in the wrong version breaks nothing
    assert not {"ruff", "nothing"} & found.keys()


def test_a_tree_that_is_not_installed_is_broken_and_says_what_to_do(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr(doctor, "requires", missing)
    checks = examine()
    assert is_broken(checks)
    assert any("pip install -e ." in check.detail for check in checks)


def test_a_broken_plugin_shows_its_traceback(monkeypatch):
    good = Plugin("good", "some-package", "1.2", "good:backend")
    bad = Plugin("bad", "other-package", "0.1", "bad:backend", error="Traceback ...\nImportError: no wheels")
    monkeypatch.setattr(doctor, "backends", lambda: [good, bad])
    checks = {check.name: check for check in examine()}
    assert checks["good"].state == OK and "some-package 1.2" in checks["good"].detail
    assert checks["bad"].state == BROKEN and "ImportError: no wheels" in checks["bad"].detail
    assert is_broken(checks.values())


def test_a_limit_on_backends_is_shown(monkeypatch):
    monkeypatch.setenv("HFQUANT_BACKENDS", "fp8")
    assert any(check.name == "HFQUANT_BACKENDS" and "fp8" in check.detail for check in examine())


def test_every_device_of_torch_has_a_line_about_kernels():
    checks = examine()
    devices = {check.name for check in checks if check.topic == "devices" and check.name != "accelerator"}
    assert "cpu" in devices and ("cuda" in devices) == torch.cuda.is_available()
    assert {check.name for check in checks if check.topic == "kernels"} == devices | {"cpu library", "cpu instructions"}


def test_the_instruction_set_in_use_is_named_with_the_others():
    library = cpu.library()
    assert not isinstance(library, str), library
    for isa in library.isas():
        with library.using(isa):
            check = next(check for check in examine() if check.name == "cpu instructions")
        assert (check.topic, check.state) == ("kernels", OK)
        in_use, _, others = check.detail.partition("; HFQUANT_CPU_ISA can ask for ")
        assert in_use == isa and others.split(", ") == [other for other in library.isas() if other != isa]


def test_an_instruction_set_that_is_not_there_is_broken():
    program = "from hfquant.doctor import examine; print(*(c.to_dict() for c in examine()), sep='\\n')"
    environment = {**os.environ, "HFQUANT_CPU_ISA": "nonsense"}
    done = fresh.run(program, environment=environment)
    assert done.returncode == 0, done.stderr
    checks = [Check(**ast.literal_eval(line)) for line in done.stdout.splitlines()]
    broken = [check for check in checks if check.state == BROKEN]
    assert [check.name for check in broken] == ["cpu instructions"]
    assert "HFQUANT_CPU_ISA='nonsense'" in broken[0].detail and "choose from" in broken[0].detail
    assert "scalar" in broken[0].detail


def test_a_gpu_without_triton_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: {"cpu": "2 cores", "cuda": "a GPU"})
    found = {check.name: check for check in examine() if check.topic == "kernels"}
    assert found["cuda"].state == OK and "triton" in found["cuda"].detail
    gpu.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {check.name: check for check in examine() if check.topic == "kernels"}
    assert found["cuda"].state == NOTE and "pip install hfquant[triton]" in found["cuda"].detail
    gpu.missing.cache_clear()


def test_the_library_of_kernels_is_named_with_its_compiler(tmp_path, monkeypatch):
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    built = build_library(tmp_path, tmp_path)
    library = tmp_path / LIBRARY
    monkeypatch.setattr(doctor, "cpu_library", lambda: library)
    check = next(check for check in examine() if check.name == "cpu library")
    assert check.state == OK and str(library) in check.detail and built.version in check.detail
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    stale = check_library(library)
    assert stale.state == NOTE and "other sources" in stale.detail and "doctor --build" in stale.detail
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"from another processor")
    broken = check_library(foreign)
    assert broken.state == BROKEN and "does not load" in broken.detail and "doctor --build" in broken.detail


def test_a_missing_library_is_a_note_with_its_reason(tmp_path, monkeypatch):
    def found() -> Check:
        return next(check for check in examine() if check.name == "cpu library")

    monkeypatch.setattr(doctor, "cpu_library", lambda: None)
    monkeypatch.setattr(doctor, "cpu_folder", lambda: tmp_path)
    check = found()
    assert check.state == NOTE and "not built: hfquant doctor --build compiles it" in check.detail
    monkeypatch.setenv("CXX", "a-compiler-that-nobody-has")
    assert found().state == NOTE and "a-compiler-that-nobody-has is not there" in found().detail
    monkeypatch.setattr(doctor, "cpu_folder", lambda: None)
    assert found().state == NOTE and "pip install" in found().detail


def test_disk_space_is_looked_up_where_a_folder_will_be(tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b"
    free = check_folder("cache", deep)
    assert str(deep) in free.detail and "GB free" in free.detail and not deep.exists()
    monkeypatch.setattr(doctor, "LOW_DISK", float("inf"))
    assert check_folder("cache", deep).state == NOTE
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert "not writable" in check_folder("cache", deep).detail
