"""How adapters start: with what quantizing took from the weights, instead of with nothing.

A stock LoRA adapter adds s B A to a layer. `initialize` fills B and A so that the layer is as near to the one of the
original model as their rank allows: by the difference of the weights alone ("loftq"), or by the difference of the
layer's outputs for given inputs ("eora"). The adapter stays a stock one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration_state import Tick
from ..config import HfQuantConfig
from ..errors import CalibrationError, SpecError, UnsupportedError
from ..lowrank import alternate, weighted_norm
from ..nn import PackedModule, QEmbedding
from ..qtensor import QTensor
from ..quantize import for_table, needs, quantize_linear
from ..recipe import Recipe
from ..requantize import requantize
from ..stats import CHANNELS, HESSIAN, HISTOGRAM, InputStats, Stats
from .adapters import active_adapter, adapted, put_factors, silenced
from .inputs import as_batches, gathered
from .original import Original
from .rewritten import Rewritten

METHODS = ("loftq", "eora")
ITERATIONS = 5  # of LoftQ, as in its paper
FAR = 0.95  # relative error of a weight beyond which it is hardly the one that was quantized: nothing at all has 1
_SEEN = frozenset({CHANNELS, HESSIAN})  # statistics that batches give


@dataclass(frozen=True)
class LayerInit:
    """How an adapter of a layer starts.

    `before`, `after`: error of the layer without and with it, relative to the layer: |E| / |W|, or with inputs
    |E x| / |W x| (root mean squares). `iteration`: the one that was best, 0 where nothing was to be corrected; in later
    ones than the first the base was quantized again. `tokens`: how many were seen, None without inputs.
    """

    name: str
    rank: int
    before: float
    after: float
    iteration: int
    tokens: int | None = None

    @property
    def requantized(self) -> bool:
        """Whether the base layer has new codes, which the adapter belongs to."""
        return self.iteration > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def initialize(
    model: Any,
    source: str | Path,
    method: str = "loftq",
    *,
    iterations: int | None = None,
    batches: Sequence[Any] | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    tick: Tick | None = None,
) -> list[LayerInit]:
    """Fill the LoRA adapter of a quantized model (PEFT's `PeftModel`) from the original weights in `source`.

    `source`: the model that was quantized, in full precision: a folder, or a Hub repository at `revision`. `method`:

    - "loftq" quantizes W - s B A and corrects what is left in turns, `iterations` times (5), and keeps the best. With
      one iteration the base model stays as it is; with more its codes may change, and it has to be saved along with the
      adapter: see `adapters.save_base`.
    - "eora" corrects the outputs for the inputs in `batches`, in closed form; the base model stays as it is.

    `batches`: keywords of the model, or token ids [B, L] int64, of text as the model is going to see it: a few times as
    many tokens as its widest layer has inputs. Errors are then those of outputs, for "loftq" too. `adapter`: its name,
    None for the active one. `tick` is called with a layer's name and the share that is done.

    New codes are found as the recipe says, on the numbers that the layer has. A recipe that reads calibration data gets
    it from `batches`; where it needs more than they tell (drift, rotated inputs) `requantize` rounds to nearest
    instead. Without `batches` such a layer keeps its codes and is only corrected: rounding to nearest lowers the error
    of its weights and undoes what calibration did for its outputs. The aim is the original layer: what GPTAQ (drift)
    fitted to the errors of layers before it is drawn back there.

    Adapters of layers that are not quantized stay as they are, and so do directions that need no correction: they start
    as PEFT made them, with B = 0. DoRA's magnitudes follow. Returns what was found for each layer, none worse than
    before. Raises SpecError, CalibrationError and UnsupportedError before any layer is changed where that can be known.
    """
    turns = _check(method, iterations, batches)
    name = active_adapter(model, adapter)
    layers = adapted(model, name, turns)
    base = model.get_base_model()
    config = _config_of(base)
    original = _original(source, base, config.recipe, batches, revision)
    found: list[LayerInit] = []
    with closing(_parts(model, name, layers, batches)) as parts:
        for key, stats in (item for part in parts for item in part.items()):
            if tick is not None:
                tick(key, len(found) / len(layers))
            found.append(_fill(key, layers[key], name, original, config.recipe, turns, stats))
    return found


def _check(method: str, iterations: int | None, batches: Sequence[Any] | None) -> int:
    """The number of iterations. Raises SpecError and CalibrationError for requests that make no sense."""
    if method not in METHODS:
        raise SpecError(f"method is one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if batches is not None and not len(batches):
        raise CalibrationError("batches is empty: give some text")
    if method == "eora":
        if batches is None:
            raise CalibrationError('method "eora" corrects outputs and needs inputs for that: give batches')
        if iterations not in (None, 1):
            raise SpecError('method "eora" leaves the base as it is: leave iterations out, or use "loftq" with batches')
        return 1
    turns = ITERATIONS if iterations is None else iterations
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise SpecError(f"iterations is a whole number, at least 1, got {iterations!r}")
    return turns


def _config_of(base: Any) -> HfQuantConfig:
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, HfQuantConfig):
        raise SpecError(f"{type(base).__name__} was not loaded with hfquant: load it with an HfQuantConfig")
    return config


def _original(
    source: str | Path, base: Any, recipe: Recipe, batches: Sequence[Any] | None, revision: str | None
) -> Original:
    """The original weights as they were when they were quantized."""
    if not recipe.transforms:
        return Original(source, base, revision)
    return Rewritten(source, base, recipe, None if batches is None else as_batches(batches)[0], revision)


# Inputs.


def _parts(
    model: Any, adapter: str, layers: dict[str, Any], batches: Sequence[Any] | None
) -> Generator[dict[str, InputStats | None]]:
    """The layers a part at a time, each with what is known of its inputs."""
    if batches is None:
        yield dict.fromkeys(layers)
        return
    if tables := [name for name, layer in layers.items() if isinstance(layer.get_base_layer(), QEmbedding)]:
        raise UnsupportedError(
            f"{tables[0]} is looked up and has no inputs to weigh errors by: leave it out of target_modules, or use "
            '"loftq" without batches'
        )
    widths = {name: layer.get_base_layer().in_features for name, layer in layers.items()}
    with silenced(model, adapter, layers):
        for part in gathered(model, layers, widths, as_batches(batches), _SEEN):
            if unseen := [name for name, stats in part.items() if not stats.tokens]:
                raise CalibrationError(
                    f"no token of the batches reaches {', '.join(unseen[:4])}: give batches that do, or leave it out "
                    "of target_modules"
                )
            yield dict(part)


# One layer.


def _fill(
    name: str, layer: Any, adapter: str, original: Original, recipe: Recipe, turns: int, stats: InputStats | None
) -> LayerInit:
    """Correct one layer."""
    base = layer.get_base_layer()
    start = base.qtensor()
    w = original.weight(name, start.shape).to(start.codes.device)
    _check_related(name, w, start, original, recipe)
    moment = None
    if stats is not None:
        assert stats.gram is not None
        moment = (stats.gram / stats.tokens).to(w.device)
    quantize = _quantizer(name, base, start, recipe, stats)
    rank = layer.r[adapter]
    made = alternate(w, start, quantize or (lambda values: start), rank, turns if quantize else 1, moment)
    if made.q is not start:
        base.put(made.q)
    put_factors(layer, adapter, made.factors)
    error = w - made.q.dequantize() - layer.get_delta_weight(adapter).float().to(w.device)
    size = max(weighted_norm(w, moment), torch.finfo(torch.float32).tiny)
    errors = made.before / size, weighted_norm(error, moment) / size
    return LayerInit(name, rank, *errors, made.iteration, None if stats is None else stats.tokens)


def _check_related(name: str, w: Tensor, q: QTensor, original: Original, recipe: Recipe) -> None:
    """Raise SpecError for a weight that is not the one that was quantized: nothing of the same size is as far off."""
    far = float((w - q.dequantize()).norm() / w.norm().clamp_min(1e-30))
    if far > FAR:
        steps = ", ".join(step.name for step in recipe.transforms)
        rewritten = f", or the rewriting of its recipe ({steps}) cannot be followed" if steps else ""
        raise SpecError(
            f"{name}: the weight in {original.source} is not what the model holds (off by {far:.0%}): it was made from "
            f"another one{rewritten}. Give the model that it was made from, or attach the adapter to a new one"
        )


def _quantizer(
    name: str, base: PackedModule, start: QTensor, recipe: Recipe, stats: InputStats | None
) -> Callable[[Tensor], QTensor] | None:
    """What finds new codes for a layer on the numbers that it has, None where there is nothing better than it has."""
    own = replace(recipe, scheme=base.spec.scheme, layout=base.spec.layout)
    own = for_table(own) if isinstance(base, QEmbedding) else own
    asked = needs(own) - {HISTOGRAM}  # of inputs' ranges, which stay
    if asked and stats is None:
        return None
    if not asked <= _SEEN or (asked and start.rotated):
        return lambda values: requantize(values, start)
    facts = Stats(name, inputs=stats, grid_is_given=True)
    none = torch.empty(0, dtype=torch.int64, device=start.codes.device)
    columns = none if start.outliers is None else start.outliers.index.long()
    return lambda values: quantize_linear(values, own, facts, columns, start.rotated)
