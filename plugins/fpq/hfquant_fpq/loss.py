"""What a quantized weight costs at the output of its layer, from statistics that all tokens are in."""

from __future__ import annotations

import copy

from torch import Tensor

from hfquant.stats import InputStats

_SMALL = 1024  # columns up to which every candidate is measured exactly


class OutputError:
    """Squared error of the outputs of the rows of W [N, K], as a function of the change D = W' - W of the weights.

    With z the input as the layer sees it, quantized or not, and x the input itself, it is

        E |z D^T - (x - z) W^T|^2 = tr(D G D^T) - 2 tr(D P^T) + constant,  G = E z z^T,  P = W E (x - z) z^T,

    and the constant is left out. G and P say all about the data, however many tokens there are. `sample`: some z, for
    looking at many candidates in less time. Where tokens and outputs are weighed, so are the means and the rows.
    """

    def __init__(self, w: Tensor, inputs: InputStats | None, name: str = "") -> None:
        """`inputs` has the Gram matrix of z, and the drift from z to x if they differ; None weighs all alike.

        `name`: of W, for the weights of its outputs.
        """
        self.counts: Tensor | None = None
        self.gram: Tensor | None = None
        self.pull: Tensor | None = None
        self.sample: Tensor | None = None
        if inputs is None or inputs.gram is None or inputs.tokens == 0:
            return
        self.gram = (inputs.gram / inputs.tokens).float().to(w.device)
        if inputs.drift is not None:
            self.pull = w.float() @ (inputs.drift / inputs.tokens).float().to(w.device)
        if w.shape[1] > _SMALL and len(inputs.sample):
            self.sample = inputs.sample.to(w.device)
            if len(inputs.weights):
                self.sample = self.sample * inputs.weights.sqrt().to(w.device)[:, None]
        if name in inputs.outputs:
            self.counts = inputs.outputs[name].to(w.device)

    def part(self, columns: slice) -> OutputError:
        """The same for some columns, as if the others kept their values."""
        made = copy.copy(self)
        made.gram = None if self.gram is None else self.gram[columns, columns]
        made.pull = None if self.pull is None else self.pull[:, columns]
        made.sample = None if self.sample is None else self.sample[:, columns]
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
        """The same, with the quadratic part over the sample alone where that is less work."""
        if self.sample is None:
            return self.exact(d)
        return self._pulled((d @ self.sample.T).square().sum(1) / len(self.sample), d)

    def _pulled(self, quadratic: Tensor, d: Tensor) -> Tensor:
        error = quadratic if self.pull is None else quadratic - 2 * (self.pull * d).sum(1)
        return error if self.counts is None else error * self.counts
