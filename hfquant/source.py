"""Where a model comes from: its configuration, the class that loads it, and the files that go with the weights."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import FormatError, HfQuantError, SpecError

DTYPES = ("float32", "float16", "bfloat16")
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # of transformers' device_map, beside devices

# What a quantized copy needs besides weights and config.json to stand in for the original.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "generation_config.json",
)


def read_config(src: str | Path, revision: str | None = None) -> Any:
    """The configuration of the model `src`, a folder or a Hub repository. Raises SpecError if there is none."""
    from transformers import AutoConfig

    _check_place(src)
    try:
        return AutoConfig.from_pretrained(src, revision=revision)
    except (OSError, ValueError) as error:
        missing = "" if Path(src).is_dir() else f"there is no folder {src}, and "
        raise SpecError(f"{missing}{src} is not a model that transformers can read: {error}") from error


def _check_place(src: str | Path) -> None:
    """Raise SpecError for a folder that is not there: transformers would take it for a repository."""
    path = Path(src)
    if path.is_file():
        raise SpecError(f"{path} is a file: name the folder of a model")
    local = isinstance(src, Path) or str(src).startswith((".", "/", "~")) or str(src).count("/") > 1
    if local and not path.is_dir():
        raise SpecError(f"there is no folder {path}")
    if path.is_dir() and not (path / "config.json").exists():
        raise SpecError(f"the folder {path} holds no model: it has no config.json")


def original_config(src: str | Path, revision: str | None = None) -> Any:
    """The configuration of a model that is not quantized yet. Raises SpecError if it is."""
    config = read_config(src, revision)
    method = method_of(config)
    if method is not None:
        raise SpecError(f"{src} is quantized already ({method}): give the original model")
    return config


def method_of(config: Any) -> str | None:
    """Name of the quantization method that a model's configuration records, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return str(stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method)


def model_class(config: Any) -> Any:
    """The class that the configuration names, head included, or else AutoModelForCausalLM."""
    import transformers

    named = (getattr(transformers, name, None) for name in config.architectures or [])
    return next((found for found in named if found is not None), transformers.AutoModelForCausalLM)


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration on the meta device, in `dtype`: every shape, no values."""
    found = model_class(config)
    build = getattr(found, "from_config", None) or found._from_config
    with torch.device("meta"):
        model: nn.Module = build(config, dtype=dtype)
    return model.eval()


def load_model(src: str | Path, config: Any = None, **options: Any) -> Any:
    """Load `src` with the class its configuration names; `options` go to `from_pretrained`.

    Raises SpecError for what cannot be loaded as asked, FormatError for damaged weights.
    """
    config = config or read_config(src, options.get("revision"))
    dtype_named(options.get("dtype", "auto"))
    check_device(options.get("device_map"))
    try:
        return model_class(config).from_pretrained(src, **options).eval()
    except HfQuantError:
        raise
    except SafetensorError as error:
        raise FormatError(f"a weight file of {src} is damaged: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):  # transformers' advice, which nobody here could follow
            raise FormatError(f"the weights of {src} have other shapes than its config.json says") from error
        raise SpecError(f"cannot load {src}: {error}") from error


def dtype_named(name: str) -> torch.dtype | None:
    """The floating-point dtype of that name, or None for "auto". Raises SpecError."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise SpecError(f"dtype is auto, {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_device(device: Any) -> None:
    """Raise SpecError for the name of a device that is not there."""
    if not isinstance(device, str) or device in PLACEMENTS:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(f"the device {device!r} cannot be used: {reason}. `hfquant doctor` lists devices") from error


def stored_dtype(src: str | Path, config: Any, revision: str | None = None) -> torch.dtype:
    """The dtype that `from_pretrained(dtype="auto")` gives: the configuration's, or that of the first stored tensor."""
    named = getattr(config, "dtype", None)
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named
    for file in weight_files(src, revision):
        for dtype, _ in headers(file).values():
            if dtype.startswith(("F", "BF")):
                return {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)
    return torch.float32


def weight_files(src: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder; of a Hub repository, its first one, downloaded only if it is cached."""
    if Path(src).is_dir():
        return sorted(Path(src).glob("*.safetensors"))
    from transformers.utils import cached_file

    found = cached_file(
        str(src),
        "model.safetensors",
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
    )
    return [Path(found)] if found else []


def headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (in safetensors' spelling) and shape of each tensor in a file, without reading any values.

    Raises FormatError for a damaged file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise FormatError(f"{file} is damaged: {error}") from error


def copy_companions(src: str | Path, out: Path, revision: str | None = None) -> list[str]:
    """Copy tokenizer, processor and licence files of `src` to the folder `out`; files that are there stay."""
    folder = Path(src)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(src), revision=revision, allow_patterns=list(COMPANIONS)))
    copied = []
    for file in sorted(folder.iterdir()):
        wanted = file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS)
        if wanted and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
            copied.append(file.name)
    return copied
