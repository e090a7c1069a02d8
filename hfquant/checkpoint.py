"""The native checkpoint: safetensors only, under names that plain transformers does not look for.

Without hfquant, transformers meets an unknown quantization method with a warning and random weights. With no file
called `model*.safetensors` it raises instead, so native weights are called `hfquant*.safetensors`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from .attention import Operands
from .coverage import aliases
from .errors import FormatError, SpecError
from .experts import QExperts
from .nn import PackedModule
from .quantize import pack_empty
from .recipe import Recipe
from .spec import SCALE_DTYPES
from .swap import packed_modules

INDEX_NAME = "hfquant.safetensors.index.json"
METHOD_KEY = "hfquant"  # in the header of each weight file
_VARIANT = "hfquant"
_HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "token")  # go to `push_to_hub` alone


def point_to_native_weights(config: Any) -> None:
    """Make `from_pretrained` look for the native index instead of `model.safetensors`."""
    config.transformers_weights = INDEX_NAME


def forget_native_weights(config: Any) -> None:
    """Undo `point_to_native_weights` once the files are found: config.json must never name them, or plain
    transformers would open them.
    """
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights


def save_native(
    model: PreTrainedModel,
    save: Callable[..., None],
    save_directory: str | os.PathLike,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save a quantized model as config.json, sharded `hfquant-*.safetensors` and their index.

    `save` is `save_pretrained` of the model's own class. The files never carry a name that fails open, not even while
    they are being written. With adapters attached by `load_adapter`, only they are saved, as transformers does.
    """
    kwargs.setdefault("save_original_format", False)
    if getattr(model, "_hf_peft_config_loaded", False):
        save(save_directory, push_to_hub=push_to_hub, **kwargs)
        return
    if (variant := kwargs.pop("variant", None)) is not None:
        raise SpecError(f"native checkpoints have no variants: save {variant!r} into a folder of its own")
    state = kwargs.pop("state_dict", None)
    if state is not None and (lost := [name for name in _packed_names(model) if name not in state]):
        raise FormatError(
            f"state_dict has no {', '.join(lost[:4])}: a quantized model saves its packed tensors. Leave state_dict "
            "out, or gather it from the quantized model itself"
        )
    if state is not None and push_to_hub:
        raise SpecError("state_dict is saved to the folder only: save it, then upload the folder")
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    if "max_shard_size" in kwargs:
        hub["max_shard_size"] = kwargs["max_shard_size"]
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    writes = model.should_save_on_this_rank(kwargs.get("is_main_process", True))
    if writes:
        # Closed from here on. The shards go only after the save: an offloaded model may still read its weights there.
        (folder / INDEX_NAME).unlink(missing_ok=True)
    stale = list(folder.glob("hfquant*.safetensors"))
    model.hf_quantizer.state_to_save = state  # transformers asks the quantizer, and drops its own argument
    try:
        save(folder, variant=_VARIANT, **kwargs)
    finally:
        model.hf_quantizer.state_to_save = None
    if writes:
        for shard in stale:
            shard.unlink()
        _rename(folder)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub)


def _packed_names(model: nn.Module) -> Iterator[str]:
    """Full names of all packed tensors."""
    for name, module in packed_modules(model):
        yield from (f"{name}.{leaf}" for leaf in module.packed_names())


def _rename(folder: Path) -> None:
    """From transformers' variant names to the native ones, with an index even for a single shard."""
    variant_index = folder / f"model.safetensors.index.{_VARIANT}.json"
    index = json.loads(variant_index.read_text()) if variant_index.exists() else _index_of(folder)
    names = {}
    for old in sorted(set(index["weight_map"].values())):
        names[old] = old.replace(f"model.{_VARIANT}", "hfquant")
        (folder / old).rename(folder / names[old])
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    variant_index.unlink(missing_ok=True)


def _index_of(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint that fits in one file."""
    name = f"model.{_VARIANT}.safetensors"
    with safe_open(folder / name, framework="pt") as file:
        tensors = list(file.keys())
    size = (folder / name).stat().st_size
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, name)}


def tensors_in(files: Iterable[str], method: str) -> dict[str, set[str]]:
    """Names of the tensors in native weight files, by the module that owns them.

    Raises FormatError if a file was made with another method than `method`: its codes would mean other numbers.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for path in files:
        with safe_open(path, framework="pt") as file:
            made = (file.metadata() or {}).get(METHOD_KEY, method)
            for name in file.keys():  # noqa: SIM118 - not a dict
                owner, _, leaf = name.rpartition(".")
                names[owner].add(leaf)
        if made != method:
            raise FormatError(
                f"{path} was made with {made!r}, config.json says {method!r}: the files do not belong together"
            )
    return names


def check_expected(model: PreTrainedModel, held: dict[str, set[str]]) -> None:
    """Raise FormatError if the files hold a tensor for a packed module that it has no place for.

    transformers would leave it out with a warning, and what it says, such as columns kept in 16 bit, would be lost.
    """
    for name, module in packed_modules(model):
        stored = set().union(*(held.get(alias, ()) for alias in aliases(model, name)))
        if extra := sorted(stored - module._parameters.keys()):
            raise FormatError(
                f"the files hold {', '.join(f'{name}.{leaf}' for leaf in extra)}, which config.json does not account "
                "for: the files do not belong together"
            )


def audit(model: PreTrainedModel, pre_quantized: bool) -> None:
    """Raise FormatError if any weight did not come from the checkpoint: transformers would only warn.

    From a native checkpoint of the same architecture everything must have come; otherwise every packed weight must,
    while a new head may start fresh as usual.
    """
    offloaded = _offloaded(model)
    missing = [name for name, module in packed_modules(model) if _incomplete(name, module, offloaded)]
    operands = [(f"{name}.scale", module.scale) for name, module in model.named_modules() if type(module) is Operands]
    missing += [name for name, scale in operands if not _arrived(name, scale, offloaded)]
    if pre_quantized and type(model).__name__ in (model.config.architectures or []):
        rest = [name for name, value in model.named_parameters() if not _arrived(name, value, offloaded)]
        missing += [name for name in rest if name not in missing]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise FormatError(
            f"{model.config.name_or_path or 'the checkpoint'} is incomplete or its tensors are named differently: "
            f"nothing was found for {shown}. The model would hold random weights there; load a complete checkpoint"
        )
    for name, found, wanted in _wrong_dtypes(model) if pre_quantized else ():
        raise FormatError(f"{name} is stored as {found}, the format has {wanted}: the checkpoint was changed")


def _wrong_dtypes(model: PreTrainedModel) -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """Packed tensors (name, dtype found, dtype of the format) that are no codes: the loader takes integers as they are,
    and kernels read bytes. Floats it casts itself, except for scales, whose dtype is free.
    """
    for name, module in packed_modules(model):
        specs = {f"{leaf}_": spec for leaf, spec in module.specs.items()} if isinstance(module, QExperts) else None
        for prefix, spec in (specs or {"": module.spec}).items():
            recipe = Recipe(spec.scheme, layout=spec.layout)
            for leaf, empty in pack_empty(spec.shape, recipe, module.dtype, spec.outliers)[0].items():
                found = module._parameters[prefix + leaf].dtype  # type: ignore[union-attr]
                if found != empty.dtype and not {found, empty.dtype} <= {*SCALE_DTYPES.values()}:
                    yield f"{name}.{prefix}{leaf}", found, empty.dtype


def _incomplete(name: str, module: PackedModule | QExperts, offloaded: set[str]) -> bool:
    """Whether a packed module lacks a tensor, or still waits for a full-precision weight."""
    held = ((f"{name}.{leaf}", value) for leaf, value in module._parameters.items() if value is not None)
    return bool(module.waiting()) or not all(_arrived(full, value, offloaded) for full, value in held)


def _arrived(name: str, parameter: nn.Parameter, offloaded: set[str]) -> bool:
    """Whether the loader has set a parameter, or knows where to read it when it is needed."""
    return getattr(parameter, "_is_hf_initialized", False) or (parameter.is_meta and name in offloaded)


def _offloaded(model: nn.Module) -> set[str]:
    """Names of the tensors that accelerate's hooks hold on the CPU or find on disk while parameters are on meta."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    sources = {id(source): source for found in maps if (source := getattr(found, "dataset", None)) is not None}
    return {name for source in sources.values() for name in source}
