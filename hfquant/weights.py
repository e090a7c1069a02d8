"""A checkpoint's full-precision weights, a part of the model at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from .errors import FormatError, SpecError
from .pages import release_mapped
from .source import model_class


def skeleton(config: Any, dtype: torch.dtype, kind: Any = None) -> PreTrainedModel:
    """The model of a configuration with real buffers (rotary frequencies, causal masks) and parameters on meta.

    `kind`: its class, None for the one that the configuration names.
    """
    found = kind or model_class(config)
    build = getattr(found, "from_config", None) or found._from_config
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = build(config, dtype=dtype)
    return model.eval()


def local_files(src: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model, downloaded if it is a Hub repository. Raises SpecError if there are none."""
    folder = Path(src)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(src), revision=revision, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SpecError(
            f"{src} has no safetensors files, which are read block by block: load the model with transformers and "
            "save it again"
        )
    return files


class Weights:
    """Where in a checkpoint each parameter of a model is, under the names that the model has."""

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        self.model = model
        self.ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        name_of = final_names(model)
        self.places: dict[str, list[tuple[Path, str]]] = defaultdict(list)
        for file in files:
            for key in _keys(file):
                self.places[name_of(key)[0]].append((file, key))

    def load(self, wanted: Callable[[str], bool]) -> None:
        """Read the parameters whose name is `wanted` into the model, in the model's dtypes.

        Raises FormatError for those that the files do not hold.
        """
        keys = defaultdict(list)
        for name, places in self.places.items():
            if wanted(name):
                for file, key in places:
                    keys[file].append(key)
        state: dict[str, Tensor] = {}
        for file, names in keys.items():
            state |= _read(file, names)
        config = LoadStateDictConfig(
            dtype=self.model.dtype, weight_mapping=get_model_conversion_mapping(self.model), device_map={"": "cpu"}
        )
        with _no_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        if info.mismatched_keys:
            name, found, expected = next(iter(info.mismatched_keys))
            raise FormatError(f"{name} has shape {tuple(found)}, its config.json says {tuple(expected)}")
        self.model.tie_weights()
        self._copy_untied(wanted)
        missing = [n for n, p in self.model.named_parameters() if p.is_meta and wanted(n)]
        if missing:
            raise FormatError(f"the checkpoint is incomplete: no file holds {', '.join(missing[:4])}")

    def _copy_untied(self, wanted: Callable[[str], bool]) -> None:
        """Give parameters that the checkpoint ties, and a transform took apart since, values of their own."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for end, source in self.ties.items():
            if wanted(end) and {end, source} <= parameters.keys() and parameters[end].is_meta:
                owner, _, leaf = end.rpartition(".")
                value = nn.Parameter(parameters[source].data.clone(), requires_grad=False)
                self.model.get_submodule(owner)._parameters[leaf] = value

    def free(self, wanted: Callable[[str], bool]) -> None:
        """Forget the values of parameters whose name is `wanted`."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if wanted(name) and not parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                module._parameters[leaf] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise FormatError(f"{file} is damaged: {error}") from error


def _read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors in memory of their own: pages of a mapped file would stay resident."""
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in names:
                mapped = opened.get_tensor(name)
                found[name] = mapped.clone()
                release_mapped(mapped)
        return found
    except SafetensorError as error:
        raise FormatError(f"{file} is damaged: {error}") from error


def final_names(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """The loader's map from a checkpoint's names to a model's, and whether it converts the tensor on the way.

    Tensors that are fused get the name of the result.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def final(key: str) -> tuple[str, bool]:
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, state)
        return name, converter is not None

    return final


class _no_bar:
    """transformers' bar, once for each block, would hide ours."""

    def __enter__(self) -> None:
        self.enabled = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            logging.enable_progress_bar()
