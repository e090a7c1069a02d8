"""Two ranks compute what one process computes; what cannot be cut is refused before it is loaded."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig, UnsupportedError
from hfquant.blocks import Blocks
from hfquant.nn import QEmbedding, QLinear
from hfquant.parallel import kept_whole, plan_packed, why_not_split
from hfquant.quantize import pack, quantize_linear
from hfquant.recipe import Recipe
from hfquant.spec import InputSpec, Scheme, TensorSpec
from hfquant.testing.tiny import tiny_inputs, tiny_model
from tests.fresh import run_ranks

CONFIGS = {
    "int4": {"group_size": 8, "layout": "dense"},
    "int8": {"modules_to_not_convert": []},  # one scale per row, the head as well
    "quantile4": {"group_size": 8},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process, then two ranks: every configuration is loaded and run in the same pair of processes."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny_model("llama").save_pretrained(folder / "source")
    expected = {}
    for method, options in CONFIGS.items():
        model = load(folder / "source", quantization_config=HfQuantConfig(method, **options))
        model.save_pretrained(folder / method)
        with torch.no_grad():
            expected[method] = model(**tiny_inputs(model)).logits
    program = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    for done in run_ranks(program, folder, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
        assert done.returncode == 0, done.stderr[-4000:]
    return folder, expected


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("method", CONFIGS)
def test_two_ranks_give_the_logits_of_one_process(runs, method):
    folder, expected = runs
    for rank in (0, 1):
        got = torch.load(folder / f"{method}.{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["logits"], expected[method], rtol=1e-4, atol=1e-4)
        assert got["local bytes"] < 0.6 * got["whole bytes"]  # really split, not replicated


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_split_over_ranks_saves_whole(runs, method):
    folder, expected = runs
    model = load(folder / f"{method}.saved")
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(model)).logits, expected[method])


def test_quantizing_while_loading_on_several_ranks_is_refused(runs):
    message = torch.load(runs[0] / "on the fly.0.pt", weights_only=True)
    assert message.startswith("UnsupportedError") and "in one process" in message


def layer(spec: TensorSpec, rows: int, cols: int, layout=None, seen=None) -> QLinear:
    made = QLinear(cols, rows, None, torch.float32)
    made.kind = "linear"
    recipe = Recipe(Scheme(spec, seen), layout=layout)
    made.hold(*pack(quantize_linear(torch.randn(rows, cols), recipe), recipe))
    return made


DOUBLE = TensorSpec("int4", Blocks(1, 16), scale=TensorSpec("uint8", Blocks(1, 256)))
GROUPS = TensorSpec("int4", Blocks(1, 32))
REFUSED = {
    "rows do not divide": ("colwise", layer(GROUPS, 33, 64), "33 output features"),
    "tiles are cut": ("colwise", layer(TensorSpec("e4m3fn", Blocks(16, 16)), 40, 64), "cut blocks of 16 rows"),
    "columns do not divide": ("rowwise", layer(GROUPS, 32, 65), "65 input features"),
    "groups are cut": ("rowwise", layer(GROUPS, 32, 96), "cut groups of 32"),
    "ragged groups": ("rowwise", layer(GROUPS, 32, 88), "cut groups of 32"),
    "bytes are cut": ("rowwise", layer(TensorSpec("int3", Blocks(1, -1)), 32, 20), "cut a byte"),
    "zero points are cut": ("rowwise", layer(TensorSpec("uint4", Blocks(1, 32), True), 32, 64), "zero points"),
    "double quantization": ("colwise", layer(DOUBLE, 32, 64), "quantized themselves"),
    "input ranges": (
        "rowwise",
        layer(TensorSpec("int8", Blocks(1, -1)), 32, 64, seen=InputSpec(TensorSpec("int8", Blocks(1, -1)))),
        "span all input features",
    ),
    "embedding": ("embedding_rowwise", QEmbedding(8, 8, None, torch.float32), "embedding table"),
    "other style": ("packed_colwise", layer(GROUPS, 32, 64), "not known"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_cut_is_refused_with_the_reason(case):
    style, module, reason = case
    with pytest.raises(UnsupportedError, match=reason) as error:
        plan_packed([("model.layers.3.proj", module)], {"model.layers.*.proj": style}, 2)
    assert error.value.reasons[0].startswith("model.layers.3.proj: ")


def test_packed_experts_are_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=HfQuantConfig("int4"))
    with pytest.raises(UnsupportedError, match="packed experts"):
        plan_packed(model.named_modules(), dict(model.tp_plan), 2)


SPLIT = [
    GROUPS,
    TensorSpec("uint8", Blocks(1, -1), True),
    TensorSpec("uint4", Blocks(1, 32), "float32"),  # zero points that are numbers of their own share no byte
    TensorSpec("int4", Blocks(-1, -1)),
    TensorSpec("quantile4", Blocks(1, 16)),
    TensorSpec("e4m3fn", Blocks(8, 16)),
]


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
@pytest.mark.parametrize("spec", SPLIT, ids=str)
def test_parts_side_by_side_are_the_whole_matrix(style, spec):
    """The oracle is the uncut matrix: cut each tensor as planned, dequantize the parts, join them."""
    module = layer(spec, 32, 64)
    axis = 0 if style == "colwise" else 1
    assert why_not_split(module, style, 2) is None
    whole, parts = kept_whole(module.spec, style), []
    for rank in range(2):
        shape = (16, 64) if axis == 0 else (32, 32)
        part = QLinear(shape[1], shape[0], None, torch.float32)
        cut = {
            name: value if name in whole else value.chunk(2, axis)[rank]
            for name, value in zip(module.spec.names, module.packed(), strict=True)
        }
        part.hold(cut, type(module.spec)(module.spec.layout, shape, module.spec.scheme, module.spec.names))
        parts.append(part.weight.clone())
    assert torch.equal(torch.cat(parts, axis), module.weight)


def main(folder: Path) -> None:
    """What each of the two ranks runs."""
    from transformers import DistributedConfig

    rank = int(os.environ["RANK"])
    for method in CONFIGS:
        model = load(folder / method, distributed_config=DistributedConfig(tp_size=2))
        with torch.no_grad():
            result = {"logits": model(**tiny_inputs(model)).logits}
        packed = [m for m in model.modules() if isinstance(m, QLinear)]
        local = [m._parameters["codes"].to_local() for m in packed]
        result["local bytes"] = sum(t.numel() for t in local)
        result["whole bytes"] = sum(m._parameters["codes"].numel() for m in packed)
        torch.save(result, folder / f"{method}.{rank}.pt")
        model.save_pretrained(folder / f"{method}.saved")
    try:
        load(
            folder / "source",
            quantization_config=HfQuantConfig("int4"),
            distributed_config=DistributedConfig(tp_size=2),
        )
        message = "no error"
    except UnsupportedError as error:
        message = f"UnsupportedError: {error}"
    torch.save(message, folder / f"on the fly.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
