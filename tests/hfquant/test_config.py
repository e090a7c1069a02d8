"""The config: what it accepts, what it refuses, and what config.json keeps of it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from hfquant import BackendError, FormatError, HfQuantConfig, SpecError
from hfquant.backend import Backend, register, unregister
from hfquant.presets import kbit
from hfquant.recipe import PRESETS
from hfquant.testing.tiny import tiny_model
from tests import fresh

METHODS = [name for name in PRESETS.names() if PRESETS.owner(name) == "core [hfquant]"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("int4", {"group_size": 32, "symmetric": False, "range": {"name": "mse", "norm": 2.4}}),
    ("nf4", {"double_quant": True, "outliers": 0.02}),
    ("int8", {"range": {"name": "percentile", "percentile": 99.5}, "modules_to_not_convert": [], "embeddings": True}),
    ("e2m1", {"block_size": 32, "scale_dtype": "float16", "modules_to_not_convert": ["mlp"], "layout": "bytes"}),
]


def through_json(config: HfQuantConfig) -> HfQuantConfig:
    return AutoQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))


# Names and options


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nf5", {}, r"unknown method 'nf5'\. Did you mean 'nf4'\? Installed are .*dynamic3, .*int8, nf4"),
        ("int4", {"grop_size": 64}, r"method 'int4' has no option 'grop_size': its options are block_size, group_size"),
        ("int4", {"range": "msee"}, r"unknown range 'msee'\. Did you mean 'mse'\? Installed are absmax, .*mse, perc"),
        ("int4", {"range": {"name": "mse", "nrm": 1}}, r"range 'mse' has no option 'nrm': its options are norm, steps"),
        ("int4", {"range": {"norm": 2}}, r'a step is a name or \{"name": \.\.\., options\}'),
        ("int4", {"scale_dtype": "int8"}, r"scales are stored as float32, float16, bfloat16"),
        ("int4", {"scale_dtype": torch.bfloat16}, r"'scale_dtype' holds torch\.bfloat16 \(dtype\).*\"bfloat16\""),
        ("int4", {"layout": "nibble"}, r"unknown layout 'nibble'\. .*Installed are bytes, dense"),
        ("int8", {"layout": "dense"}, r"layout 'dense' cannot store int8"),
        ("int4", {"group_size": 0}, r"group_size is at least 2"),
        ("int4", {"block_size": 0}, r"block_size is at least 2"),
        ("int4", {"range": {"name": "mse", "norm": "x"}}, r"range 'mse': option 'norm' is a number like 2\.0, got 'x'"),
        ("int4", {"group_size": float("nan")}, r"'group_size' holds nan"),
        ("int4", {"range": {"name": "mse", "norm": {1, 2}}}, r"'range' holds \{1, 2\} \(set\)"),
        ("nf4", {"symmetric": False}, r"symmetric=False needs an integer method"),
        ("int4", {"outliers": "many"}, r"outliers is the share of input columns .* got 'many'"),
        (4, {}, r"the name of a method is a string, got 4"),
        ("int4", {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is a list of names or None"),
    ],
)
def test_wrong_request_says_what_there_is(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        HfQuantConfig(method, **options)


# Round trips


@pytest.mark.parametrize(("method", "options"), [*((name, {}) for name in METHODS), *VARIANTS])
def test_round_trip(method: str, options: dict[str, Any]) -> None:
    config = HfQuantConfig(method, **options)
    again = through_json(config)
    assert again == config and again.recipe == config.recipe and again.to_dict() == config.to_dict()
    for copied in (copy.deepcopy(config), copy.copy(config)):
        assert copied == config and copied.recipe == config.recipe
    assert json.loads(repr(config).removeprefix("HfQuantConfig ")) == config.to_dict()
    assert AutoQuantizationConfig.from_dict({"quant_method": "hfquant", "method": method, **options}) == config


def test_equality_tells_requests_apart() -> None:
    assert HfQuantConfig("int4") == HfQuantConfig("int4")
    assert HfQuantConfig("int4") != HfQuantConfig("int4", group_size=32)
    assert HfQuantConfig("int4") != HfQuantConfig("int5")
    assert HfQuantConfig("int4") != HfQuantConfig("int4").to_dict()
    with pytest.raises(TypeError, match="unhashable"):
        hash(HfQuantConfig("int4"))


def test_config_shares_nothing_with_its_arguments_and_its_dict() -> None:
    step, skip = {"name": "mse", "steps": 20}, ["lm_head"]
    config = HfQuantConfig("int4", range=step, modules_to_not_convert=skip)
    before = copy.deepcopy(config)
    step["steps"] = 3
    skip.append("mlp")
    written = config.to_dict()
    written["options"]["range"]["steps"] = 4
    written["modules_to_not_convert"].append("mlp")
    written["recipe"]["range"]["steps"] = 4
    assert config == before


def test_tuple_becomes_the_list_that_comes_back() -> None:
    backend = Backend("listed", presets={"listed": lambda sizes=(): kbit("int4", group_size=sizes[0])})
    register(backend, "test")
    try:
        config = HfQuantConfig("listed", sizes=(32, 64))
        assert config.options == {"sizes": [32, 64]}
        assert through_json(config) == config
    finally:
        unregister(backend, "test")


@pytest.mark.parametrize("limit", [float("inf"), float("-inf")])
def test_infinity_survives_the_file(limit: float, tmp_path: Path) -> None:
    """JSON has no infinity; transformers writes an object in its place."""
    backend = Backend("limited", presets={"limited": lambda limit=0.0: kbit("int4")})
    register(backend, "test")
    try:
        config = HfQuantConfig("limited", limit=limit)
        model_config = LlamaConfig(num_hidden_layers=1)
        model_config.quantization_config = config
        model_config.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}") if name == "NaN" else 0.0)
        stored = LlamaConfig.from_pretrained(tmp_path).quantization_config
        assert AutoQuantizationConfig.from_dict(stored).options == {"limit": limit}
    finally:
        unregister(backend, "test")


# Recipes


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    entries = ("method: int4", "group_size: 32", "range: {name: mse, norm: 2.4}", "modules_to_not_convert: []")
    path.write_text("quantize:\n" + "".join(f"  {entry}\n" for entry in entries))
    options = {"group_size": 32, "range": {"name": "mse", "norm": 2.4}, "modules_to_not_convert": []}
    assert HfQuantConfig.from_recipe(path) == HfQuantConfig("int4", **options)
    assert HfQuantConfig.from_recipe(str(path)) == HfQuantConfig.from_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize:\n  method: int4\n  group: 4\n", "line 3: method 'int4' has no option 'group'"),
        ("# one\nquantize:\n  method: 4\n", "line 2: .*is a string, got 4"),
        ("quantize:\n  group_size: 4\n", "line 1: quantize.method: is missing"),
        ("lora: {init: eora}\n", "has no section 'quantize'"),
    ],
)
def test_wrong_recipe_names_the_file_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        HfQuantConfig.from_recipe(path)
    assert str(path) in str(caught.value)


# What a checkpoint says


def stored(**changes: Any) -> dict[str, Any]:
    return {**HfQuantConfig("int4").to_dict(), **changes}


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_other_format_version_is_refused(version: Any) -> None:
    with pytest.raises(FormatError, match=r"hfquant format .*, this version reads 1: update hfquant"):
        HfQuantConfig.from_dict(stored(format_version=version))


UNNAMED = (
    "quant_method",
    "format_version",
    "calibration",
    "rotated",
    "schemes",
    "attention",
)  # the last four are younger than the format


@pytest.mark.parametrize("name", ["calibration", "rotated", "schemes", "attention"])
def test_checkpoint_from_before_a_field_still_loads(name: str) -> None:
    data = stored()
    del data[name]
    assert HfQuantConfig.from_dict(data) == HfQuantConfig.from_dict(stored())


@pytest.mark.parametrize("name", [name for name in stored() if name not in UNNAMED])
def test_missing_field_is_named(name: str) -> None:
    data = stored()
    del data[name]
    with pytest.raises(FormatError, match=rf"has no {name}: the file was changed"):
        HfQuantConfig.from_dict(data)


def test_a_recorded_scheme_is_checked_like_a_recipe() -> None:
    scheme = stored()["recipe"]["scheme"]
    other = {**scheme, "weight": {**scheme["weight"], "grid": "e2m1"}}
    config = HfQuantConfig.from_dict(stored(schemes={"layer": other}))
    assert HfQuantConfig.from_dict(config.to_dict()) == config and config.schemes == {"layer": other}
    for damaged in ({}, None, {**scheme, "weight": 4}):
        with pytest.raises(FormatError, match="is damaged"):
            HfQuantConfig.from_dict(stored(schemes={"layer": damaged}))
    with pytest.raises(SpecError, match="unknown grid 'int99'"):
        HfQuantConfig.from_dict(stored(schemes={"layer": {**scheme, "weight": {**scheme["weight"], "grid": "int99"}}}))


@pytest.mark.parametrize("recipe", [None, [], {}, {"scheme": {}}, {**stored()["recipe"], "range": "absmax"}])
def test_damaged_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(FormatError, match="the recipe of quantization_config is damaged"):
        HfQuantConfig.from_dict(stored(recipe=recipe))


def test_missing_plugin_prints_the_pip_line() -> None:
    needed = {"gone": {"distribution": "hfquant-gone", "version": "2.1"}}
    with pytest.raises(BackendError) as caught:
        HfQuantConfig.from_dict(stored(plugins=needed))
    message = str(caught.value)
    assert "backend 'gone' of hfquant-gone 2.1, which is not installed" in message
    assert message.splitlines()[-1].strip() == "pip install hfquant-gone"


HOSTILE = [
    "evil; rm -rf ~",
    "evil\nrm -rf ~",
    "--index-url=http://evil",
    "-rfile",
    "git+https://evil/x",
    "./here",
    "\x1b[2Jevil",
    "evil ",
    "",
    None,
    4,
    ["x"],
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_an_untrusted_file_are_never_repeated(text: Any) -> None:
    """What stands after `pip install` gets copied into a shell."""
    for needed in ({"distribution": text, "version": "1"}, {"distribution": "fine", "version": text}, text):
        with pytest.raises(BackendError) as caught:
            HfQuantConfig.from_dict(stored(plugins={"gone": needed}))
        message = str(caught.value)
        assert message.splitlines()[-1].strip() in ("pip install <its distribution>", "pip install fine")
        assert not (isinstance(text, str) and text.strip() and text.strip() in message)
        assert message.isprintable() or message.replace("\n", "").isprintable()


@pytest.mark.parametrize("plugins", [None, "gone", ["gone"]])
def test_plugins_that_are_no_mapping_are_refused(plugins: Any) -> None:
    with pytest.raises(FormatError, match="'plugins' of quantization_config is a mapping"):
        HfQuantConfig.from_dict(stored(plugins=plugins))


def test_a_checkpoint_makes_nothing_run_or_load() -> None:
    """No process is started, and no module imported because a file names it."""
    program = (
        "import json, sys, hfquant\n"
        "from hfquant import BackendError, HfQuantConfig\n"
        "started = []\n"
        "kinds = ('subprocess', 'os.system', 'os.exec', 'socket')\n"
        "watch = lambda event, args: started.append(event) if event.startswith(kinds) else None\n"
        "data = HfQuantConfig('int4').to_dict()\n"
        "data['plugins'] = {'this': {'distribution': 'this', 'version': '1'}}\n"
        "before = set(sys.modules); sys.addaudithook(watch)\n"
        "try: HfQuantConfig.from_dict(data)\n"
        "except BackendError: print(json.dumps([started, 'this' in sys.modules]))\n"
    )
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], False]


# With a model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama quantized to nf4."""
    folder = tmp_path_factory.mktemp("config")
    tiny_model("llama").save_pretrained(folder / "plain")
    config = HfQuantConfig("nf4", block_size=32)
    AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config).save_pretrained(folder / "nf4")
    return folder


def test_own_config_for_a_quantized_model_changes_nothing_and_says_so(saved: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(saved / "nf4", quantization_config=HfQuantConfig("int8"))
    assert model.config.quantization_config.method == "nf4"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoModelForCausalLM.from_pretrained(saved / "nf4")


def test_config_for_a_model_of_another_method_is_refused(saved: Path, tmp_path: Path) -> None:
    other = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads((saved / "plain" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig but you are passing a HfQuantConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig("int8"))


def test_one_config_for_two_models_stays_as_it_was(saved: Path) -> None:
    """What loading notes (skipped modules, outlier columns) belongs to the model, not to the caller's object."""
    config = HfQuantConfig("int8")
    before = config.to_dict()
    models = [AutoModelForCausalLM.from_pretrained(saved / "plain", quantization_config=config) for _ in range(2)]
    assert config.to_dict() == before
    first, second = (model.config.quantization_config for model in models)
    assert first is not second and first == second and first.skipped is not None
