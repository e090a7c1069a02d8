"""What a quantized weight costs at the output of its layer, from statistics that all tokens are in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hfquant.stats import InputStats

_SMALL = 1024  # columns up to which every candidate is measured exactly
_LEADING, _ITERATIONS = 64, 3  # eigenvectors of the sketch, and steps towards them
_SKETCH = "sketch of the Gram matrix"


@dataclass(frozen=True)
class Sketch:
    """A matrix near to a Gram matrix G: `leading` leading^T + diag(`rest`), [K, r] and [K] float32.

    The errors of rounding hardly know of each other, so that what their squares weigh, the diagonal, is kept exactly,
    and of the rest what common errors would weigh most.
    """

    leading: Tensor
    rest: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Sketch:
        """Subspace iteration (Halko et al. 2011, algorithm 4.4) with a fixed start."""
        start = torch.randn(len(gram), _LEADING, generator=torch.Generator().manual_seed(0)).to(gram.device)
        basis = torch.linalg.qr(gram @ start).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(gram @ basis).Q
        values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
        leading = basis @ (vectors * values.clamp_min(0).sqrt())
        return cls(leading, (gram.diagonal() - leading.square().sum(1)).clamp_min(0))

    def part(self, columns: slice) -> Sketch:
        """The same for some columns."""
        return Sketch(self.leading[columns], self.rest[columns])

    def quadratic(self, d: Tensor) -> Tensor:
        """d G d^T [N] for each row of `d` [N, K]."""
        return (d @ self.leading).square().sum(1) + d.square() @ self.rest


class OutputError:
    """Squared error of the outputs of the rows of W [N, K], as a function of the change D = W' - W of the weights.

    With z the input as the layer sees it, quantized or not, and x the input itself, it is

        E |z D^T - (x - z) W^T|^2 = tr(D G D^T) - 2 tr(D P^T) + constant,  G = E z z^T,  P = W E (x - z) z^T,

    and the constant is left out. G and P say all about the data, however many tokens there are. `sketch` of a wide G,
    for looking at many candidates in less time: its leading eigenvectors and the rest of its diagonal. Where tokens and
    outputs are weighed, so are the means and the rows.
    """

    def __init__(self, w: Tensor, inputs: InputStats | None, name: str = "") -> None:
        """`inputs` has the Gram matrix of z, and the drift from z to x if they differ; None weighs all alike.

        `name`: of W, for the weights of its outputs.
        """
        self.counts: Tensor | None = None
        self.gram: Tensor | None = None
        self.pull: Tensor | None = None
        self.sketch: Sketch | None = None
        if inputs is None or inputs.gram is None or inputs.tokens == 0:
            return
        self.gram = (inputs.gram / inputs.tokens).float().to(w.device)
        if inputs.drift is not None:
            self.pull = w.float() @ (inputs.drift / inputs.tokens).float().to(w.device)
        if w.shape[1] > _SMALL:
            if _SKETCH not in inputs.memo:  # the other layers that read this input need the same
                inputs.memo[_SKETCH] = Sketch.of(self.gram)
            self.sketch = inputs.memo[_SKETCH]
        if name in inputs.outputs:
            self.counts = inputs.outputs[name].to(w.device)

    def part(self, columns: slice) -> OutputError:
        """The same for some columns, as if the others kept their values."""
        made = copy.copy(self)
        made.gram = None if self.gram is None else self.gram[columns, columns]
        made.pull = None if self.pull is None else self.pull[:, columns]
        if made.sketch is not None:
            made.sketch = made.sketch.part(columns) if len(made.sketch.rest[columns]) > _SMALL else None
        return made

    def rows(self, rows: slice) -> OutputError:
        """The same for some rows."""
        made = copy.copy(self)
        made.pull = None if self.pull is None else self.pull[rows]
        made.counts = None if self.counts is None else self.counts[rows]
        return made

    def exact(self, d: Tensor) -> Tensor:
        """The error [N] of each row for the change `d` [N, K] float32."""
        weighed = d if self.gram is None else d @ self.gram
        return self._pulled((weighed * d).sum(1), d)

    def rough(self, d: Tensor) -> Tensor:
        """The same, with the sketch in the place of G if there is one."""
        return self.exact(d) if self.sketch is None else self._pulled(self.sketch.quadratic(d), d)

    def _pulled(self, quadratic: Tensor, d: Tensor) -> Tensor:
        error = quadratic if self.pull is None else quadratic - 2 * (self.pull * d).sum(1)
        return error if self.counts is None else error * self.counts
