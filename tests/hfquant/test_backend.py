"""Plugins are found, loaded and kept apart: all against real distributions on sys.path."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hfquant import BackendError, HfQuantConfig, SpecError, backend
from hfquant.backend import TABLES, Backend, Plugin, backends, register, unregister
from hfquant.grids import GRIDS, Codebook
from hfquant.kernel import Kernel
from hfquant.presets import kbit
from hfquant.ranges import RANGES
from tests import fresh

GOOD = """
from functools import partial
from hfquant.backend import Backend
from hfquant.grids import Codebook
from hfquant.presets import kbit
grid = Codebook({grid!r}, (-1.0, 0.0, 1.0))
backend = Backend({name!r}, grids=(grid,), presets={{{preset!r}: partial(kbit, {grid!r})}})
"""


def good(name: str, preset: str = "", grid: str = "") -> str:
    """Source of a plugin with one grid and one method."""
    return GOOD.format(name=name, preset=preset or name, grid=grid or f"{name}_grid")


def distribution(folder: Path, name: str, source: str, entry: str = "", target: str = "", version: str = "1.2") -> Path:
    """Write an installed distribution: a module hfq_<name> and its metadata. Returns the folder for sys.path."""
    module = f"hfq_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: {version}\n")
    points = f"[{backend.GROUP}]\n{entry or name} = {target or f'{module}:backend'}\n"
    (info / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Puts distributions on sys.path of a process whose plugins were not looked at yet; undone after the test."""
    tables = [(table, table.entries()) for table in TABLES]
    modules = set(sys.modules)
    state = (backend._plugins, backend._clashes, backend._discovered)
    saved = [value.copy() for value in state]
    for value in state:
        value.clear()
    monkeypatch.delenv("HFQUANT_BACKENDS", raising=False)

    def put(name: str, source: str, **options: str) -> Path:
        folder = distribution(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", name, source, **options)
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return folder

    yield put
    for table, entries in tables:
        table.restore(entries)
    for value, old in zip(state, saved, strict=True):
        value.clear()
        (value.update if isinstance(value, dict) else value.extend)(old)  # type: ignore[arg-type]
    for name in set(sys.modules) - modules:
        if name.startswith("hfq_"):
            del sys.modules[name]


def found(name: str) -> list[Plugin]:
    return [plugin for plugin in backends() if plugin.name == name]


def tables() -> list[list[str]]:
    return [table.names() for table in TABLES]


def python(program: str, *path: Path, **environment: str) -> str:
    """Run a program in a fresh process with distributions on its path; what it printed last."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HFQUANT")}
    added = f"import sys; sys.path[:0] = {list(map(str, path))}\n"
    done = fresh.run(added + program, environment={**clean, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# Lazy, deduplicated, limited


def test_no_plugin_is_imported_before_a_name_is_unknown(tmp_path: Path) -> None:
    """Also: one distribution twice on sys.path is one plugin, and HFQUANT_BACKENDS keeps others out."""
    trap = "raise RuntimeError('imported without being asked for')"
    path = [
        distribution(tmp_path / "a", "one", good("one")),
        distribution(tmp_path / "b", "one", good("one")),
        distribution(tmp_path / "c", "two", good("two")),
        distribution(tmp_path / "d", "trap", trap),
    ]
    program = (
        "import sys, json\n"
        "import hfquant\n"
        "plugins = lambda: sorted(name for name in sys.modules if name.startswith('hfq_'))\n"
        "steps = [plugins()]\n"
        "hfquant.HfQuantConfig('int4'); steps.append(plugins())\n"  # of the core
        "hfquant.HfQuantConfig('one'); steps.append(plugins())\n"  # a plugin's, found by its name
        "steps.append([p.name for p in hfquant.backends() if p.distribution.startswith('dist-')])\n"
        "steps.append(plugins())\n"
        "print(json.dumps(steps))"
    )
    loaded = [["hfq_one"], ["one", "trap", "two"], ["hfq_one", "hfq_two"]]
    assert json.loads(python(program, *path)) == [[], [], *loaded]
    limited = [["hfq_one"], ["one"], ["hfq_one"]]
    assert json.loads(python(program, *path, HFQUANT_BACKENDS=" one , other")) == [[], [], *limited]


def test_what_is_left_out_is_said(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("left", good("left"))
    monkeypatch.setenv("HFQUANT_BACKENDS", "")
    with pytest.raises(SpecError, match=r"(?s)unknown method 'left'.*HFQUANT_BACKENDS=''"):
        HfQuantConfig("left")
    assert found("left") == []


def test_checkpoint_of_a_backend_that_is_kept_out(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed: "pip install" would be the wrong advice."""
    install("left", good("left", preset="int4_like", grid="left_grid"))
    data = {**HfQuantConfig("int4").to_dict(), "plugins": {"left": {"distribution": "dist-left", "version": "1.2"}}}
    assert HfQuantConfig.from_dict(data).plugins == data["plugins"]
    monkeypatch.setenv("HFQUANT_BACKENDS", "other")
    for state in (backend._plugins, backend._discovered):
        state.clear()
    with pytest.raises(BackendError, match="which HFQUANT_BACKENDS='other' keeps from being loaded"):
        HfQuantConfig.from_dict(data)


def test_a_method_of_another_name_loads_every_plugin_until_it_is_there(install: Callable) -> None:
    install("first", good("first", preset="unlike"))
    install("unlike", good("unlike", preset="other"))  # its name is asked for, but it is not the one that has it
    assert HfQuantConfig("unlike").recipe.scheme.weight.grid == "first_grid"


def test_plugin_as_plain_data(install: Callable) -> None:
    install("plain", good("plain", preset="plain_method"), version="3.4")
    (plugin,) = found("plain")
    assert json.loads(json.dumps(plugin.to_dict())) == {
        "name": "plain",
        "state": "ok",
        "distribution": "dist-plain",
        "version": "3.4",
        "entry_point": "hfq_plain:backend",
        "methods": ["plain_method"],
        "error": None,
    }


# Isolated

BROKEN = {
    "missing": ("import a_module_that_is_nowhere", "ModuleNotFoundError: No module named 'a_module_that_is_nowhere'"),
    "syntax": ("def broken(:", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "base": ("class Out(BaseException): pass\nraise Out('of here')", "Out: of here"),
    "absent": ("", "AttributeError: module 'hfq_absent' has no attribute 'backend'"),
    "thing": ("backend = {'name': 'thing'}", "is a dict, not a hfquant Backend"),
    "other": (good("another"), "holds a backend named 'another': give both the same name"),
    "future": (
        "from hfquant.backend import Backend\nbackend = Backend('future', api=99)",
        "API 99, this hfquant has API 1",
    ),
    "field": ("from hfquant.backend import Backend\nbackend = Backend('field', colours=())", "colours"),
    "nogrid": ("from hfquant.backend import Backend\nbackend = Backend('nogrid', grids=('int4',))", "has no attribute"),
    "nocall": (
        "from hfquant.backend import Backend\nbackend = Backend('nocall', presets={'x': 4})",
        "method 'x' is a int",
    ),
    "hidden": (good("hidden", grid="e2m1"), "grid 'e2m1' would never be found"),
    "twice": (good("twice") + "\nbackend = Backend('twice', grids=(grid, grid))", "'twice_grid' is there twice"),
    "effect": (
        good("effect") + "\nfrom hfquant.ranges import RANGES\nRANGES.add('effect_range', min, 'me')",
        "registered range 'effect_range' while it was imported",
    ),
    "half": (
        "from hfquant.grids import GRIDS, Codebook\n"
        "GRIDS.add('half_grid', Codebook('half_grid', (0.0, 1.0)), 'me')\n1 / 0",
        "ZeroDivisionError",
    ),
    "curious": ("from hfquant.backend import *\nfrom hfquant.grids import GRIDS\nGRIDS.get('curious')", "unknown grid"),
}


def test_one_broken_plugin_hurts_nobody_else(install: Callable) -> None:
    """Every kind of fault at once, beside a good plugin."""
    for name, (source, _) in BROKEN.items():
        install(name, source)
    install("fine", good("fine"))
    plugins = {plugin.name: plugin for plugin in backends()}
    for name, (_, reason) in BROKEN.items():
        entry = plugins[name].to_dict()
        assert entry["state"] == "broken" and entry["methods"] == []
        assert reason in entry["error"], entry["error"]
        with pytest.raises(BackendError) as caught:
            HfQuantConfig(name)
        for part in (repr(name), f"dist-{name} 1.2", f"hfq_{name}:backend", reason):
            assert part in str(caught.value)
    assert plugins["fine"].to_dict()["state"] == "ok"
    assert HfQuantConfig("fine").plugins == {"fine": {"distribution": "dist-fine", "version": "1.2"}}
    assert HfQuantConfig("int4").plugins == {}
    real = {
        f"{p.name} [{p.distribution} {p.version}]" for p in plugins.values() if p.distribution.startswith("hfquant")
    }
    assert {owner for _, owner in all_owners()} <= {"core [hfquant]", "fine [dist-fine 1.2]"} | real


def test_traceback_leads_to_the_line_in_the_plugin(install: Callable) -> None:
    folder = install("deep", "def inner():\n    raise OSError('no such library')\ninner()")
    (plugin,) = found("deep")
    assert plugin.error is not None
    assert f'{folder / "hfq_deep.py"}", line 2, in inner' in plugin.error


def test_unknown_name_mentions_what_is_broken(install: Callable) -> None:
    install("lame", "raise OSError('no such library')")
    with pytest.raises(
        SpecError, match=r"(?s)unknown method 'nf5'.*Did you mean 'nf4'.*dist-lame 1.2.*OSError: no such"
    ):
        HfQuantConfig("nf5")


def test_damaged_metadata_hides_no_other_plugin(install: Callable) -> None:
    install("sound", good("sound"))
    folder = install("nameless", good("nameless"))
    (next(folder.glob("*.dist-info")) / "METADATA").write_text("Metadata-Version: 2.1\n")
    install("senseless", good("senseless"), target="not a target ::")
    assert found("sound")[0].error is None
    assert found("nameless")[0].distribution == "unknown"
    assert found("senseless")[0].error is not None


def test_interrupt_is_the_users_and_the_plugin_may_be_tried_again(
    install: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = "import os\nif os.environ.pop('HFQ_INTERRUPT', None): raise KeyboardInterrupt\n"
    install("slow", flag + good("slow"))
    monkeypatch.setenv("HFQ_INTERRUPT", "1")
    before = tables()
    with pytest.raises(KeyboardInterrupt):
        HfQuantConfig("slow")
    assert tables() == before
    assert HfQuantConfig("slow").recipe.scheme.weight.grid == "slow_grid"


# Clashes


@pytest.mark.parametrize("what", ["preset", "grid"])
def test_name_of_two_distributions_is_refused(install: Callable, what: str) -> None:
    """The second to load is refused as a whole, and both are named."""
    install("left", good("left", **{what: "shared"}))
    install("right", good("right", **{what: "shared"}))
    assert found("left")[0].error is None
    (right,) = found("right")
    assert right.error is not None
    axis = "method" if what == "preset" else "grid"
    assert f"{axis} 'shared' of right [dist-right 1.2] is already provided by left [dist-left 1.2]" in right.error
    assert not any("right" in name or owner.startswith("right") for name, owner in all_owners())
    with pytest.raises(BackendError, match=r"(?s)dist-right.*dist-left"):
        HfQuantConfig("right")


def all_owners() -> list[tuple[str, str]]:
    return [(name, owner) for table in TABLES for name, (_, owner) in table.entries().items()]


def test_entry_point_of_two_distributions_is_refused(install: Callable) -> None:
    """Neither is used: which one came first on the path must not decide."""
    install("left", good("same"), entry="same")
    install("right", good("same"), entry="same")
    plugins = found("same")
    assert [plugin.distribution for plugin in plugins] == ["dist-left", "dist-right"]
    for plugin in plugins:
        assert plugin.error is not None and "dist-left" in plugin.error and "dist-right" in plugin.error
    with pytest.raises(BackendError, match=r"claimed by both dist-left 1.2 .* and dist-right 1.2"):
        HfQuantConfig("same")
    assert "hfq_left" not in sys.modules and "hfq_right" not in sys.modules


def test_same_target_in_two_distributions_is_one_plugin(install: Callable) -> None:
    """As when hfquant, which brings its own plugins, and one of these plugins alone are both installed."""
    install("whole", good("part"), entry="part", target="hfq_part:backend")
    install("part", good("part"))
    (plugin,) = found("part")
    assert plugin.error is None


def test_core_names_cannot_be_taken(install: Callable) -> None:
    install("thief", good("thief", preset="int4"))
    with pytest.raises(BackendError, match=r"method 'int4' of thief .* already provided by core"):
        HfQuantConfig("thief")
    assert HfQuantConfig("int4").plugins == {}


# Registration


def test_register_is_all_or_nothing_and_can_be_undone() -> None:
    grid = Codebook("reg_grid", (0.0, 1.0))
    kernel = Kernel("reference", "*", "*", run=lambda *args: args[0])  # the name is taken
    before = tables()
    with pytest.raises(BackendError, match=r"kernel 'reference' of reg .* already provided by core"):
        register(Backend("reg", grids=(grid,), kernels=(kernel,), presets={"reg": kbit}), "test")
    assert tables() == before
    fine = Backend("reg", grids=(grid,), presets={"reg": kbit})
    register(fine, "test")
    assert GRIDS.get("reg_grid") is grid and GRIDS.owner("reg_grid") == "reg [test]"
    with pytest.raises(BackendError, match=r"backend 'reg' of reg .other. is already provided by reg .test."):
        register(Backend("reg"), "other")
    unregister(fine, "test")
    assert tables() == before


def test_plugins_of_every_axis_are_recorded(install: Callable) -> None:
    """A method of the core with a range and a grid of two plugins needs both plugins to be read again."""
    source = (
        "from hfquant.backend import Backend\nfrom hfquant.ranges import absmax\n"
        "backend = Backend('span', ranges={'span_range': lambda w, spec, stats: absmax(w, spec, stats)})"
    )
    install("span", source)
    config = HfQuantConfig("int4", range="span_range")
    assert config.plugins == {"span": {"distribution": "dist-span", "version": "1.2"}}
    assert RANGES.owner("span_range") == "span [dist-span 1.2]"
