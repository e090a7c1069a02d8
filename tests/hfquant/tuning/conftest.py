"""A recipe to change, the bundled model, and texts of a kind that it was not trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))
from tests.models.style import order_book  # noqa: E402

MODEL = ROOT / "tests" / "models" / "tiny-llama"

# Short, and with everything that is drawn: dropout and the order of the samples.
RECIPE = {
    "quantize": {"method": "int4", "group_size": 64},
    "lora": {"rank": 4, "dropout": 0.1},
    "train": {"length": 32, "samples": 64, "steps": 6, "batch_size": 4, "learning_rate": 0.002, "dtype": "float32"},
    "evaluate": {"sequences": 6},
}


@pytest.fixture
def recipe(tmp_path):
    """`recipe(train={"steps": 2}, exit="merge")` writes a recipe with other sections, None to leave one out."""

    def write(name: str = "recipe", **sections: object) -> Path:
        merged = dict(RECIPE)
        for section, entries in sections.items():
            old = merged.get(section)
            merged[section] = {**old, **entries} if isinstance(old, dict) and isinstance(entries, dict) else entries
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({name: found for name, found in merged.items() if found is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Some 6000 tokens of the order book."""
    file = tmp_path_factory.mktemp("text") / "orders.txt"
    file.write_text(order_book(0, 100))
    return file


@pytest.fixture(scope="session")
def other_text(tmp_path_factory) -> Path:
    """Other orders, to measure on."""
    file = tmp_path_factory.mktemp("text") / "other.txt"
    file.write_text(order_book(1, 100))
    return file
