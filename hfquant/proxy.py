"""Proxy outliers: how far the weights behind each input of a linear layer spread.

Source: "The case for 4-bit precision" (Dettmers and Zettlemoyer 2023), section 3: the outlier columns of a layer are
its inputs whose producing weights have the largest standard deviation. As in the paper, the gain of a norm between
the two layers is not taken into account.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import FormatError, UnsupportedError
from .producers import WITHOUT, producers
from .weights import final_names


def producer_std(
    model: PreTrainedModel, checkpoint_files: Sequence[str] | None, consumers: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Standard deviation of the weights that produce each input of each linear layer.

    `model`: not quantized yet, may be on the meta device; left as it is. `checkpoint_files`: paths of its safetensors
    files, which are read one tensor at a time. `consumers`: names of the layers to look at, None for every linear
    layer whose producer is found. Returns [K] float32 on the CPU by name. Raises UnsupportedError when the model
    cannot be traced, holds fused experts, or a layer of `consumers` has no producer; FormatError when the weights of
    a producer are not in the files.
    """
    found = producers(model)
    for name in consumers or ():
        if name not in found:
            raise UnsupportedError(
                f"proxy outliers of {name}: no single layer produces its input ({type(model).__name__}); list it in "
                f"modules_to_not_convert, or {WITHOUT}"
            )
    wanted = {name: found[name] for name in (found if consumers is None else consumers)}
    spread = _read_spread(model, checkpoint_files, {producer.name for producer in wanted.values()})
    return {name: spread[producer.name][producer.rows] for name, producer in wanted.items()}


def _read_spread(model: PreTrainedModel, files: Sequence[str] | None, names: set[str]) -> dict[str, Tensor]:
    """Standard deviation [N] float32 of the rows of each named layer's weight, of the columns for an embedding."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise UnsupportedError(
            f"proxy outliers read the weights of {type(model).__name__} from safetensors files before they are loaded, "
            f"found {list(files or ())}: save the model as safetensors and load that, or {WITHOUT}"
        )
    wanted = {f"{name}.weight": name for name in names}
    for one, other in model.all_tied_weights_keys.items():  # a checkpoint holds either of two tied weights
        for key, twin in ((one, other), (other, one)):
            if key in wanted:
                wanted.setdefault(twin, wanted[key])
    final_name = final_names(model)
    spread: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                final, converted = final_name(key)
                name = wanted.get(final)
                if name is not None and not converted:
                    spread[name] = _spread(tensors.get_tensor(key), model.get_submodule(name))
    if missing := sorted(names - spread.keys()):
        raise FormatError(
            f"proxy outliers: {', '.join(files)} hold no tensor that is the weight of {', '.join(missing[:4])} as it "
            f"stands in {type(model).__name__}: save the loaded model with save_original_format=False and quantize "
            f"that, or {WITHOUT}"
        )
    return spread


def _spread(weight: Tensor, module: nn.Module) -> Tensor:
    """Standard deviation [N] float32 of the weights that make each of a layer's outputs."""
    by_column = isinstance(module, nn.Embedding | Conv1D)
    return weight.float().flatten(1).std(dim=0 if by_column else 1, correction=0)
