"""Packages that hfquant can do without: whether they are there, and what to say where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import UnsupportedError


def is_installed(package: str) -> bool:
    """Whether there is a package of that name to import; it is not imported."""
    return importlib.util.find_spec(package) is not None


def installed_version(package: str) -> str | None:
    """The version of a package that is installed, None for none; a folder that happens to have its name is none."""
    try:
        return version(package) if is_installed(package) else None
    except PackageNotFoundError:
        return None


def figure_class() -> Any:
    """matplotlib's figure, which needs no window. Raises UnsupportedError if it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UnsupportedError(f'plots need matplotlib ({error}): pip install "hfquant[plot]"') from error
