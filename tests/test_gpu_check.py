"""`make gpu-check` refuses without a GPU, and everything that it does on one works on a CPU on tiny shapes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfquant import reference
from hfquant.kernel import KERNELS
from hfquant.kernels.triton import int8, levels  # noqa: F401  while nothing is interpreted yet
from hfquant.kernels.triton.blocks import TILES, Tile

from .kernels.triton.compiled import recording
from .kernels.triton.interpret import interpreted
from .kernels.triton.products import registered

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # as for a script there


def module(name: str) -> Any:
    return importlib.import_module(name)


script, bars, jobs, timing = module("gpu_check"), module("gpu.bars"), module("gpu.jobs"), module("gpu.timing")
children, layers, weights = module("gpu.children"), module("gpu.layers"), module("gpu.weights")
agreement, sanitizer, sweep = module("gpu.agreement"), module("gpu.sanitizer"), module("gpu.sweep")
bounds, decode, models, peers, table = (
    module(f"gpu.{name}") for name in ("bounds", "decode", "models", "peers", "table")
)
Findings, write = module("gpu.findings").Findings, module("gpu.findings").write
Setting, SIZES = module("gpu.setting").Setting, module("gpu.setting").SIZES
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def setting(size: str = "tiny", device: torch.device = CPU, seconds: float = 600) -> Any:
    return Setting(device, SIZES[size], time.monotonic() + seconds)


class Waits(TorchDispatchMode):
    """Notes operators that wait for a device, or bring numbers to it from another: no CUDA graph can hold them."""

    words = ("local_scalar", "nonzero", "lift", "unique", "masked_select", "equal.default")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == self.device for tensor in tensors):
            self.seen += 1
            waits = any(word in str(function) for word in self.words)
            if waits or len({tensor.device.type for tensor in tensors}) > 1:
                self.found.append(str(function))
        return out


# Without a GPU.


def test_make_refuses_in_one_sentence_and_writes_nothing() -> None:
    before = sorted((ROOT / "benchmarks/results").iterdir())
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = ["make", "--silent", "--old-file=venv", "gpu-check", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and said == [script.REFUSED] and not done.stdout
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before


# All parts, on a CPU.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Result, page and exit status of the whole check, its jobs one after the other in this process."""
    path = tmp_path_factory.mktemp("check") / "result.json"

    def run_all(groups: Any, command: Any, folder: Path, seconds: float, tell: Any) -> None:
        for job in (job for group in groups for job in group):
            given = script.options(command(job, 100.0)[2:])
            assert script.child(given.child, given.size, given.seconds, given.folder, "cpu") == 0
            tell(job.name, jobs.read(jobs.path_of(job, folder)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "run_all", run_all)
        patch.setattr(script, "has_gpu", lambda: True)
        patch.setattr(sanitizer, "tool", lambda: None)
        status = script.main(["--size", "tiny", "--out", str(path)])
    yield json.loads(path.read_text()), path.with_suffix(".md").read_text(), status


def test_every_part_runs_to_its_end(whole: tuple[dict[str, Any], str, int]) -> None:
    result, page, status = whole
    assert {job.name for job in jobs.JOBS} == set(result["parts"])
    for name, found in result["parts"].items():
        assert (found["state"], found.get("error"), found.get("left_out")) == ("done", None, None), name
        assert not [row["error"] for row in found["rows"] if "error" in row], name
    assert status == 1, "a CPU keeps no bar of a GPU, and has no sanitizer"
    assert page == table.markdown(result)
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(headings) == 8 and "compute-sanitizer is not installed" in page


def test_rows_say_which_kernel_ran(whole: tuple[dict[str, Any], str, int]) -> None:
    result, _, _ = whole
    rows = [row for found in result["parts"].values() for row in found["rows"] if "kernel" in row]
    assert {row["kernel"] for row in rows} == {"cpu", "none", "one by one", "bitsandbytes"}
    assert {row["format"] for row in result["parts"]["layers"]["rows"]} == set(weights.FORMATS)
    for row in result["parts"]["layers"]["rows"]:
        assert row["agrees"] and {"ours", "bf16"} <= set(row["runs"]) and row["of_copy"] > 0 and row["of_product"] > 0


def test_what_is_right_is_found_to_be_right(whole: tuple[dict[str, Any], str, int]) -> None:
    result, _, _ = whole
    found = {line["name"]: line for line in result["bars"]}
    assert found["results agree with the reference"]["state"] == "met"
    assert found["operators are well-formed"]["state"] == "met"
    assert found["memory is not touched by mistake"]["said"] == sanitizer.ABSENT
    assert found["7B decode in 4 bits, times bf16"]["value"] > 0
    assert all(row["same_text"] for row in result["parts"]["decode"]["rows"])
    assert all(row["learns"] for row in result["parts"]["qlora"]["rows"])


def test_the_sanitizer_has_something_to_look_at() -> None:
    assert script.child("families", "tiny", 100, None, "cpu") == 0
    assert set(agreement.FAMILIES) <= set(agreement.formats())
    assert {agreement.formats()[name].kernel for name in agreement.FAMILIES} == {
        "triton",
        "triton_int8",
        "triton_levels",
    }


def test_every_triton_kernel_is_checked() -> None:
    formats = agreement.formats().values()
    assert {format.kernel for format in formats} == {name for name in KERNELS.names() if name.startswith("triton")}


@pytest.mark.parametrize(("name", "dtype"), zip(agreement.formats(), cycle(agreement.DTYPES.values())))
def test_bounds_fit_what_a_gpu_computes(name: str, dtype: torch.dtype) -> None:
    """Interpreted, with the tiles of a GPU; float8 instructions, whose sums are less precise, are not emulated."""
    format, rows, shape = agreement.formats()[name], 5, (19, 48)
    tensors, spec = weights.random_packed(shape, format, CPU, seed=1)
    kernel, layer = KERNELS.get(format.kernel), weights.layer_of(tensors, spec)
    assert kernel.why_not(spec, dtype, (9, 0)) is None
    x, grad = weights.random_input(rows, 48, CPU, dtype), weights.random_input(rows, 19, CPU, dtype, seed=7)
    with interpreted():
        y = kernel.run(x, layer.packed(), None, spec)
        back = KERNELS.get("triton").input_grad(grad, layer.packed(), spec) if kernel.input_grad else None
    exact = reference.linear(x.float(), layer.packed(), None, spec)
    assert bounds.distance(y, exact) <= bounds.bound(layer, dtype, False)
    if back is not None:
        exact = reference.input_grad(grad.float(), layer.packed(), spec)
        assert bounds.distance(back, exact) <= bounds.GRADIENT * bounds.BOUND[dtype]


# What goes into CUDA graphs.


@pytest.mark.parametrize("name", weights.FORMATS)
def test_launches_wait_for_nothing(name: str) -> None:
    """Tensors without values stand for those on a GPU: whoever asks for a value is seen."""
    format = weights.FORMATS[name]
    tensors, spec = weights.random_packed((64, 128), format, CPU)
    packed, x = [tensor.to("meta") for tensor in tensors.values()], weights.random_input(3, 128, CPU).to("meta")
    run = KERNELS.get(format.kernel).run
    with recording() as launches, torch.no_grad():
        run(x, packed, None, spec)
        with Waits("meta") as waits:
            run(x, packed, None, spec)
    assert launches and waits.seen and not waits.found
    with pytest.raises(RuntimeError):
        x.sum().item()


@pytest.mark.parametrize("name", ["int4 g128", "w8a8"])
def test_steps_of_a_model_wait_for_nothing_and_say_the_same_again(name: str) -> None:
    told = setting()
    model, prompt = models.build(name, told), decode.prompt_of(told, 8)
    with torch.no_grad():
        decoder, reader = decode.Decoder(model, prompt, 4), decode.Reader(model, prompt)
        with Waits("cpu") as waits:
            decoder.step()
            logits = reader.read()
        assert waits.seen and not waits.found
        assert decoder.text(decoder.step, 4) == decoder.text(decoder.step, 4)
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 8:].tolist()
        assert [int(decoder.first), *decoder.text(decoder.step, 4)] == expected
        assert torch.equal(logits, model(prompt).logits[:, -1:])


# Checks that find what they look for.


def test_memory_is_poisoned() -> None:
    with agreement.poisoned():
        assert torch.empty(100).isnan().all() and (torch.empty(9, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_results_are_found() -> None:
    exact, calls = torch.ones(4, 8), iter(range(10))

    def left_out() -> torch.Tensor:
        y = torch.empty(4, 8)
        y[:3] = 1
        return y

    wrong = {
        "far": lambda: exact * 1.01,
        "left out": left_out,
        "another shape": lambda: exact[:3],
        "another time": lambda: exact + 1e-4 * next(calls),
    }
    right: dict[str, Any] = {}
    agreement.compare(right, "distance", exact, exact.clone, 1e-3)
    assert right["agrees"]
    for name, run in wrong.items():
        line: dict[str, Any] = {}
        try:
            agreement.compare(line, "distance", exact, run, 1e-3)
        except RuntimeError:
            continue  # shapes that cannot be compared leave a traceback in the row
        assert not line["agrees"], name
        agreement.compare(line, "gradient", exact, exact.clone, 1e-3)
        assert not line["agrees"], "what was wrong once stays wrong"


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement.reference, "linear", lambda x, packed, bias, spec: torch.zeros(*x.shape[:-1], 32))
    case, line = agreement.cases(setting())[0], {"agrees": True}
    agreement.check(setting(), case, torch.bfloat16, line)
    assert not line["agrees"]


@pytest.mark.parametrize(
    ("status", "text", "state"),
    [(0, "", "clean"), (sanitizer.FOUND, "Invalid read", "errors"), (1, "Traceback", "failed")],
)
def test_what_the_sanitizer_says(status: int, text: str, state: str) -> None:
    findings, asked = Findings(), {}

    def start(command: list[str], **given: Any) -> Any:
        asked.update(command=command, **given)
        return SimpleNamespace(returncode=status, stdout=text, stderr="")

    sanitizer.run(setting(), findings, script.SCRIPT, 7.0, "/bin/tool", start)
    (row,) = findings.rows
    assert row["state"] == state and text in row["report"] and asked["timeout"] == 7.0
    assert asked["command"][0] == "/bin/tool" and asked["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    own = asked["command"][asked["command"].index(str(script.SCRIPT)) + 1 :]
    assert script.options(own).child == "families"


def test_a_sanitizer_that_cannot_run_here_is_absent() -> None:
    findings = Findings()
    said = SimpleNamespace(returncode=1, stdout="========= Error: Device not supported\n", stderr="")
    sanitizer.run(setting(), findings, script.SCRIPT, 7.0, "/bin/tool", lambda *args, **given: said)
    assert findings.rows == [] and findings.data["absent"] == "Error: Device not supported"


# Sizes of tiles.


@pytest.mark.parametrize("kernel", sweep.TABLES)
@pytest.mark.parametrize("rows", sweep.CLASSES)
def test_candidates_are_what_is_launched(kernel: str, rows: int) -> None:
    is_gradient = kernel == sweep.GRADIENT
    run_by = "triton" if is_gradient else kernel
    name = next(name for name, format in weights.FORMATS.items() if format.kernel == run_by)
    tensors, spec = weights.random_packed((256, 1024), weights.FORMATS[name], CPU)
    packed, width = list(tensors.values()), 256 if is_gradient else 1024
    x = weights.random_input(min(rows, 128), width, CPU)

    def run() -> None:
        if is_gradient:
            KERNELS.get(run_by).input_grad(x, packed, spec)
        else:
            KERNELS.get(run_by).run(x, packed, None, spec)

    found = sweep.candidates(kernel, rows)
    assert len(set(found)) == len(found) > 3
    for tile in found:
        with sweep.tiles(kernel, tile, CPU), recording() as launches:
            run()
        launched = next(each.options for each in launches if "BN" in each.options)
        assert (launched["BM"], launched["BN"], launched["num_warps"]) == (tile.bm, tile.bn, tile.warps)
        assert launched["BK"] == min(tile.bk, launched["BK"]) and launched["num_stages"] == tile.stages
    with sweep.tiles(kernel, None, CPU), recording() as launches:
        run()
    assert launches


def test_every_candidate_has_layers_that_are_bound_under_it() -> None:
    """With the kernel in place of that for a CPU."""
    ours = layers.Ours.of((64, 256), weights.FORMATS["int4 g128"], setting())
    xs = [weights.random_input(1, 256, CPU)]
    tried = Tile(16, 16, 32, 32, 2, 2, False), Tile(16, 16, 64, 64, 4, 1, False)
    here = replace(KERNELS.get("triton"), name="here", device="cpu", priority=99)
    with torch.no_grad(), registered(here), recording() as launches:
        for tile in tried:
            sweep.with_tile("triton", tile, CPU, ours.unbound().ready(xs))(0)
    assert [launched.options["BN"] for launched in launches] == [tile.bn for tile in tried]
    assert launches[0].options["codes"].data_ptr() == launches[1].options["codes"].data_ptr()


@pytest.mark.parametrize("make", [peers.scaled_tiles, lambda shape, told: peers.scaled_rows(shape, told, True)])
def test_scaled_mm_takes_what_it_is_given(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and strides of scales, which torch checks without a device, too."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def product(a: torch.Tensor, b: torch.Tensor, scale_a: Any, scale_b: Any, **options: Any) -> None:
        seen.append((a, b, scale_a, scale_b))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", product)
        make((256, 512), setting())([weights.random_input(64, 512, CPU)])(0)
    a, b, scale_a, scale_b = (tensor.to("meta") for tensor in seen[0])
    assert [tensor.stride() for tensor in (a, b, scale_a, scale_b)] == [tensor.stride() for tensor in seen[0]]
    assert torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16).shape == (64, 256)


def test_packages_that_are_not_installed_here_are_called_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins with their signatures."""

    class GemLiteLinear(torch.nn.Linear):
        def __init__(
            self,
            W_nbits: int,
            group_size: int,
            in_features: int,
            out_features: int,
            input_dtype: Any,
            output_dtype: Any,
        ) -> None:
            super().__init__(in_features, out_features, dtype=torch.bfloat16)
            assert (W_nbits, group_size, input_dtype, output_dtype) == (4, 128, "BF16", "BF16")

        def pack(self, W_q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: Any) -> None:
            assert W_q.shape == self.weight.shape and W_q.max() < 16 and zeros.shape == scales.shape
            assert scales.numel() * 128 == W_q.numel()

    def quantize_(model: torch.nn.Module, config: dict[str, Any]) -> None:
        assert config["group_size"] == 128

    gemlite = SimpleNamespace(DType=SimpleNamespace(BF16="BF16"), GemLiteLinear=GemLiteLinear)
    torchao = SimpleNamespace(Int4WeightOnlyConfig=dict, quantize_=quantize_)
    for name, stand_in in {"gemlite.core": gemlite, "torchao.quantization": torchao}.items():
        monkeypatch.setitem(sys.modules, name.partition(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, stand_in)
    for make in (peers.gemlite_int4, peers.torchao_int4):
        call = make((64, 256), setting())([weights.random_input(3, 256, CPU)])
        assert call(0).shape == (3, 64)


def test_every_family_of_kernels_is_swept() -> None:
    assert {*(weights.FORMATS[name].kernel for name in sweep.PRODUCTS), sweep.GRADIENT} == set(sweep.TABLES)
    assert {what for tables in sweep.TABLES.values() for what in tables} <= set(TILES)
    assert all(isinstance(tile, Tile) for tile in sweep.candidates("triton", 16))


# Time.


@given(st.integers(1, 10**10), st.floats(1, 1e10), st.integers(1, 5000))
def test_weights_are_as_many_as_it_takes(size: int, distinct: float, rows: int) -> None:
    count = timing.how_many(size, distinct, rows)
    assert 2 <= count <= timing.MANY
    if rows < timing.COMPUTING:
        assert count * size >= distinct or count == timing.MANY
        assert count == 2 or (count - 1) * size < distinct
    else:
        assert count <= timing.FEW


@given(st.integers(2, 64), st.integers(0, 1000))
def test_neighbours_have_different_weights(count: int, first: int) -> None:
    turn = timing.rotated(list(range(count)))
    assert sorted(turn(first + step) for step in range(count)) == list(range(count))


def test_contenders_that_fail_say_why_and_the_others_run() -> None:
    def fails(number: int) -> None:
        raise ValueError("no such kernel")

    contenders = {"ours": timing.Contender(lambda number: number, 3), "other": timing.Contender(fails, 3)}
    found = timing.race(setting(), contenders, 2)
    assert found["other"] == {"error": "ValueError: no such kernel"} and found["ours"]["seconds"] > 0


def test_a_race_alternates_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    spent = {"a": iter([9.0, 1.0, 2.0, 6.0]), "b": iter([9.0, 8.0, 8.0, 8.0])}

    class Fake(timing.Clock):
        def prepare(self, call: Any, count: int, syncs: bool) -> Any:
            return call, "fake"

        def seconds(self, run: Any) -> float:
            order.append(run(0))
            return next(spent[order[-1]])

    monkeypatch.setattr(timing, "clock_of", lambda told: Fake())
    contenders = {name: timing.Contender(lambda number, name=name: name, 2) for name in "ab"}
    found = timing.race(setting(), contenders, 3)
    assert order == list("abababab"), "the first round does not count"
    assert (found["a"]["seconds"], found["b"]["seconds"]) == (1.0, 4.0) and found["a"]["spread"] == 2.5


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_gpu_calls_become_graphs(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's graphs and events."""
    called: list[int] = []
    inside: list[bool] = []

    @contextmanager
    def graph(held: Any) -> Iterator[None]:
        inside.append(True)
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            called.append(-1)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Any) -> float:
            return 250.0

    stand_ins = {
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: called.append(100)),
        "graph": graph,
        "Event": Event,
        "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 7,
        "reset_peak_memory_stats": lambda: called.append(200),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock = timing.clock_of(setting(device=GPU))
    run, how = clock.prepare(called.append, 3, False)
    assert inside == [True] and called == [0, 1, 2, 0, 1, 2], "once to warm up, once for the graph"
    called.clear()
    assert clock.seconds(run) == 0.25
    assert called == ([-1, 0, 1, 2, -1] if fails else [-1, 100, -1])
    assert how == "graph" if not fails else "not permitted" in how
    assert clock.prepare(called.append, 1, True)[1] == "loop" and inside == [True]
    called.clear()
    assert (clock.memory(), clock.peak_memory(lambda: called.append(0)), called) == (5, 7, [200, 0])


def test_when_time_is_up_the_rest_is_counted() -> None:
    findings = Findings()
    assert list(setting(seconds=-1).while_time(findings, "cases", range(5))) == []
    assert list(setting().while_time(findings, "others", range(5))) == list(range(5))
    assert findings.data["left_out"] == {"cases": 5}


@given(st.lists(st.floats(0, 1.2), min_size=10, max_size=10), st.floats(60, 2000))
def test_the_time_of_all_jobs_is_kept(used: list[float], total: float) -> None:
    """However long each group takes, up to a little more than it may."""
    groups, left = jobs.chosen([]), total
    for number, share in zip(range(len(groups)), used, strict=False):
        told = jobs.allowed(groups[number:], left)
        assert 0 <= told <= left
        left -= min(share * told, told + jobs.GRACE, left)
    assert left >= 0
    assert all(jobs.allowed(groups[number:], jobs.TOTAL) > 10 for number in range(len(groups)))


def test_jobs_that_are_asked_for() -> None:
    flat = [job for group in jobs.chosen([]) for job in group]
    assert sorted(job.name for job in flat) == sorted(job.name for job in jobs.JOBS)
    assert len({job.name for job in flat}) == len(flat)
    sweeping = [job.name for group in jobs.chosen(["sweep"]) for job in group]
    assert sweeping[0] == "machine" and sweeping[-1] == "sweep" and sum("compile" in name for name in sweeping) == 6
    shares = [jobs.share_of(job.argument) for job in flat if job.compiles and job.part == "sweep"]
    parts = [Setting(CPU, SIZES["full"], 0, True, share).share_of(sweep.plan()) for share in shares]
    assert sorted(each for part in parts for each in part) == sorted(sweep.plan())


# Processes.

PROGRAM = """
import json, subprocess, sys, time
path, what = sys.argv[1:]
open(path, "w").write(json.dumps({"state": "done" if what == "good" else "running", "rows": [1]}))
if what == "crash":
    left = subprocess.Popen(["sleep", "60"])
    open(path + ".pid", "w").write(str(left.pid))
    sys.exit("illegal memory access")
time.sleep(60 if what == "hang" else 0)
"""


def test_a_crash_and_a_hanging_job_cost_only_themselves(tmp_path: Path) -> None:
    told: dict[str, dict[str, Any]] = {}

    def command(job: Any, seconds: float) -> list[str]:
        return [sys.executable, "-S", "-c", PROGRAM, str(jobs.path_of(job, tmp_path)), job.part]

    started = time.monotonic()
    found = [
        children.start(job, command(job, 0), tmp_path, started + 1.5)
        for job in (jobs.Job(what, 1, jobs.ALONE) for what in ("good", "crash", "hang"))
    ]
    children.watch(found, lambda name, data: told.update({name: data}))
    assert time.monotonic() - started < 30 and all(child.process.returncode is not None for child in found)
    assert told["good"] == {"state": "done", "rows": [1]}
    assert told["crash"]["state"] == "failed" and "illegal memory access" in told["crash"]["error"]
    left = (tmp_path / "crash.json.pid").read_text()
    state = Path(f"/proc/{left}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z", "it was ended, too"
    assert told["hang"]["state"] == "out of time" and told["hang"]["rows"] == [1]


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    children.run_all(jobs.chosen([]), pytest.fail, tmp_path, 0.0, lambda name, data: told.update({name: data["state"]}))
    assert told == {job.name: "out of time" for job in jobs.JOBS}


def test_findings_are_on_the_disk_with_every_row(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "found.json")

    def work() -> None:
        for number in range(3):
            with findings.row(number=number) as line:
                line["half"] = 1 / (number - 1)
            assert len(json.loads(findings.path.read_text())["rows"]) == number + 1
        raise OSError("the device is gone")

    findings.guard(work)
    data = json.loads(findings.path.read_text())
    assert data["state"] == "failed" and "the device is gone" in data["error"]
    assert ["ZeroDivisionError" in row.get("error", "") for row in data["rows"]] == [False, True, False]
    assert list(tmp_path.iterdir()) == [findings.path]


# Bars.

SHARE = "agreement float16, 2 of 4"


def full_result(seconds: float = 1e-5, slow: float = 1e-4) -> dict[str, Any]:
    """What a whole check would find, if every other layer took `slow`."""
    told = setting("full", GPU)
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": 8e14}
    rows = []
    for shape, name in layers.plan(told):
        for m in layers.rows_of(name, told):
            names = ["bf16", *layers.PEERS.get(name, {})]
            runs = {"ours": {"seconds": seconds, "how": "graph"}} | {other: {"seconds": slow} for other in names}
            line = {"format": name, "shape": shape, "rows": m, "kernel": "triton", "runs": runs, "missing": {}}
            rows.append(line | layers.derived(line, 2**30, ceilings) | {"agrees": True})
    parts = {"layers": {"rows": rows}}
    checked = {"name": "int4", "kernel": "triton", "dtype": "bfloat16", "agrees": True}
    parts |= {job.name: {"rows": [checked]} for job in jobs.JOBS if job.part == "agreement"}
    parts |= {"operators": {"rows": [{"operator": "linear", "result": {}}]}}
    parts |= {"sanitizer": {"rows": [{"tool": "memcheck", "state": "clean"}]}}
    model = {"kernel": "triton", "how": "graph", "bytes": 1e9, "same_text": True}
    written = {"bf16": slow, "int4 g128": seconds}
    parts |= {"decode": {"rows": [{"model": name, "decode": took, **model} for name, took in written.items()]}}
    trained = {"bitsandbytes nf4": slow, "nf4 g64": seconds}
    parts |= {"qlora": {"rows": [{"model": name, "seconds": took, **model} for name, took in trained.items()]}}
    for found in parts.values():
        found |= {"state": "done", "seconds": 1.0}
    return {"parts": parts, "versions": {"torch": "2"}, "size": "full", "seconds": 1.0, "asked": []}


def test_every_bar_is_measured_by_what_is_planned() -> None:
    met, missed = bars.judged(full_result()), bars.judged(full_result(slow=1e-8))
    assert [line["state"] for line in met] == ["met"] * len(bars.BARS) and bars.holds(met)
    slow = {line["name"] for line in missed if line["state"] == "missed"}
    assert slow == {bar.name for bar in bars.BARS if "times" in bar.name} and not bars.holds(missed)
    assert all("% of copy" in line["said"] for line in met if line["part"] == "layers")


def test_nothing_measured_is_not_met() -> None:
    empty = {"parts": {}, "versions": {}, "size": "full", "seconds": 0.0, "asked": []}
    assert {line["state"] for line in bars.judged(empty)} == {"not measured"} and not bars.holds(bars.judged(empty))
    assert not bars.holds([])
    assert "| not measured |" in table.markdown(empty)
    asked = bars.judged({**full_result(), "asked": ["qlora"]})
    assert [line["part"] for line in asked] == ["qlora"] and bars.holds(asked)


@pytest.mark.parametrize("bar", [bar for bar in bars.BARS if bar.part == "layers"], ids=lambda bar: bar.name)
def test_the_worst_shape_counts_and_a_hole_is_no_result(bar: Any) -> None:
    before, counts = bar.of(full_result()), set()
    mine = [row for row in full_result()["parts"]["layers"]["rows"] if row["format"] == bar.format]
    for place in range(len(mine)):

        def changed(change: Any) -> tuple[dict[str, Any], Any]:
            result = full_result()
            rows = result["parts"]["layers"]["rows"]
            change(rows, [row for row in rows if row["format"] == bar.format][place])  # noqa: B023
            return result, bar.of(result)

        def slow(rows: Any, row: Any) -> None:
            row["times"] = {name: value / 1000 for name, value in row["times"].items()}
            row["of_copy"] /= 1000

        if changed(slow)[1] == before:
            continue  # another number of rows
        counts.add(mine[place]["shape"])
        assert changed(slow)[1][0] < before[0] / 100
        assert changed(lambda rows, row: rows.remove(row))[1] is None
        result, found = changed(lambda rows, row: row.update(error="Traceback\nRuntimeError: out of memory"))
        line = next(line for line in bars.judged(result) if line["name"] == bar.name)
        assert found is None and "out of memory" in line["said"] and line["state"] == "not measured"
    assert counts == set(SIZES["full"].shapes)


def test_wrong_results_are_not_fast() -> None:
    result = full_result()
    row = next(row for row in result["parts"]["layers"]["rows"] if (row["format"], row["rows"]) == ("nf4 g64", 1))
    row["agrees"] = False
    line = next(line for line in bars.judged(result) if line["name"] == "NF4, times bitsandbytes, 1 row")
    assert (line["state"], line["value"]) == ("missed", 0) and "results are wrong" in line["said"]
    assert "(wrong)" in table.markdown(result)


def test_a_check_that_did_not_come_to_its_end_proves_nothing() -> None:
    name = "results agree with the reference"

    def state(result: dict[str, Any]) -> str:
        return next(line["state"] for line in bars.judged(result) if line["name"] == name)

    for change in ({"state": "out of time"}, {"left_out": {"cases": 3}}):
        result = full_result()
        result["parts"][SHARE] |= change
        assert state(result) == "not measured"
    result = full_result()
    del result["parts"][SHARE]
    assert state(result) == "not measured"
    result = full_result()
    result["parts"][SHARE] |= {"state": "out of time", "rows": [{"name": "nf4", "agrees": False}]}
    assert state(result) == "missed"


def test_shares_follow_from_seconds() -> None:
    line = {"shape": (10, 20), "rows": 3, "runs": {"ours": {"seconds": 0.5}, "bf16": {"seconds": 2.0}}}
    found = layers.derived(line, 1000, {"bytes_per_second": 4720.0, "flops_per_second": 4800.0})
    assert found["bytes_per_second"] == (1000 + 2 * 3 * 30) / 0.5 and found["flops_per_second"] == 2 * 3 * 10 * 20 / 0.5
    assert found["times"] == {"bf16": 4.0} and (found["of_copy"], found["of_product"]) == (0.5, 0.5)


def test_the_page_tells_what_went_wrong() -> None:
    result = full_result()
    result["parts"]["decode"]["rows"][0] = {"model": "bf16", "error": "Traceback\nRuntimeError: out | of memory"}
    result["parts"]["sweep"] = {"state": "out of time", "seconds": 70.0, "rows": []}
    page = table.markdown(result)
    assert "- decode: bf16: RuntimeError: out / of memory" in page and "- sweep: out of time after 70 s" in page
