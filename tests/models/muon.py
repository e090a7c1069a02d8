"""Muon: momentum whose update is orthogonalised, for the 2-D weights inside the blocks.

See Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients (a, b, c) that push singular values towards 1 fastest, from the Muon write-up."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate ``U V^T`` of each matrix ``U S V^T`` in a ``(batch, rows, columns)`` stack, in bfloat16.

    The iteration is tolerant of rounding: singular values land in about 0.7 to 1.2 whatever the precision.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x: Tensor = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    # The Frobenius norm bounds the spectral norm, which the iteration needs to be at most 1.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update and decoupled weight decay, for 2-D parameters.

    ``lr`` is the spectral norm of one update of a square or wide weight; a tall one gets
    ``sqrt(rows / columns)`` more, so that the root-mean-square output of every layer moves equally.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        """Keep the settings; ``momentum`` and ``weight_decay`` are per step."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; equal shapes go through one batched iteration."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_stack(parameters, group)

    def _step_stack(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            average: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(average, momentum))
        stack = orthogonalise(torch.stack(updates))
        scale = max(1.0, stack.size(-2) / stack.size(-1)) ** 0.5
        for parameter, update in zip(parameters, stack, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)
