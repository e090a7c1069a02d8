"""Language models of a real one's shape with random weights, quantized ones without a matrix in floating point."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant.coverage import survey
from hfquant.nn import QLinear
from hfquant.recipe import Recipe
from hfquant.swap import swap_in

from .peers import linear4bit
from .setting import Llama, Setting
from .weights import FORMATS, random_packed

BF16, BNB = "bf16", "bitsandbytes nf4"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(llama: Llama) -> LlamaConfig:
    """A Llama of a shape."""
    return LlamaConfig(
        hidden_size=llama.hidden,
        intermediate_size=llama.inner,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.heads,
        vocab_size=llama.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def build(name: str, setting: Setting) -> LlamaForCausalLM:
    """A model by the name of its format; `BF16` is in bfloat16, `BNB` is quantized by bitsandbytes."""
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config(setting.sizes.llama), dtype=torch.bfloat16)
    targets, _ = survey(model, None, False)  # the output layer stays as it is, as usual
    if name == BNB:
        for target in targets:
            parent, _, leaf = target.name.rpartition(".")
            old = model.get_submodule(target.name)
            setattr(model.get_submodule(parent), leaf, linear4bit(tuple(old.weight.shape), setting.device))
    elif name != BF16:
        format = FORMATS[name]
        swap_in(model, targets, Recipe(format.scheme, layout=format.layout))
        fill_packed(model, name, setting.device)
    fill(model, setting.device)
    model.config.use_cache = True
    return model.eval()


def fill_packed(model: nn.Module, name: str, device: torch.device) -> None:
    """Weights for all quantized layers: the values of a shape are made once, each layer has them in its own memory."""
    made: dict[tuple[int, int], dict[str, Tensor]] = {}
    for module in model.modules():
        if isinstance(module, QLinear):
            shape = module.spec.shape
            if shape not in made:
                made[shape], spec = random_packed(shape, FORMATS[name], device)
                assert spec == module.spec, "a model has what single layers are measured with"
            module.hold({key: tensor.clone() for key, tensor in made[shape].items()}, module.spec)


def fill(model: nn.Module, device: torch.device) -> None:
    """Values for everything else: random matrices, norms that do nothing."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            values = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() == 2:
                values.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
