"""From what is typed on the command line to an `HfQuantConfig`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from ..backend import load_all
from ..config import HfQuantConfig
from ..errors import SpecError
from ..recipe import PRESETS

# What a config holds besides the options of its method, and where the command line takes it.
OTHERS = {"method": "--method", "modules_to_not_convert": "--skip", "embeddings": "--embeddings"}


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
    method: str,
    bits: int | None = None,
    skip: Sequence[str] = (),
    embeddings: bool = False,
    pairs: Sequence[str] = (),
    **options: Any,
) -> HfQuantConfig:
    """The config of a command line; options that are None were not given.

    `skip`: none of them leaves the default (the output layer), "none" alone skips nothing. Raises SpecError.
    """
    given = {key: value for key, value in options.items() if value is not None}
    extra = parse_options(pairs)
    if doubled := sorted(given.keys() & extra.keys()):
        raise SpecError(f"{doubled[0]!r} is given twice: by its own option and by --option")
    chosen = given | extra
    if bits is not None:
        method, chosen = with_bits(method, bits, chosen)
    modules = None if not skip else [] if list(skip) == ["none"] else list(skip)
    return HfQuantConfig(method, modules_to_not_convert=modules, embeddings=embeddings, **chosen)


def with_bits(method: str, bits: int, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Method and options for `--bits`: an option of methods that have it, otherwise part of the method's name.

    "int" with 4 bits is int4, and int4 with 4 bits is int4 too. Raises SpecError if they contradict each other.
    """
    load_all()
    if f"{method}{bits}" in PRESETS:
        return f"{method}{bits}", options
    if "bits" in inspect.signature(PRESETS.get(method)).parameters:
        return method, {**options, "bits": bits}
    found = HfQuantConfig(method, **options).recipe.scheme.weight.numbers().bits
    if found != bits:
        family = method.rstrip("0123456789")
        other = f"{family}{bits}"
        hint = f"choose --method {other}" if other in PRESETS else "leave --bits out"
        raise SpecError(f"--method {method} has {found} bits, --bits {bits} contradicts it: {hint}")
    return method, options
