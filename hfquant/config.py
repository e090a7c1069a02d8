"""`HfQuantConfig`: what a user passes to `from_pretrained` and what a checkpoint's config.json holds."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.quantization_config import QuantizationConfigMixin

from .backend import Plugin, backends, origin
from .errors import BackendError, FormatError, SpecError
from .quantize import check_recipe
from .recipe import PRESETS, Recipe

QUANT_METHOD = "hfquant"
FORMAT_VERSION = 1


class HfQuantConfig(QuantizationConfigMixin):
    """How to quantize a model: the name of a method, and its options.

    `method`: "int4", "nf4", "fp8", "llm_int8", ...: see `hfquant backends`. `modules_to_not_convert`: names or
    patterns of modules to leave alone; None leaves the output embedding alone, [] quantizes it too (tied weights are
    always left alone). `embeddings`: quantize input embeddings as well. Other keywords are the method's options; see
    its docstring. Raises SpecError for unknown names and options, before anything is loaded.
    """

    def __init__(
        self,
        method: str = "int4",
        *,
        modules_to_not_convert: list[str] | None = None,
        embeddings: bool = False,
        **options: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.method = method
        self.options = options
        self.modules_to_not_convert = modules_to_not_convert
        self.embeddings = embeddings
        self.recipe = check_recipe(_expand(method, options))
        self.plugins = _plugins_of(method)
        self.skipped: dict[str, str] | None = None
        self.outlier_columns: dict[str, int] = {}
        self.source_dtype: str | None = None

    @classmethod
    def from_recipe(cls, path: str | Path) -> HfQuantConfig:
        """Read a YAML file that holds `method` and its options. Raises SpecError if it is not that."""
        data = yaml.safe_load(Path(path).read_text())
        if not isinstance(data, dict) or "method" not in data:
            raise SpecError(f"{path}: a recipe is a mapping with a 'method' and its options")
        return cls(**data)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote (a checkpoint), or the keywords of the constructor.

        Raises FormatError for another version of the format, BackendError with the pip line for a missing plugin.
        """
        config = cls._stored(config_dict) if "format_version" in config_dict else cls(**_without_tag(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _stored(cls, data: dict[str, Any]) -> HfQuantConfig:
        if data["format_version"] != FORMAT_VERSION:
            raise FormatError(
                f"the checkpoint has hfquant format {data['format_version']}, this version reads {FORMAT_VERSION}: "
                "update hfquant, or quantize the original model again"
            )
        _require_plugins(data["plugins"])
        config = cls.__new__(cls)
        config.quant_method = QUANT_METHOD
        for name in ("method", "options", "modules_to_not_convert", "embeddings", "plugins"):
            setattr(config, name, data[name])
        for name in ("skipped", "outlier_columns", "source_dtype"):
            setattr(config, name, data[name])
        config.recipe = check_recipe(Recipe.from_dict(data["recipe"]))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the request, and the recipe that it stands for in full."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "options": self.options,
            "modules_to_not_convert": self.modules_to_not_convert,
            "embeddings": self.embeddings,
            "recipe": self.recipe.to_dict(),
            "plugins": self.plugins,
            "skipped": self.skipped,
            "outlier_columns": self.outlier_columns,
            "source_dtype": self.source_dtype,
        }


def _without_tag(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "quant_method"}


def _expand(method: str, options: dict[str, Any]) -> Recipe:
    """The recipe behind a method's name and options."""
    preset = PRESETS.get(method)
    known = inspect.signature(preset).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        names = ", ".join(known) or "none"
        raise SpecError(f"method {method!r} has no option {', '.join(map(repr, unknown))}: its options are {names}")
    return preset(**options)


def _plugins_of(method: str) -> dict[str, dict[str, str]]:
    """The plugin that a method comes from, as recorded in checkpoints: name -> distribution and version."""
    plugin: Plugin | None = origin(method)
    return {} if plugin is None else {plugin.name: {"distribution": plugin.distribution, "version": plugin.version}}


def _require_plugins(needed: dict[str, dict[str, str]]) -> None:
    """Raise BackendError naming the pip line of the first plugin that is missing or broken; never install anything."""
    found = {plugin.name: plugin for plugin in backends()} if needed else {}
    for name, source in needed.items():
        plugin = found.get(name)
        if plugin is not None and plugin.error:
            raise BackendError(f"the checkpoint needs backend {name!r}; {plugin.source} is broken:\n{plugin.error}")
        if plugin is None:
            distribution = source["distribution"]
            safe = distribution if re.fullmatch(r"[A-Za-z0-9._-]+", distribution) else "<its distribution>"
            raise BackendError(
                f"the checkpoint was made with backend {name!r} of {safe} {source['version']}, which is not installed. "
                f"If you trust it:\n    pip install {safe}"
            )
