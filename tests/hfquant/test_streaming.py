"""Quantization from folder to folder: the result of a loaded model, whatever interrupts it on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import hfquant
from hfquant import FormatError, HfQuantConfig, SpecError, WeightError
from hfquant.calibration_state import Settings
from hfquant.journal import JOURNAL_NAME, LOCK_NAME, Journal
from hfquant.report import REPORT_NAME
from hfquant.source import model_class
from hfquant.staging import partial_folder
from hfquant.swap import packed_modules
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests import fresh

RUN = """
import os, signal, sys
import torch
import hfquant
from pathlib import Path

source, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ids = torch.randint(3, 256, (4, 13), generator=torch.Generator().manual_seed(0))

def tick(what, share):
    if stop and f"{what} {share:.2f}".startswith(stop):
        os.kill(os.getpid(), signal.SIGKILL)

config = hfquant.HfQuantConfig("gptq", group_size=32, data=ids, batch_size=2, modules_to_not_convert=[])
hfquant.quantize(source, config, out, tick=tick)
"""


def tokens() -> torch.Tensor:
    return torch.randint(3, 256, (4, 13), generator=torch.Generator().manual_seed(0))


def config(**options: Any) -> HfQuantConfig:
    given = {"group_size": 32, "data": tokens(), "batch_size": 2, "modules_to_not_convert": []}
    return HfQuantConfig("gptq", **given | options)


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    tiny_model(kind, dtype=dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "source")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a result but the report, which says when it was made and how long it took."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != REPORT_NAME}


def journal_of(out: Path) -> list[dict[str, Any]]:
    lines = (partial_folder(out) / JOURNAL_NAME).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without an interruption gives, in the folder "out" beside its source."""
    root = tmp_path_factory.mktemp("whole")
    hfquant.quantize(saved("llama", root / "source"), config(), root / "out")
    return root / "out"


def load(folder: Path, **options: Any) -> Any:
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options)


# The result.


@pytest.mark.parametrize("options", [{"modules_to_not_convert": None}, {"embeddings": True}], ids=["default", "all"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "bert", "vit"])
def test_the_result_reloads_to_what_loading_quantizes_to(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "source", max_shard_size="60KB")
    inputs = tiny_inputs(tiny_model(kind, dtype=torch.bfloat16))
    data = [{name: value for name, value in inputs.items() if name != "attention_mask"}]
    made = config(data=data, **options)
    direct = load(source, quantization_config=made)
    report = hfquant.quantize(source, made, tmp_path / "out")
    again = load(tmp_path / "out")
    ours, theirs = again.state_dict(), direct.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, direct(**inputs).logits)
    assert report.coverage == direct.hf_quantizer.coverage
    assert {name for name, _ in packed_modules(again)} == {name for name, _ in packed_modules(direct)}


def test_the_folder_is_complete_and_described(whole: Path) -> None:
    files = {file.name for file in whole.iterdir()}
    shards = {f"hfquant-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    assert files == {*shards, "hfquant.safetensors.index.json", "config.json", "generation_config.json", REPORT_NAME}
    index = json.loads((whole / "hfquant.safetensors.index.json").read_text())
    held = {name: file for file in shards for name in load_file(whole / file)}
    assert index["weight_map"] == held
    sizes = [value.nbytes for file in shards for value in load_file(whole / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    report = json.loads((whole / REPORT_NAME).read_text())
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1", ""]
    assert report["mb_after"] == pytest.approx(sum(sizes) / 1e6)
    assert report["calibration"]["samples"] == 4 and report["calibration"]["tokens"] == 52
    assert not partial_folder(whole).exists()


def test_only_one_block_is_in_memory_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full precision: what holds values between two steps is one block, or what is around the blocks."""
    held: list[set[str]] = []
    original = hfquant.streaming.Shards.load

    def watched(self: Any, name: str) -> None:
        original(self, name)
        names = [key for key, value in self.model.named_parameters() if not value.is_meta]
        held.append({".".join(key.split(".")[:3]) if ".layers." in key else "outside" for key in names})

    monkeypatch.setattr(hfquant.streaming.Shards, "load", watched)
    hfquant.quantize(source, config(), tmp_path / "out")
    start = [{"outside"}, {"outside", "model.layers.0"}]  # to find out how the blocks are called
    assert held == [*start, {"model.layers.0"}, {"model.layers.1"}, {"outside"}]


def test_a_method_without_data_is_no_different(source: Path, tmp_path: Path) -> None:
    """Through the journal by hand: what needs no data does not go that way by itself."""
    from hfquant.streaming import quantize_streamed

    plain = HfQuantConfig("int4", block_size=48, embeddings=True)
    direct = load(source, quantization_config=plain)
    quantize_streamed(source, plain.copy(), AutoConfig.from_pretrained(source), tmp_path / "out", torch.bfloat16)
    again, held = load(tmp_path / "out").state_dict(), direct.state_dict()
    assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)


def test_hidden_states_on_the_disk_give_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    hfquant.quantize(source, config(), tmp_path / "out", settings=Settings(offload=tmp_path / "states"))
    assert contents(tmp_path / "out") == contents(whole)


# Interruptions.


KILLED = {"model.layers.0 0.1": 0, "model.layers.1 0.5": 1, "the rest": 2}
"""Where a run is killed -> the number of parts that are finished then."""


@pytest.mark.parametrize("stop", KILLED)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    stop: str, whole: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = fresh.run(RUN, source, out, stop)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    before = journal_of(out)[1:]
    done = ["model.layers.0", "model.layers.1"][: KILLED[stop]]
    assert [line["name"] for line in before] == done
    worked: list[str] = []
    report = hfquant.quantize(source, config(), out, tick=lambda what, share: worked.append(what))
    assert contents(out) == contents(whole)
    assert [worked.count(name) for name in done] == [1] * len(done)  # no layer of them was quantized again
    assert [block.to_dict() for block in report.blocks[: len(done)]] == [line["finding"] for line in before]


class Interrupt(Exception):
    pass


def interrupted(source: Path, out: Path, at: str = "model.layers.1", **options: Any) -> None:
    """A run that ends in the middle of a block."""

    def tick(what: str, share: float) -> None:
        if what == at:
            raise Interrupt

    with pytest.raises(Interrupt):
        hfquant.quantize(source, config(**options), out, tick=tick)


@pytest.mark.parametrize("transform", ["awq", "rotate", "smoothquant"])
def test_a_run_with_a_transform_goes_on_to_the_same_bytes(transform: str, source: Path, tmp_path: Path) -> None:
    made = {"transform": transform, "modules_to_not_convert": None}
    hfquant.quantize(source, config(**made), tmp_path / "whole")
    interrupted(source, tmp_path / "out", **made)
    hfquant.quantize(source, config(**made), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_same_process_can_go_on(source: Path, whole: Path, tmp_path: Path) -> None:
    """The lock does not outlive the run, even while somebody still looks at the error."""
    out = tmp_path / "out"
    try:
        hfquant.quantize(source, config(), out, tick=lambda what, share: 1 / 0 if what == "model.layers.1" else None)
    except ZeroDivisionError as error:
        kept = error
        hfquant.quantize(source, config(), out)
    assert kept.__traceback__ is not None
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("torn", ['{"name": "model.layers.1", "sha', '{"name": "model.layers.1"}'])
def test_a_line_that_was_not_written_to_its_end_does_not_count(
    torn: str, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    with open(partial_folder(out) / JOURNAL_NAME, "a") as file:
        file.write(torn)
    hfquant.quantize(source, config(), out)
    assert contents(out) == contents(whole)


def test_a_part_that_was_not_written_to_its_end_does_not_count(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    (partial_folder(out) / "hfquant-00002-of-00003.safetensors.tmp").write_bytes(b"torn")
    (partial_folder(out) / "hfquant-00003-of-00003.safetensors").write_bytes(b"without a line in the journal")
    hfquant.quantize(source, config(), out)
    assert contents(out) == contents(whole)


def test_what_another_run_left_without_a_journal_is_removed(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial_folder(out).mkdir()
    (partial_folder(out) / "hfquant-00009-of-00009.safetensors").write_bytes(b"of a larger model")
    hfquant.quantize(source, config(), out)
    assert contents(out) == contents(whole)


def test_a_damaged_part_is_reported(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    shard = partial_folder(out) / "hfquant-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"hfquant-00001-of-00003.*resume=False"):
        hfquant.quantize(source, config(), out)


def test_the_output_is_left_alone_until_the_end(source: Path, whole: Path, tmp_path: Path) -> None:
    out = saved("gpt2", tmp_path / "out")
    before = contents(out)

    def tick(what: str, share: float) -> None:
        assert contents(out) == before

    with pytest.raises(SpecError, match=r"not empty.*overwrite=True"):
        hfquant.quantize(source, config(), out)
    hfquant.quantize(source, config(), out, overwrite=True, tick=tick)
    assert contents(out) == contents(whole)


# Full disks.


def full_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the disk be full after some shards, as safetensors says it and as the system says it."""
    written: list[str] = []

    def failing(tensors: Any, file: Path, header: Any) -> None:
        written.append(str(file))
        if len(written) > count:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, header)

    monkeypatch.setattr("hfquant.journal.save_file", failing)


def test_a_full_disk_is_reported_and_what_is_finished_is_kept(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_after(patch, 1)
        with pytest.raises(
            OSError, match=r"disk is full while writing hfquant-00002.*same command.* 1 finished"
        ) as raised:
            hfquant.quantize(source, config(), out)
    assert raised.value.errno == errno.ENOSPC
    files = {file.name for file in partial_folder(out).iterdir()}
    assert files == {JOURNAL_NAME, LOCK_NAME, "hfquant-00001-of-00003.safetensors"}
    worked: list[str] = []
    hfquant.quantize(source, config(), out, tick=lambda what, share: worked.append(what))
    assert worked.count("model.layers.0") == 1
    assert contents(out) == contents(whole)


LIMITED = """
import resource, signal, sys
import hfquant, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # less than the embeddings
ids = torch.randint(3, 256, (4, 13), generator=torch.Generator().manual_seed(0))
config = hfquant.HfQuantConfig("gptq", group_size=32, data=ids, batch_size=2, modules_to_not_convert=[])
hfquant.quantize(Path(sys.argv[1]), config, Path(sys.argv[2]))
"""


def test_a_file_that_the_system_refuses_ends_the_run_and_leaves_no_half_of_it(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = fresh.run(LIMITED, source, out)
    assert ended.returncode == 1 and "too large" in ended.stderr.lower()
    assert not out.exists()
    finished = {line["shard"] for line in journal_of(out)[1:]}
    assert {file.name for file in partial_folder(out).iterdir()} == {JOURNAL_NAME, LOCK_NAME, *finished}
    hfquant.quantize(source, config(), out)
    assert contents(out) == contents(whole)


# Going on with something else.


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 64}, "recipe"),
        ({"seed": 1}, "calibration"),
        ({"data": tokens()[:3]}, "calibration"),
        ({"embeddings": True}, "embeddings"),
        ({"modules_to_not_convert": None}, "modules_to_not_convert"),
    ],
)
def test_another_request_does_not_go_on_with_an_interrupted_run(
    change: dict[str, Any], named: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    before = contents(partial_folder(out))
    with pytest.raises(SpecError, match=rf"interrupted run of something else \((\w+: .*; )?{named}: .*resume=False"):
        hfquant.quantize(source, config(**change), out)
    assert contents(partial_folder(out)) == before


def test_another_source_does_not_go_on_with_an_interrupted_run(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    with pytest.raises(SpecError, match=r"something else .*source: .*model\.safetensors"):
        hfquant.quantize(saved("mixtral", tmp_path / "other"), config(), tmp_path / "out")


def test_another_training_of_the_same_model_does_not_go_on(tmp_path: Path) -> None:
    """Its files have the names and sizes of those before."""
    source = saved("llama", tmp_path / "source")
    interrupted(source, tmp_path / "out")
    (file,) = source.glob("*.safetensors")
    size = file.stat().st_size
    tiny_model("llama", seed=1, dtype=torch.bfloat16).save_pretrained(source)
    assert file.stat().st_size == size
    with pytest.raises(SpecError, match=r"something else .*source: .*model\.safetensors"):
        hfquant.quantize(source, config(), tmp_path / "out")


def test_starting_over_does_not_go_on(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(source, out, group_size=64)
    worked: list[str] = []
    hfquant.quantize(source, config(), out, resume=False, tick=lambda what, share: worked.append(what))
    assert worked.count("model.layers.0") > 1
    assert contents(out) == contents(whole)


HOLD = """
import os, sys, time
from pathlib import Path
from hfquant.journal import Journal
journal = Journal(Path(sys.argv[1]), {"run": 1}, True)
Path(sys.argv[2] + ".part").write_text(str(os.getpid()))
os.rename(sys.argv[2] + ".part", sys.argv[2])
time.sleep(300)
"""


def test_two_processes_do_not_write_to_one_folder(source: Path, tmp_path: Path) -> None:
    folder = partial_folder(tmp_path / "out")
    held = tmp_path / "held"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fresh.run, HOLD, folder, held)
        while not held.exists() and not other.done():
            time.sleep(0.01)
        assert held.exists(), other.result().stderr
        try:
            with pytest.raises(SpecError, match="another process is writing to"):
                hfquant.quantize(source, config(), tmp_path / "out")
        finally:
            os.kill(int(held.read_text()), signal.SIGKILL)
        assert other.result().returncode == -signal.SIGKILL
    with pytest.raises(SpecError, match="something else"):  # the lock is gone with the process
        hfquant.quantize(source, config(), tmp_path / "out")


def test_a_refused_journal_is_not_locked(tmp_path: Path) -> None:
    Journal(tmp_path, {"run": 1}, True).close()
    with pytest.raises(SpecError) as kept:
        Journal(tmp_path, {"run": 2}, True)
    Journal(tmp_path, {"run": 1}, True).close()
    assert "run: 1 then, 2 now" in str(kept.value)


# Sources that cannot be quantized.


def edited(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_a_source_without_a_weight_raises_and_names_it(source: Path, tmp_path: Path) -> None:
    edited(source, lambda tensors: tensors.pop("model.layers.1.mlp.gate_proj.weight"))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        hfquant.quantize(source, config(), tmp_path / "out")


def test_a_weight_of_another_shape_raises_and_names_it(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    edited(source, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.gate_proj.*\(175, 64\).*\(176, 64\)"):
        hfquant.quantize(source, config(), tmp_path / "out")


def test_weights_that_are_not_finite_raise_with_their_name(source: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 3] = torch.nan

    edited(source, spoil)
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn\.v_proj"):
        hfquant.quantize(source, config(), tmp_path / "out")
    assert [line["name"] for line in journal_of(tmp_path / "out")[1:]] == ["model.layers.0"]


def test_a_source_without_safetensors_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "model.bin")
    with pytest.raises(SpecError, match="no safetensors files"):
        hfquant.quantize(source, config(), tmp_path / "out")
