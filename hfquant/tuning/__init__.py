"""Fine-tuning by a recipe: quantize, attach adapters, train, leave, measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration_state import Tick

if TYPE_CHECKING:
    from .report import TuningReport


def finetune(
    recipe: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    eval_data: str | Path | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    push: str | None = None,
    private: bool = True,
    tick: Tick | None = None,
) -> TuningReport:
    """Carry out a recipe file on the model `model` (a folder or a Hub repository) and write the result to `out`.

    `data`: what to train on, and to calibrate on if the recipe names nothing else; forms as in `HfQuantConfig`. Of
    conversations it learns what the assistant says, unless the recipe asks for all.
    `eval_data`: a text file to measure on; by default a part of `data` is kept back. `max_steps`, `seed`: in place of
    what the recipe says. `push`: a repository on the Hub to upload the result to, `private` or not. `device`: by
    default a GPU if there is one. `tick(what, share)` is called as the work goes on.

    `out` appears whole or not at all: with adapters, they are there and the quantized model is in `out/base`; otherwise
    the quantized model itself is there. What is finished is kept beside it until then, and the same call goes on where
    a killed one stopped, unless `resume` is False. Under `accelerate launch` several processes train together.

    Raises SpecError for a recipe, a model, data or options that cannot be used, before any weight is read.
    """
    from .request import Request
    from .run import run

    request = Request(recipe, model, out, data, eval_data, max_steps, seed, device, overwrite, resume, push, private)
    return run(request, tick or (lambda what, share: None))
