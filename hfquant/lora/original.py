"""The weights that a quantized model was made from, one at a time, under the names that its layers have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..source import original_config
from ..weights import Weights, local_files, skeleton


class Original:
    """The full-precision checkpoint of a loaded model, a folder or a Hub repository: read weight by weight.

    Raises SpecError for a checkpoint that is quantized itself or of another architecture.
    """

    def __init__(self, source: str | Path, model: Any, revision: str | None = None) -> None:
        config = original_config(source, revision)
        own = getattr(model, "original", type(model))
        if type(config) is not type(model.config):
            raise SpecError(
                f"{source} is a {config.model_type}, the quantized model a {model.config.model_type}: give the model "
                "that it was made from"
            )
        self.source = source
        self.skeleton = skeleton(config, torch.float32, own)
        self.weights = Weights(self.skeleton, local_files(source, revision))

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The weight [N, K] float32 of the layer `name`, of that `shape`. Raises SpecError if there is none such."""
        full = f"{name}.weight"
        wanted = {full, self.weights.ties.get(full, full)}
        self.weights.load(lambda parameter: parameter in wanted)
        found = self._loaded(name, shape)
        self.weights.free(lambda parameter: True)  # those that it is tied to as well
        return found

    def _loaded(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A copy of a weight that is in the skeleton."""
        module = dict(self.skeleton.named_modules()).get(name)
        found = None if module is None else module._parameters.get("weight")
        if module is None or found is None:
            raise SpecError(f"{self.source} has no layer {name}: give the model that the quantized one was made from")
        w = found.data.T if type(module).__name__ == "Conv1D" else found.data
        if w.shape != shape:
            raise SpecError(
                f"{name} has shape {tuple(w.shape)} in {self.source}, {shape} in the quantized model: give the model "
                "that it was made from"
            )
        return w.clone(memory_format=torch.contiguous_format)
