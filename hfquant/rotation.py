"""Rotation of a model's hidden states, which spreads outlier channels over all channels and leaves the function as it
is: QuaRot (Ashkboos et al. 2024).

With an orthogonal R, hidden states x become x R: embeddings E R, matrices that read the hidden states W R, matrices
that write them R^T W (section 4, stage 1a, after the gains of norms have moved into their readers). The values of each
attention head get a rotation of their own (stage 1c), and matrices whose input nothing can be folded into, behind an
activation function, are quantized in the Hadamard basis of their input (stage 1b).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import row_chunks
from .blockview import TOLERANCE, BlockView, OutsideView, Trial
from .errors import UnsupportedError
from .hadamard import hadamard, random_hadamard, random_signs
from .matrices import Matrix
from .norms import Norm, absorb_gain, find_norms, why_not_rotated
from .transforms import Transform

_SIGNS = "rotation signs"  # entries of what a transform remembers
_PATH = "value path"
_UNTIED = "untied"
_HEAD = range(8, 513)  # widths that an attention head may have
_POWER = 30.0  # times less change than without the second half of a rewrite: else the probe does not tell


def rotate_outside(
    view: OutsideView, seed: int = 0, residual: bool = True, value_heads: bool = True, online: bool = True
) -> None:
    """Rotate embeddings and output layer; `view.shared["basis"]` [H, H] float64 is the rotation R of hidden states.

    Raises UnsupportedError if the model cannot be rotated: for its norms before anything is changed, for what only
    shows in its output with a model that is of no use any more.
    """
    if not residual:
        return
    _check_outside(view)
    entering, output = view.passage(None)
    basis = random_hadamard(entering.shape[-1], seed)
    view.shared[_SIGNS], view.shared["basis"] = random_signs(entering.shape[-1], seed), basis
    if view.tied:
        untie(view)
    view.untied += view.shared.get(_UNTIED, [])  # where it is rotated twice, it was tied only the first time
    view.notes += [f"{name} was tied to the embeddings and is a matrix of its own now" for name in view.untied]
    signs = view.shared[_SIGNS]
    assert view.norm is not None
    absorb_gain(view.norm)
    for values in (*(table.weight.data for table in view.embeddings), *(m.values() for m in view.readers)):
        turn(values, signs)
    turned = _turned(entering, signs)
    after, back = view.passage(None)[0], view.passage(turned)[1]
    tolerance = max(TOLERANCE, 8 * torch.finfo(entering.dtype).eps)
    if (error := _change(after, turned)) > tolerance:
        raise UnsupportedError(
            f"a rotation of the embeddings does not rotate the hidden states that enter the first block (off by "
            f"{error:.1e}): something else than embeddings makes them. Leave the rotation out"
        )
    if (error := _change(back, output)) > tolerance:
        raise UnsupportedError(
            f"the output changes by {error:.1e} with rotated hidden states: something besides "
            f"{view.readers[0].name} reads them. Leave the rotation out"
        )


def _check_outside(view: OutsideView) -> None:
    kind = type(view.model).__name__
    if view.norm is None:
        raise UnsupportedError(
            f"{kind} cannot be rotated: no norm reads what leaves the last block (its norms come after attention and "
            "MLP)"
        )
    if reason := why_not_rotated(view.norm):
        raise UnsupportedError(f"{kind} cannot be rotated: {reason}")
    if not view.readers:
        raise UnsupportedError(
            f"{kind} cannot be rotated: no output layer reads {view.norm.name}, so that its output itself would be "
            "rotated. Load it with its head"
        )
    if not view.embeddings:
        raise UnsupportedError(f"{kind} cannot be rotated: its hidden states do not come from embeddings")


def untie(view: OutsideView) -> None:
    """Give output layers that share the table of an embedding a copy of their own, and let the configuration say so.

    Raises UnsupportedError for a model that does not say in its configuration whether they are tied.
    """
    config: Any = getattr(view.model, "config", None)
    candidates: list[Any] = [config, getattr(config, "text_config", None)]
    configs = [found for found in candidates if getattr(found, "tie_word_embeddings", False)]
    if not configs:
        raise UnsupportedError(
            f"{type(view.model).__name__} shares the embeddings with its output layer in a way that its configuration "
            "does not tell: a rotation needs them apart"
        )
    tables = {table.weight.data_ptr() for table in view.embeddings}
    for matrix in view.readers:
        if matrix.values().data_ptr() in tables:
            own = nn.Parameter(matrix.values().clone(), requires_grad=matrix.module.weight.requires_grad)  # type: ignore[arg-type]
            matrix.module.register_parameter(matrix.parameter, own)
            _forget_tie(view.model, f"{matrix.name}.{matrix.parameter}")
            view.shared.setdefault(_UNTIED, []).append(matrix.name)
    for found in configs:
        found.tie_word_embeddings = False
    view.tied = False


def _forget_tie(model: Any, name: str) -> None:
    """Take a parameter off the list of those that are not stored because they are copies of others."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if isinstance(ties, dict):
        model.all_tied_weights_keys = {end: source for end, source in ties.items() if name not in (end, source)}


def rotate(
    view: BlockView, seed: int = 0, residual: bool = True, value_heads: bool = True, online: bool = True
) -> None:
    """Rotate a block.

    `seed`: of the random signs of R. `residual`: rotate the hidden states. `value_heads`: rotate the values of each
    attention head. `online`: quantize the remaining matrices in the Hadamard basis of their input.
    Raises UnsupportedError if the block's function is not left as it is: blocks cannot be rotated one by one.
    """
    norms, groups = find_norms(view.name, view.module, view.output)
    read = {matrix.name for norm in norms for matrix in norm.readers}
    writers = [matrix for group in groups for matrix in group.matrices if matrix.name not in read]
    if residual:
        _rotate_residual(view, norms, writers)
    path = _find_path(view, norms, writers, value_heads)
    if value_heads and path is None:
        view.notes.append(f"{view.name}: no values of attention heads that could be rotated were found")
    if online:
        for group in view.groups:
            behind = path is not None and path.reader.name == group.name
            group.rotated = bool(group.targets) and not behind and group.name not in read


# The hidden states.


def _rotate_residual(view: BlockView, norms: list[Norm], writers: list[Matrix]) -> None:
    signs: Tensor = view.shared[_SIGNS]
    width = view.probe.shape[-1]
    before = [norm for norm in norms if norm.features == width and norm.readers]
    readers = [matrix for norm in before for matrix in norm.readers]
    writers = [matrix for matrix in writers if matrix.values().shape[0] == width]
    if not before:
        raise UnsupportedError(f"{view.name} cannot be rotated: no norm comes before its matrices")
    for norm in before:
        if reason := why_not_rotated(norm):
            raise UnsupportedError(f"{view.name} cannot be rotated: {reason}")
    _refuse_shared(view, [*readers, *writers])
    for norm in before:
        absorb_gain(norm)
    for matrix in readers:
        turn(matrix.values(), signs)
    biases = [bias[None] for matrix in writers if (bias := matrix.bias()) is not None]
    for values in (*(matrix.values().T for matrix in writers), *biases):
        turn(values, signs)
    expected = _turned(view.expected, signs)
    view.probe = _turned(view.probe, signs)
    view.expected = view.output()  # what later rewrites are held against
    error = _typical_change(view.expected, expected)
    view.trials.append(Trial("rotation of the hidden states", error, held=error <= TOLERANCE))
    if not error <= TOLERANCE:
        raise UnsupportedError(
            f"{view.name} cannot be rotated: its output changes by {error:.1e}. Something else reads or writes its "
            "hidden states, such as a norm after attention or MLP. A rotation of some blocks only is none: leave it out"
        )


def _typical_change(new: Tensor, old: Tensor) -> float:
    """Relative change of a token, the median over all tokens.

    Not of the largest ones alone, which some models have a few of, and not of the few that rounding sends to another
    expert. Something that was forgotten changes every token.
    """
    return float(((new - old).norm(dim=-1) / old.norm(dim=-1)).median())


def _refuse_shared(view: BlockView, matrices: list[Matrix]) -> None:
    seen: dict[int, str] = {}
    for matrix in matrices:
        other = seen.setdefault(matrix.values().data_ptr(), matrix.name)
        if other != matrix.name:
            raise UnsupportedError(f"{view.name} cannot be rotated: {matrix.name} and {other} share one tensor")


# The values of attention heads.


@dataclass(frozen=True)
class _Path:
    """Values flow head by head, `width` channels each, from the last `rows` rows of `source` to all of `reader`."""

    source: Matrix
    rows: int
    reader: Matrix
    width: int

    def key(self, prefix: str) -> tuple[str, str, int, int]:
        """What it is called in every block."""
        return self.source.name.removeprefix(prefix), self.reader.name.removeprefix(prefix), self.rows, self.width


def _find_path(view: BlockView, norms: list[Norm], writers: list[Matrix], keep: bool) -> _Path | None:
    """The path of the values through the attention of a block, found by rotating along it; `keep` the rotation.

    A rotation of q or k, of another width, or through an activation function moves the output.
    """
    known = view.shared.get(_PATH)
    paths = sorted(_paths(view, norms, writers), key=lambda path: path.key(view.name) != known)
    for path in paths:
        if _rotate_path(view, path, keep):
            view.shared[_PATH] = path.key(view.name)
            return path
    return None


def _paths(view: BlockView, norms: list[Norm], writers: list[Matrix]) -> Iterator[_Path]:
    """Candidates, most likely first: v is called after q and k, and where they are one matrix its rows come last."""
    sources = [m for norm in norms for m in reversed(norm.readers) if m.expert is None]
    for reader in writers:
        width, inner = reader.values().shape
        if reader.expert is not None or width != view.probe.shape[-1]:
            continue
        for source in sources:
            outer = source.values().shape[0]
            rows = outer if outer <= inner else (outer - inner) // 2
            shared = gcd(rows, inner) if rows > 0 else 1
            yield from (_Path(source, rows, reader, head) for head in reversed(_HEAD) if shared % head == 0)


def _rotate_path(view: BlockView, path: _Path, keep: bool) -> bool:
    """Rotate the values of each head if that changes nothing; whether it did not."""
    source, bias, reader = path.source.values()[-path.rows :], path.source.bias(), path.reader.values()
    written = [source] if bias is None else [source, bias[-path.rows :]]
    with view.attempt("rotation of the values alone", written, tolerance=-1.0) as half:
        _turn_values(written, path.width)
    # A reader that hides what its input does to the output proves nothing.
    bar = min(TOLERANCE, half.error / _POWER)
    with view.attempt("rotation of the values", [*written, reader], bar if keep else -1.0) as whole:
        _turn_values(written, path.width)
        _turn_heads(reader, path.width)
    return whole.error <= bar


def _turn_values(written: list[Tensor], width: int) -> None:
    """Rotate the rows of a weight [rows, K], and its bias [rows]."""
    for tensor in written:
        _turn_heads(tensor.T if tensor.dim() == 2 else tensor[None], width)


def _turn_heads(values: Tensor, width: int) -> None:
    """Rotate every run of `width` columns of `values` [n, K] in place."""
    runs = values.double().reshape(values.shape[0], -1, width)
    values.copy_(hadamard(runs).reshape(values.shape))


# Rotation itself.


def turn(values: Tensor, signs: Tensor) -> None:
    """Rotate the rows of a matrix [N, K] in place: W becomes W R."""
    for rows in row_chunks((values.shape[0], values.shape[1])):
        values[rows] = _turned(values[rows], signs)


def _turned(x: Tensor, signs: Tensor) -> Tensor:
    """`x` [..., K] R in the dtype of `x`, rounded once."""
    return hadamard(x.double() * signs.to(x.device)).to(x.dtype)


def _change(new: Tensor, old: Tensor) -> float:
    return float((new.float() - old.float()).norm() / old.float().norm())


ROTATE = Transform(rotate, rotate_outside)
BUILTIN = {"rotate": ROTATE}
