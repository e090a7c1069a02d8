"""A recipe: the independent choices that together make a quantization method, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .spec import InputSpec, Scheme
from .tables import Table


@dataclass(frozen=True)
class Step:
    """An entry of an axis table by name, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, **self.options}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        """Inverse of `to_dict`."""
        options = {key: value for key, value in data.items() if key != "name"}
        return cls(data["name"], options)


@dataclass(frozen=True)
class Recipe:
    """How a weight becomes codes.

    `scheme`: the numbers. `range`: grid parameters of each block. `rounder`: the codes. `columns`: input columns kept
    in 16 bit. `layout`: stored form, None for the densest one of the core. `transforms`: rewrites of the model that
    leave its function as it is, in order. `input_range`: how static ranges of inputs are found. `attention`: how the
    operands of attention's products are quantized, None to leave them alone.
    """

    scheme: Scheme
    range: Step = Step("absmax")
    rounder: Step = Step("nearest")
    columns: Step = Step("none")
    layout: str | None = None
    transforms: tuple[Step, ...] = ()
    input_range: Step = Step("absmax")
    attention: InputSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "scheme": self.scheme.to_dict(),
            "range": self.range.to_dict(),
            "rounder": self.rounder.to_dict(),
            "columns": self.columns.to_dict(),
            "layout": self.layout,
            "transforms": [step.to_dict() for step in self.transforms],
            "input_range": self.input_range.to_dict(),
            "attention": self.attention.to_dict() if self.attention else None,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`."""
        steps = {axis: Step.from_dict(data[axis]) for axis in ("range", "rounder", "columns")}
        steps["input_range"] = Step.from_dict(data.get("input_range", {"name": "absmax"}))
        transforms = tuple(Step.from_dict(step) for step in data.get("transforms", ()))
        attention = InputSpec.from_dict(data["attention"]) if data.get("attention") else None
        scheme = Scheme.from_dict(data["scheme"])
        return cls(scheme, layout=data["layout"], transforms=transforms, attention=attention, **steps)


Preset = Callable[..., Recipe]
PRESETS: Table[Preset] = Table("method")
