"""Calibrated quantization from folder to folder: one block is read, quantized, written and forgotten at a time."""

from __future__ import annotations

import atexit
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers.utils import logging

from . import processes
from .backend import load_all
from .calibrate import OUTSIDE, Batch, Calibration, Settings, Tick
from .checkpoint import INDEX_NAME, METHOD_KEY
from .config import RECORDED, HfQuantConfig
from .coverage import Coverage, Target, survey
from .data import batches as batches_of
from .data import kind_of, stand_in, tokenizer_for
from .errors import SpecError, UnsupportedError
from .findings import BlockFinding
from .journal import Journal
from .pages import return_what_is_freed
from .quantize import needs
from .report import sizes, versions
from .source import load_model
from .stats import FISHER
from .swap import packed_modules, swap_in, swap_in_operands
from .weights import Weights, local_files, skeleton

logger = logging.get_logger(__name__)


class Shards:
    """The store of a streamed run: blocks come from a checkpoint and go to the shards of a journal."""

    keeps = False

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        folder: Path,
        journal: Journal | None,
        config: HfQuantConfig,
        targets: list[Target],
    ) -> None:
        self.model, self.weights, self.journal, self.config = model, weights, journal, config
        self.folder, self.targets = folder, targets
        # All processes have to agree on what is finished; only the first one has the journal.
        self.records = processes.of_first(None if journal is None else dict(journal.records))
        self.names: list[str] = []  # of the blocks, set when the chain is known

    def load(self, name: str) -> None:
        """Read the original weights of a block."""
        self.weights.load(lambda parameter: self._belongs(parameter, name))

    def finished(self, name: str) -> BlockFinding | None:
        """Read what an earlier run wrote for a block."""
        record = self.records.get(name)
        if record is None:
            return None
        for key in RECORDED:
            _restore(getattr(self.config, key, None), record.get(key))
        mine = [target for target in self.targets if self._belongs(f"{target.name}.weight", name)]
        swap_in(self.model, mine, self.config.recipe, self.config)
        swap_in_operands(self.model, self.config.attention, f"{name}.")
        if name != OUTSIDE:
            _fill(self.model, self.folder / record["shard"])
        return BlockFinding.from_dict(record["finding"])

    def finish(self, name: str, finding: BlockFinding) -> None:
        """Write a quantized block and note it."""
        if self.journal is not None:
            number = len(self.names) if name == OUTSIDE else self.names.index(name)
            shard = f"hfquant-{number + 1:05d}-of-{len(self.names) + 1:05d}.safetensors"
            state = self.model.state_dict()
            seen: set[int] = set()
            tensors = {}
            for key, value in state.items():
                if self._belongs(key, name) and not value.is_meta and value.data_ptr() not in seen:
                    seen.add(value.data_ptr())
                    tensors[key] = value.contiguous()
            header = {"format": "pt", METHOD_KEY: self.config.method}
            facts = {key: getattr(self.config, key) for key in RECORDED}
            self.journal.write(name, shard, tensors, header, finding=finding.to_dict(), **facts)
        processes.barrier()

    def free(self, name: str) -> None:
        """Forget a block's weights."""
        self.weights.free(lambda parameter: self._belongs(parameter, name))

    def _belongs(self, parameter: str, name: str) -> bool:
        """Whether a parameter is of the block `name`."""
        if name == OUTSIDE:
            return not any(parameter.startswith(f"{block}.") for block in self.names)
        return parameter.startswith(f"{name}.")


def _restore(held: Any, recorded: Any) -> None:
    """Give a record of the configuration (a dict or a list) the entries that an earlier run noted."""
    if isinstance(held, dict) and recorded:
        held.update(recorded)
    elif isinstance(held, list) and recorded:
        held.extend(item for item in recorded if item not in held)


def _fill(model: nn.Module, shard: Path) -> None:
    """Put the tensors of a shard into the model."""
    from safetensors.torch import load_file

    for name, value in load_file(shard).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def quantize_streamed(
    src: str | Path,
    config: HfQuantConfig,
    model_config: Any,
    folder: Path,
    dtype: torch.dtype,
    revision: str | None = None,
    resume: bool = True,
    settings: Settings | None = None,
    tick: Tick | None = None,
) -> tuple[list[BlockFinding], dict[str, Any]]:
    """Quantize `src` into the folder `folder`, which holds the journal meanwhile.

    Returns what was found block by block, and the fields of a report that follow from the model. Raises SpecError,
    UnsupportedError, CalibrationError and FormatError before any weight is read where that is possible.
    """
    load_all()
    if FISHER in needs(config.recipe):
        raise UnsupportedError(
            'loss="fisher" runs the whole model forwards and backwards, and here one block is held at a time: load the '
            "model with from_pretrained and a quantization_config, and save the result"
        )
    return_what_is_freed()
    join_processes()
    settings = settings or Settings()
    files = local_files(src, revision)
    batches = calibration_batches(src, config, model_config, dtype, revision)
    model = skeleton(model_config, dtype)
    targets, coverage = survey(model, config.modules_to_not_convert, config.embeddings)
    if not targets:
        raise SpecError(f"nothing in {src} can be quantized by {config.method!r}: {coverage.line()}")
    config.skipped = {skip.name: skip.reason for skip in coverage.skipped if skip.eligible}
    config.source_dtype = str(dtype).removeprefix("torch.")
    writes = processes.rank() == 0
    journal = None
    if writes:
        journal = Journal(folder, _request(config, files, settings, batches), resume)
    if settings.offload is not None:
        settings = replace(settings, offload=settings.offload / f"rank-{processes.rank()}")
    try:
        store = Shards(model, Weights(model, files), folder, journal, config, targets)
        run = Calibration(model, targets, config, batches, store, settings, tick)
        store.names = run.state.chain.names()
        _say_where(journal, store.names)
        findings = run.run()
        facts = _sizes(journal, model, coverage)
        if journal is not None:
            _write_index(journal)
            _write_config(model, config, folder)
    finally:
        if journal is not None:
            journal.close()
    return findings, facts


def _say_where(journal: Journal | None, names: Sequence[str]) -> None:
    """Tell the user that an interrupted run goes on, which is done to the block that comes next."""
    if journal is not None and journal.records:
        done = sum(name in journal.records for name in names)
        where = f"block {done + 1}" if done < len(names) else "what comes after the last"
        logger.warning(
            "going on at %s of %d: what an interrupted run finished is kept (resume=False, --no-resume starts over)",
            *(where, len(names)),
        )


def join_processes() -> None:
    """Under torchrun or `accelerate launch`: become one of the processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_leave_processes)


def _leave_processes() -> None:
    """Stop gloo's threads: one that still runs while the process ends may abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def calibration_batches(
    src: str | Path, config: HfQuantConfig, model_config: Any, dtype: torch.dtype, revision: str | None
) -> list[Batch]:
    """What a model is calibrated on; a model that writes its own text is loaded for that, and dropped."""
    data = config.data
    if data.data is None:
        return list(stand_in(model_config))
    tokenizer = tokenizer_for(data, src, revision)
    writer = None
    if kind_of(data.data) == "self":
        writer = load_model(src, copy.deepcopy(model_config), dtype=dtype, revision=revision)
    batches: list[Batch] = list(batches_of(data, tokenizer, model_config, writer))
    config.describe_data(batches)
    return batches


def _request(
    config: HfQuantConfig, files: Sequence[Path], settings: Settings, batches: Sequence[Batch]
) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    plain = config.to_dict()
    asked = {key: plain[key] for key in ("method", "recipe", "modules_to_not_convert", "embeddings", "calibration")}
    # Another training of the same model has files of the same sizes.
    source = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    how = {"min_tokens": settings.min_tokens, "dtype": config.source_dtype}
    known = versions(config.plugins)
    return {**asked, "source": source, **how, "processes": processes.world(), "versions": known}


def _sizes(journal: Journal | None, model: nn.Module, coverage: Coverage) -> dict[str, Any]:
    """Bits, megabytes, coverage: the packed modules hold empty tensors of the right shapes by now."""
    written = journal and sum(sum(record["tensors"].values()) for record in journal.records.values())
    return {**sizes(model, coverage), "mb_after": processes.of_first(written) / 1e6}


def _write_index(journal: Journal) -> None:
    """The index that a checkpoint of several files has."""
    names, total = {}, 0
    for record in journal.records.values():
        names.update(dict.fromkeys(record["tensors"], record["shard"]))
        total += sum(record["tensors"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (journal.folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_config(model: Any, config: HfQuantConfig, folder: Path) -> None:
    """config.json as `save_pretrained` writes it."""
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    assert any(True for _ in packed_modules(model))
