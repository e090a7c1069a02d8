"""How fast is a language model of 7 billion parameters, token by token and for a prompt?

A static cache, and every step as one CUDA graph, so that Python takes no part. Each model decodes the same tokens with
and without its graph.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from hfquant.backend import load_all

from .findings import Findings
from .models import BF16, build
from .setting import Setting
from .timing import Contender, clock_of, race
from .weights import kernel_of

MODELS = (BF16, "int4 g128", "nf4 g64", "fp8 rows", "w8a8")


class Decoder:
    """A model that writes one token after the other behind a prompt [1, L], all state in tensors that stay in place."""

    def __init__(self, model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> None:
        self.model, self.length = model, prompt.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=self.length + tokens + 8)
        out = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first: Tensor = out.logits[:, -1:].argmax(-1)
        self.token = self.first.clone()

    def rewind(self) -> None:
        """Go back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        self.token.copy_(self.first)

    def step(self, number: int = 0) -> None:
        """Read a token, write the next."""
        out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def text(self, step: Any, tokens: int) -> list[int]:
        """The first tokens that a way to take steps gives."""
        self.rewind()
        found = []
        for _ in range(tokens):
            step()
            found.append(int(self.token))
        return found


def decode(setting: Setting, model: LlamaForCausalLM, prompt: Tensor) -> dict[str, Any]:
    """Seconds for a token, and whether the graph decodes what the model does."""
    tokens, clock = setting.sizes.llama.tokens, clock_of(setting)
    decoder = Decoder(model, prompt, tokens)
    plain = decoder.text(decoder.step, min(8, tokens))
    run, how = clock.prepare(decoder.step, 1, False)
    same = decoder.text(run, min(8, tokens)) == plain

    def whole() -> None:
        for _ in range(tokens):
            run()

    took = []
    for _ in range(4):
        decoder.rewind()
        took.append(clock.seconds(whole) / tokens)
    return {"decode": median(took[1:]), "how": how, "same_text": same}


class Reader:
    """A model that reads a prompt [1, L] into a static cache, again and again, without waiting for the device."""

    def __init__(self, model: LlamaForCausalLM, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1])
        self.read()

    def read(self, number: int = 0) -> Tensor:
        """Logits [1, 1, V] behind the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()
        out: Tensor = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return out


def prefill(setting: Setting, model: LlamaForCausalLM, length: int) -> dict[str, Any]:
    """Seconds for a prompt, as one graph."""
    reader = Reader(model, prompt_of(setting, length))
    return race(setting, {"prefill": Contender(reader.read, 1)}, 3)["prefill"]


def prompt_of(setting: Setting, length: int) -> Tensor:
    """Random tokens [1, L]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(setting.sizes.llama.vocabulary, (1, length), generator=generator).to(setting.device)


@torch.no_grad()
def run(setting: Setting, findings: Findings, models: tuple[str, ...] = MODELS) -> None:
    """All models one after the other."""
    load_all()
    for name in setting.while_time(findings, "models", models):
        with findings.row(model=name) as line:
            started = time.monotonic()
            model = build(name, setting)
            clock_of(setting).finish()
            line["build"] = time.monotonic() - started
            line["kernel"] = "none" if name == BF16 else kernel_of(model)
            line["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
            first, *lengths = setting.sizes.llama.prompts
            line |= decode(setting, model, prompt_of(setting, first))
            line["prefill"] = {str(length): prefill(setting, model, length) for length in lengths or [first]}
            del model
