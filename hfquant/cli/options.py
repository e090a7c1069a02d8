"""From what is typed on the command line to an `HfQuantConfig`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backend import load_all
from ..config import HfQuantConfig
from ..data import kind_of
from ..errors import SpecError
from ..quantize import works_on_blocks
from ..recipe import PRESETS
from ..recipe_file import read_recipe

# What a config holds besides the options of its method, and where the command line takes it.
DATA = {
    "data": "--data",
    "samples": "--samples",
    "length": "--length",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "column": "--column",
    "split": "--split",
    "packing": "--no-packing",
}
OTHERS = {"method": "--method", "modules_to_not_convert": "--skip", "embeddings": "--embeddings", **DATA}
# What only some forms of data have.
_ONLY_FOR = {"split": ("dataset",), "column": ("dataset", "file"), "packing": ("dataset", "file")}


def parse_value(text: str) -> Any:
    """A value typed as JSON ("0.02", "true", '{"name": "mse"}'), or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs as a dict. Raises SpecError for one without a key or a "=", and for a key given twice."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise SpecError(f"--option {pair!r}: write key=value, for example --option outliers=0.02")
        if key in found:
            raise SpecError(f"option {key!r} is given twice: give it once")
        if key in OTHERS:
            raise SpecError(f"{key!r} is no option of a method: use {OTHERS[key]}")
        found[key] = parse_value(value)
    return found


def build_config(
    method: str | None = None,
    bits: int | None = None,
    skip: Sequence[str] = (),
    embeddings: bool = False,
    pairs: Sequence[str] = (),
    recipe: Path | None = None,
    data: Mapping[str, Any] | None = None,
    **options: Any,
) -> HfQuantConfig:
    """The config of a command line; options that are None were not given, and neither is `data`, how to read it.

    `recipe`: a file with a method and options, of which those that are given take the place. `skip`: none of them
    leaves the default (the output layer), "none" alone skips nothing. Raises SpecError.
    """
    given = {key: value for key, value in options.items() if value is not None}
    extra = parse_options(pairs)
    if doubled := sorted(given.keys() & extra.keys()):
        raise SpecError(f"{doubled[0]!r} is given twice: by its own option and by --option")
    file = None if recipe is None else read_recipe(recipe)
    chosen = {} if file is None else file.quantize_keywords()
    if file is not None and method is not None:
        raise SpecError(f"the recipe {recipe} has a method ({chosen['method']}): leave --method out")
    method = chosen.pop("method", method or "int4")
    chosen |= given | extra
    how = {key: value for key, value in (data or {}).items() if value is not None}
    if bits is not None:
        method, chosen = with_bits(method, bits, chosen)
    if skip:
        chosen["modules_to_not_convert"] = [] if list(skip) == ["none"] else list(skip)
    if embeddings:
        chosen["embeddings"] = True
    try:
        config = HfQuantConfig(method, **chosen | how)
    except SpecError as problem:
        raise problem if file is None else file.blame(problem) from problem
    config.recipe_file = None if file is None else file.label
    _check_data_options(config, how)
    return config


def _check_data_options(config: HfQuantConfig, given: Mapping[str, Any]) -> None:
    """Raise SpecError for options that would say how to read data, and would have no effect."""
    refuse_without_blocks(config, [DATA[name] for name in given])
    if not given or config.data.data is None:
        return
    kind = kind_of(config.data.data)
    if "column" in given and kind == "file" and Path(config.data.data).suffix.lower() not in (".json", ".jsonl"):
        raise SpecError(f"--column is of a dataset or a JSON file, {config.data.data} is one text: leave it out")
    for name, kinds in _ONLY_FOR.items():
        if name in given and kind not in kinds:
            what = {"self": "text that the model writes", "file": "a file"}.get(kind, kind)
            raise SpecError(f"{DATA[name]} is for {' and '.join(kinds)}s, the data is {what}: leave it out")


def refuse_without_blocks(config: HfQuantConfig, flags: Sequence[str]) -> None:
    """Raise SpecError if `flags`, which say how to calibrate, are given for a method that does not."""
    if flags and not works_on_blocks(config.recipe):
        names = ", ".join(flags)
        raise SpecError(f"method {config.method!r} looks at the weights alone and is not calibrated: leave out {names}")


def with_bits(method: str, bits: int, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Method and options for `--bits`: an option of methods that have it, otherwise part of the method's name.

    "int" with 4 bits is int4, and int4 with 4 bits is int4 too. Raises SpecError if they contradict each other.
    """
    load_all()
    if f"{method}{bits}" in PRESETS:
        return f"{method}{bits}", options
    if "bits" in inspect.signature(PRESETS.get(method)).parameters:
        return method, {**options, "bits": bits}
    plain = {name: value for name, value in options.items() if name not in OTHERS}
    found = HfQuantConfig(method, **plain).recipe.scheme.weight.numbers().bits
    if found != bits:
        family = method.rstrip("0123456789")
        other = f"{family}{bits}"
        hint = f"choose --method {other}" if other in PRESETS else "leave --bits out"
        raise SpecError(f"--method {method} has {found} bits, --bits {bits} contradicts it: {hint}")
    return method, options
