"""Text files that go with the trained test model: model card, held-out text and its licence."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .corpus import SourceFile, heldout_text, standard_library

CARD = """\
---
license: other
license_name: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny-llama

A small Llama that was really trained, for tests of quantization: {parameters:,} parameters, 4 layers of
hidden size 256, 8 query and 2 key/value heads of size 32, an untied output head, a byte-level BPE of 1024
entries, bfloat16 weights. It predicts Python source code and is no good for anything else.

## Training

| | |
| --- | --- |
| Text | sources of the standard library of CPython {python}, split by file |
| Train split | {train_files} files, {train_tokens:,} tokens |
| Training | {tokens:,} tokens ({epochs} epochs), {steps} steps, {minutes:.0f} min on {threads} CPU cores |
| Optimizers | Muon for the matrices in the blocks, AdamW for embeddings, head and norms |
| Valid perplexity | {valid_perplexity:.3f} |
| Test perplexity | {test_perplexity:.3f} |
| Perplexity on `heldout.txt` | {heldout_perplexity:.3f} (first {heldout_sequences} sequences of 256 tokens) |

Perplexities are per token, over separate sequences of 256 tokens, of the stored weights in float32
arithmetic. `training.json` holds the full record. Train a model like it with

    {command}

in the same versions of Python and PyTorch. The weights come out equal only on the same kind of CPU, and not
if the record says `cut_by_time`: the learning rate then followed the clock too, and the run may have been
interrupted and resumed.

## Licence

The training text is part of Python, copyright the Python Software Foundation, under the PSF License
Version 2. The held-out excerpts beside this directory carry that licence; see `LICENSE-heldout.txt`.
"""

NOTICE = """\
heldout.txt contains source files of the standard library of Python {version}, concatenated, each after a line
that names its path; only blank lines at their ends were removed.

They are distributed under the Python Software Foundation License Version 2. Some files carry notices of
other authors, which the text keeps. Python's own copyright notice reads:

{copyright}

"""


def write_heldout(directory: Path, files: Iterable[SourceFile], max_bytes: int, version: str) -> str:
    """Write ``heldout.txt``, whole test-split files up to ``max_bytes``, and its licence; return the text."""
    text = heldout_text(files, max_bytes)
    (directory / "heldout.txt").write_text(text, encoding="utf-8")
    licence = standard_library() / "LICENSE.txt"
    notice = NOTICE.format(version=version, copyright=sys.copyright)
    if licence.exists():
        notice += "The licence of that release follows.\n\n" + "-" * 80 + "\n\n" + licence.read_text(encoding="utf-8")
    (directory / "LICENSE-heldout.txt").write_text(notice, encoding="utf-8")
    return text


def write_card(directory: Path, record: dict[str, Any], heldout_sequences: int) -> None:
    """Write the model card, ``README.md``, from the training record."""
    train = record["corpus"]["train"]
    command = "python -m tests.models.train"
    if record["cut_by_time"]:
        command += f" --tokens {record['tokens']}"
    card = CARD.format(
        **record,
        command=command,
        minutes=record["seconds"] / 60,
        train_files=train["files"],
        train_tokens=train["tokens"],
        heldout_sequences=heldout_sequences,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
