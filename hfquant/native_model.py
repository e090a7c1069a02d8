"""The class of a quantized model: its own class, with a `save_pretrained` that writes native checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import IMPLEMENTATION, Operands
from .checkpoint import save_native
from .errors import UnsupportedError
from .expert_view import asked_by
from .experts import QExperts
from .packed_targets import refuse_unreached
from .swap import packed_modules

_FINDS_EXPERTS = "peft.utils.transformers_weight_conversion"


class NativeModel(PreTrainedModel):
    """Mixed into the class of a model when its weights are packed, by `to_native`; `from_native` undoes it.

    The mixed class keeps the name of the original, which is what configs record.
    """

    original: type[PreTrainedModel]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating parameters, packed ones aside: scales may have another one."""
        packed = [module for _, module in packed_modules(self)]
        scaled = [*packed, *(module for module in self.modules() if isinstance(module, Operands))]
        own = {id(p) for module in scaled for p in module.parameters(recurse=False) if not p.requires_grad}
        floating = (p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in own)
        return next(floating, packed[0].dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config.json and `hfquant*.safetensors`; takes the keywords of `PreTrainedModel.save_pretrained`."""
        save_native(self, super().save_pretrained, save_directory, push_to_hub, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of `nn.Module`; PEFT, where it looks for experts that a pattern names, also finds packed ones."""
        listed = super().named_parameters(*args, **kwargs)
        if not asked_by(_FINDS_EXPERTS):
            return listed
        experts = [(name, module) for name, module in packed_modules(self) if isinstance(module, QExperts)]
        views = [(f"{name}.{leaf}", module.view(leaf)) for name, module in experts for leaf in module.specs]
        return chain(listed, views)  # views count as parameters

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose how attention is computed. Raises UnsupportedError where that would skip quantized operands."""
        quantized = any(isinstance(module, Operands) for module in self.modules())
        if quantized and attn_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                f"the operands of this model's attention are quantized, {attn_implementation!r} would leave them as "
                f"they are: stay with {IMPLEMENTATION!r}, or quantize the model without attention=True"
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Look at adapters where PEFT leaves its configs: on the model that it has put them into."""
        if name == "peft_config":
            refuse_unreached(self, value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class, which can be imported."""
        return _empty_native, (self.original,), self.__dict__


def to_native(model: PreTrainedModel) -> None:
    """Give a model with packed weights its native class, in place."""
    original = type(model)
    if not issubclass(original, NativeModel):
        model.__class__ = _native_class(original)


def from_native(model: PreTrainedModel) -> None:
    """Give a model its own class back, in place."""
    if isinstance(model, NativeModel):
        model.__class__ = model.original


def _native_class(original: type[PreTrainedModel]) -> type[NativeModel]:
    names = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (NativeModel, original), names)


def _empty_native(original: type[PreTrainedModel]) -> NativeModel:
    cls = _native_class(original)
    return cls.__new__(cls)
