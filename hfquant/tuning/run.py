"""A recipe, carried out: each part is finished and noted before the next one starts."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from .. import processes
from ..api import coverage
from ..calibration_state import Tick
from ..config import HfQuantConfig
from ..data import kind_of
from ..hub import push_folder
from ..report import REPORT_NAME as QUANTIZED
from ..report import peak_rss_mb, sizes, versions
from ..source import copy_companions, load_model
from ..staging import partial_folder, put_in_place
from . import sharded
from .attach import attach, size_of, start
from .base import BASE, config_of, load_base, quantized, report_in
from .exits import merge, merge_pooled, replace_base, save_adapter
from .report import CURVE_NAME, TuningReport, draw, write_card
from .request import Plan, Request, plan
from .rows import Rows, read_rows
from .stages import Stage, Stages
from .state import State
from .through import quantize_trained, train_through
from .training import train

# Where each part begins and ends in the share of the work that is reported.
_SHARES = {"original": (0.0, 0.05), "quantize": (0.05, 0.3), "train": (0.3, 0.9), "exit": (0.9, 1.0)}


def run(request: Request, tick: Tick) -> TuningReport:
    """Carry out a request. Raises like `hfquant.finetune`."""
    chosen = plan(request)
    folder = partial_folder(chosen.out)
    state = State(folder, _same(request, chosen), request.resume)
    try:
        with sharded.settled():
            return _carry_out(Work(chosen, state, tick), chosen, folder)
    finally:
        state.close()


def _carry_out(work: Work, chosen: Plan, folder: Path) -> TuningReport:
    """All parts, and the output in its place."""
    report = work.run()
    processes.barrier()  # others may still read what is moved now
    if processes.rank() == 0:
        finished = work.assemble()
        report = _illustrated(report, finished)
        write_card(report, finished)
        report.write(finished)
        copy_companions(chosen.model, finished)
        put_in_place(finished, chosen.out)
        shutil.rmtree(folder, ignore_errors=True)
        if chosen.push is not None:
            report = replace(report, pushed=push_folder(chosen.out, chosen.push.repository, chosen.push.private))
    processes.barrier()
    return report


def _illustrated(report: TuningReport, folder: Path) -> TuningReport:
    """The report of a training with its picture, or with a note that there is none."""
    if not report.losses:
        return report
    if draw(report.losses, report.stages, folder / CURVE_NAME):
        return replace(report, curve=CURVE_NAME)
    note = 'the loss curve was not drawn, matplotlib is not installed: pip install "hfquant[plot]"'
    return replace(report, notes=(*report.notes, note))


def _same(request: Request, chosen: Plan) -> dict[str, Any]:
    """What an unfinished run must share to be gone on with."""
    return {
        "recipe": chosen.recipe.label["sha256"],
        "model": str(request.model),
        "data": None if chosen.text is None else chosen.text.describe(),
        "eval_data": None if chosen.evaluate is None else chosen.evaluate.data,
        "changes": chosen.changes,
        "processes": processes.world(),
        "sharding": sharded.is_sharded(),
    }


class Work:
    """The parts of a recipe in their order; each leaves a folder and a note."""

    def __init__(self, chosen: Plan, state: State, tick: Tick) -> None:
        self.plan, self.state, self._tick = chosen, state, tick
        self.base, self.adapter, self.merged = (state.folder / name for name in (BASE, "adapter", "merged"))
        self.seconds: dict[str, float] = dict(state.notes.get("seconds", {}))

    def run(self) -> TuningReport:
        """Everything."""
        work = self.plan.workflow
        with self._part("original"):
            rows, stages = self._look()
        config = None if self.plan.config is None else config_of(self.plan, rows)
        if config is not None and work.qat is not None:
            self._train_through(config, rows, stages)
        elif config is not None:
            self._quantize(config)
        model = load_base(self.plan.model if config is None else self.base, self.plan)
        if config is not None:
            self._measure(stages, "trained" if work.qat is not None else "quantized", model)
        if work.lora is not None:
            self._tune(model, rows, stages)
        del model
        gc.collect()
        if config is not None and work.exit in ("merge", "exact"):
            self._merge(config, stages)
        return self._report(stages)

    def assemble(self) -> Path:
        """The folder that is going to be the output."""
        if self.merged.exists():
            return self.merged
        if not self.adapter.exists():
            return self.base
        if self.base.exists():
            shutil.rmtree(self.adapter / BASE, ignore_errors=True)  # of a run that was killed in the next line
            self.base.rename(self.adapter / BASE)
        return self.adapter

    @contextmanager
    def _part(self, name: str) -> Iterator[Tick]:
        """Time a part and place its progress in that of the whole."""
        began, (low, high) = time.perf_counter(), _SHARES[name]
        self._tick(name, low)
        yield lambda what, share: self._tick(what, low + (high - low) * share)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.state.note("seconds", self.seconds)

    def _look(self) -> tuple[Rows, Stages]:
        """The samples, and the original model measured; it also writes the text if the data is "self"."""
        writes = self.plan.text is not None and kind_of(self.plan.text.data) == "self"
        rows = None if writes else read_rows(self.plan)
        original = load_base(self.plan.model, self.plan) if writes or self.plan.evaluate is not None else None
        rows = rows or read_rows(self.plan, original)
        self.state.expect("training data", rows.sha256)
        stages = Stages(
            rows.measure, rows.counted, [Stage.from_dict(stage) for stage in self.state.notes.get("stages", [])]
        )
        if original is not None:
            stages.start(original)
        return rows, stages

    def _measure(self, stages: Stages, name: str, model: Any) -> None:
        stages.measure(name, model)
        self.state.note("stages", [stage.to_dict() for stage in stages.found])

    def _quantize(self, config: HfQuantConfig) -> None:
        with self._part("quantize") as tick:
            self.state.note("quantization", quantized(self.plan.model, self.plan, config, self.base, tick))

    def _train_through(self, config: HfQuantConfig, rows: Rows, stages: Stages) -> None:
        """All weights are trained through quantization, and then quantized."""
        if stages.batches:
            untrained = load_model(self.plan.model, quantization_config=config.copy(), dtype="float32")
            self._measure(stages, "quantized", untrained)
        trained = self.state.folder / "trained"
        with self._part("train") as tick:
            if "training" not in self.state.notes:
                self._note_trainer()
                training, losses = train_through(self.plan, config, rows, trained, tick)
                self._note_training(rows, training, losses)
        with self._part("exit"):
            if "quantization" not in self.state.notes:
                self.state.note("quantization", quantize_trained(trained, self.plan, config, self.base))

    def _note_trainer(self) -> None:
        """A run that goes on may find another trainer installed, or another version of it."""
        known, now = self.state.notes.get("trainers", []), str(self.plan.trainer)
        if now not in known:
            self.state.note("trainers", [*known, now])

    def _note_training(self, rows: Rows, training: dict[str, Any], losses: list[dict[str, float]]) -> None:
        self.state.note("losses", losses)
        trainers = ", then ".join(self.state.notes["trainers"])
        self.state.note("training", {"trainer": trainers} | training | {"sha256": rows.sha256})

    def _tune(self, model: Any, rows: Rows, stages: Stages) -> None:
        """Attach adapters, train them, save them."""
        with self._part("train") as tick:
            if "adapter" in self.state.notes:
                return
            adapted = self._adapters(model, rows, stages, tick)
            facts = size_of(adapted)
            if self.plan.train is not None:
                self._note_trainer()
                training, losses = train(adapted, rows, self.plan, self.state.folder / "trainer", tick)
                self._note_training(rows, training, losses)
                self._measure(stages, "trained", adapted)
            place = self.plan.model if self.plan.config is None else self.plan.out.absolute() / BASE
            save_adapter(adapted, self.adapter, place)
            self.state.note("adapter", facts)

    def _adapters(self, model: Any, rows: Rows, stages: Stages, tick: Tick) -> PeftModel:
        """New adapters, started as the recipe says; they are kept, as the base may be quantized again around them."""
        lora, initial = self.plan.workflow.lora, self.state.folder / "initial"
        if "initialized" in self.state.notes:
            return PeftModel.from_pretrained(model, str(initial), is_trainable=True)
        adapted = attach(model, self.plan)
        if lora is None or lora.init == "default":
            return adapted
        found = start(adapted, self.plan, rows, tick)
        if processes.rank() == 0 and any(layer.requantized for layer in found):
            replace_base(adapted, self.base)
        save_adapter(adapted, initial, self.base)
        self.state.note("initialized", [layer.to_dict() for layer in found])
        self._measure(stages, "initialized", adapted)
        return adapted

    def _merge(self, config: HfQuantConfig, stages: Stages) -> None:
        """Adapters become part of the quantized weights."""
        with self._part("exit") as tick:
            if self.plan.workflow.exit == "exact":
                merge_pooled(self.base, self.adapter, self.plan, self.merged)
            else:
                merge(self.base, self.adapter, self.plan, config, self.merged, tick)
            model = load_base(self.merged, self.plan)
            self._measure(stages, "merged", model)
        again = self.merged / QUANTIZED  # there where the method was run again
        report = report_in(self.merged) if again.exists() else self.state.notes["quantization"]
        found = sizes(model, coverage(model))  # real-valued zero points take more bits
        self.state.note("quantization", report | {name: found[name] for name in ("bits_per_weight", "mb_after")})

    def _report(self, stages: Stages) -> TuningReport:
        notes, trainer = self.state.notes, self.plan.trainer
        reason = None if trainer is None else trainer.because
        return TuningReport(
            recipe=self.plan.recipe.label,
            model=self.plan.model,
            output=str(self.plan.out),
            changes=self.plan.changes,
            exit=self.plan.workflow.exit or ("adapter" if "adapter" in notes else None),
            quantization=notes.get("quantization"),
            adapter=notes.get("adapter"),
            training=notes.get("training"),
            initialized=tuple(notes.get("initialized", ())),
            losses=tuple(notes.get("losses", ())),
            stages=tuple(stages.found),
            notes=() if reason is None else (f"TRL's SFTTrainer did not train: {reason}",),
            seconds=self.seconds,
            peak_rss_mb=peak_rss_mb(),
            versions=versions(self.plan.config.plugins if self.plan.config is not None else None),
        )
