"""`HfQuantConfig`: what a user passes to `from_pretrained` and what a checkpoint's config.json holds."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .backend import provider, require
from .columns import COLUMNS
from .data import CalibrationData
from .errors import CalibrationError, FormatError, HfQuantError, SpecError
from .grids import GRIDS
from .input_ranges import INPUT_RANGES
from .layouts import LAYOUTS
from .quantize import check_recipe, layout_of, needs_data, works_on_blocks
from .ranges import RANGES
from .recipe import PRESETS, Recipe
from .rounders import ROUNDERS
from .spec import PackedSpec, Scheme, TensorSpec
from .tables import Table
from .transforms import TRANSFORMS

QUANT_METHOD = "hfquant"
FORMAT_VERSION = 1
_REQUEST = ("method", "options", "modules_to_not_convert", "embeddings", "calibration")
_RESULT = ("plugins", "skipped", "outlier_columns", "rotated", "schemes", "attention", "source_dtype")
_ADDED: dict[str, Any] = {
    "calibration": {"data": None},
    "rotated": [],
    "schemes": {},
    "attention": {},
}  # earlier checkpoints do not record these
RECORDED = ("outlier_columns", "rotated", "schemes", "attention")  # of single modules
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508; in particular no pip option


class HfQuantConfig(QuantizationConfigMixin):
    """How to quantize a model: the name of a method, and its options.

    `method`: "int4", "nf4", "fp8", "llm_int8", ...: see `hfquant backends`. `modules_to_not_convert`: names or
    patterns of modules to leave alone; None leaves the output embedding alone, [] quantizes it too (tied weights are
    always left alone). `embeddings`: quantize input embeddings as well.

    `data`, for methods that calibrate: the name of a dataset, a text file, a list of texts, of chats, of token tensors
    or of dicts of model inputs, or "self" for text that the model writes. `samples` of `length` tokens are drawn from
    it by `seed`, `batch_size` at a time; `packing` joins texts into full samples; `column` and `split` are a dataset's.

    Other keywords are the method's options; see its docstring; their values are numbers, strings, lists and dicts, so
    that a checkpoint can record them. Raises SpecError for unknown names and options, before anything is loaded.
    """

    recipe_file: dict[str, str] | None = None  # the file that it was read from, for reports

    def __init__(
        self,
        method: str = "int4",
        *,
        modules_to_not_convert: list[str] | None = None,
        embeddings: bool = False,
        data: Any = None,
        samples: int = 128,
        length: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        column: str | None = None,
        split: str = "train",
        packing: bool = True,
        **options: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.method = method
        self.options = {name: _plain(value, name) for name, value in options.items()}
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.embeddings = embeddings
        self.recipe = check_recipe(_expand(method, options))
        self.data = CalibrationData(data, samples, length, batch_size, seed, column, split, packing)
        if data is not None and not works_on_blocks(self.recipe):
            raise SpecError(
                f"method {method!r} looks at the weights alone and reads no calibration data: leave data out"
            )
        self.calibration = self.data.describe()
        self.plugins = _plugins_of(method, self.recipe)
        self.skipped: dict[str, str] | None = None
        self.outlier_columns: dict[str, int] = {}
        self.rotated: list[str] = []
        self.schemes: dict[str, dict[str, Any]] = {}
        self.attention: dict[str, dict[str, Any]] = {}
        self.source_dtype: str | None = None

    @classmethod
    def from_recipe(cls, path: str | Path, **changes: Any) -> HfQuantConfig:
        """The section `quantize` of a recipe file; `changes` take the place of what it says.

        Raises SpecError, naming the line, if it is not that.
        """
        from .recipe_file import read_recipe  # with pydantic, which nothing else needs

        recipe = read_recipe(path)
        try:
            config = cls(**{**recipe.quantize_keywords(), **changes})
        except SpecError as error:
            raise recipe.blame(error) from error
        config.recipe_file = recipe.label
        return config

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
                f"the checkpoint has hfquant format {data['format_version']!r}, this version reads {FORMAT_VERSION}: "
                "update hfquant, or quantize the original model again"
            )
        data = {**copy.deepcopy(_ADDED), **data}
        if missing := [name for name in (*_REQUEST, *_RESULT, "recipe") if name not in data]:
            raise FormatError(f"config.json: quantization_config has no {', '.join(missing)}: the file was changed")
        _require_plugins(data["plugins"])
        config = cls.__new__(cls)
        config.quant_method = QUANT_METHOD
        for name in (*_REQUEST, *_RESULT):
            setattr(config, name, data[name])
        config.data = CalibrationData()
        try:
            config.recipe = Recipe.from_dict(data["recipe"])
            own = dict.fromkeys(map(Scheme.from_dict, data["schemes"].values()))  # many layers have the same
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"config.json: the recipe of quantization_config is damaged: {error!r}") from error
        for recipe in (config.recipe, *(replace(config.recipe, scheme=scheme) for scheme in own)):
            check_recipe(recipe)
        return config

    def copy(self) -> HfQuantConfig:
        """A copy that loading a model may note its results in; the calibration data is shared."""
        data, self.data = self.data, CalibrationData()
        try:
            made = copy.deepcopy(self)
        finally:
            self.data = data
        made.data = data
        return made

    def note(self, name: str, spec: PackedSpec) -> None:
        """Record what a checkpoint has to say about the weight `name`, as it does not follow from the recipe."""
        if spec.outliers:
            self.outlier_columns[name] = spec.outliers
        if spec.rotated and name not in self.rotated:
            self.rotated.append(name)
        if not follows(spec.scheme, self.recipe.scheme):
            self.schemes[name] = spec.scheme.to_dict()

    def describe_data(self, batches: Sequence[Any]) -> None:
        """Note what the model is calibrated on: counts and a hash, never the data."""
        self.calibration = self.data.describe(batches)

    @property
    def needs_data(self) -> bool:
        """Whether the method reads calibration data."""
        return needs_data(self.recipe)

    def check_data(self) -> None:
        """Raise CalibrationError if the method reads calibration data and there is none."""
        if self.needs_data and self.data.data is None:
            raise CalibrationError(
                f"method {self.method!r} needs calibration data: pass data=... (a dataset, a text file, a list of "
                'texts or of token tensors), or data="self" for text that the model writes itself'
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it changes when a model is loaded with it

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the request, and the recipe that it stands for in full."""
        plain = {name: copy.deepcopy(getattr(self, name)) for name in (*_REQUEST, *_RESULT)}
        tags = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        return {**tags, **plain, "recipe": self.recipe.to_dict()}


def follows(scheme: Scheme, recipe: Scheme) -> bool:
    """Whether a weight has the numbers that the recipe says; an embedding has no input."""
    return scheme.weight == recipe.weight and scheme.input in (recipe.input, None)


def _without_tag(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "quant_method"}


def _expand(method: str, options: dict[str, Any]) -> Recipe:
    """The recipe behind a method's name and options."""
    preset = PRESETS.get(method)
    known = inspect.signature(preset).parameters
    unknown = [option for option in options if option not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        names = ", ".join(name for name, parameter in known.items() if parameter.kind is not parameter.VAR_KEYWORD)
        asked = ", ".join(map(repr, unknown))
        raise SpecError(f"method {method!r} has no option {asked}: its options are {names or 'none'}")
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in options and not _is_variadic(known[name])]:
        raise SpecError(f"method {method!r} needs the option {', '.join(map(repr, missing))}")
    try:
        recipe = preset(**options)
    except HfQuantError:
        raise
    except (TypeError, ValueError) as error:
        asked = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise SpecError(f"method {method!r} cannot be set up with {asked or 'its defaults'}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise SpecError(f"method {method!r} gives a {type(recipe).__name__} instead of a Recipe: its backend is wrong")
    return recipe


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def _plain(value: Any, option: str) -> Any:
    """A copy of an option in plain JSON types, infinities allowed. Raises SpecError if it cannot be one."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and not math.isnan(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, option) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, option) for key, item in value.items()}
    raise SpecError(
        f"option {option!r} holds {value!r} ({type(value).__name__}), which config.json cannot record: use numbers, "
        'strings, lists and dicts, such as "bfloat16" for a dtype'
    )


def _names(modules: list[str] | None) -> list[str] | None:
    """`modules_to_not_convert` as given. Raises SpecError for a bare string: its letters would be taken one by one."""
    if modules is None:
        return None
    if isinstance(modules, str) or not all(isinstance(name, str) for name in modules):
        raise SpecError(f"modules_to_not_convert is a list of names or None, got {modules!r}")
    return list(modules)


def _plugins_of(method: str, recipe: Recipe) -> dict[str, dict[str, str]]:
    """The plugins that a recipe needs, as recorded in checkpoints: name -> distribution and version."""
    used: list[tuple[Table, str]] = [(PRESETS, method), (RANGES, recipe.range.name), (ROUNDERS, recipe.rounder.name)]
    used += [(COLUMNS, recipe.columns.name), (LAYOUTS, layout_of(recipe)), (INPUT_RANGES, recipe.input_range.name)]
    used += [(TRANSFORMS, step.name) for step in recipe.transforms]
    used += [(GRIDS, name) for name in _grids(recipe) if name in GRIDS]
    found = [plugin for table, name in used if (plugin := provider(table, name)) is not None]
    return {plugin.name: {"distribution": plugin.distribution, "version": plugin.version} for plugin in found}


def _grids(recipe: Recipe) -> Iterator[str]:
    """Names of all grids of a recipe, those of quantized scales included."""
    spec: TensorSpec | str = recipe.scheme.weight
    while isinstance(spec, TensorSpec):
        yield spec.grid
        spec = spec.scale
    yield from (given.tensor.grid for given in (recipe.scheme.input, recipe.attention) if given is not None)


def _require_plugins(needed: Any) -> None:
    """Raise BackendError naming the pip line of the first plugin that is missing or broken; never install anything.

    `needed` comes from a file that anybody may have written: only what looks like a name is repeated in the message.
    """
    if not isinstance(needed, dict):
        raise FormatError(f"config.json: 'plugins' of quantization_config is a mapping, got {needed!r}")
    for name, source in needed.items():
        source = source if isinstance(source, dict) else {}
        distribution, version = (_shown(source.get(key)) for key in ("distribution", "version"))
        require(name, distribution, version)


def _shown(text: Any) -> str | None:
    """A name or version from an untrusted file if it is one, else None."""
    return text if isinstance(text, str) and _DISTRIBUTION.fullmatch(text) else None
