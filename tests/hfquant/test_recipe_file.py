"""Recipe files: what they may hold, and errors that name the line."""

import hashlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfquant.errors import SpecError
from hfquant.recipe_file import Workflow, read_recipe

NF4 = "quantize: {method: nf4}\n"


def read(folder: Path, text: str):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_a_recipe_holds_its_sections_its_lines_and_its_hash(tmp_path):
    text = "# says what\nquantize:\n  method: nf4\n  block_size: 64\nlora:\n  rank: 8\ntrain:\nexit: merge\n"
    recipe = read(tmp_path, text)
    assert recipe.quantize_keywords() == {"method": "nf4", "block_size": 64}
    assert recipe.workflow.lora is not None and recipe.workflow.lora.rank == 8
    assert recipe.workflow.train is not None  # a section without entries has its defaults
    assert recipe.workflow.exit == "merge" and recipe.workflow.evaluate is None
    assert recipe.at("quantize", "block_size") == f"{recipe.path}, line 4"
    assert recipe.at("lora", "alpha") == f"{recipe.path}, line 5"  # not given: its section
    assert recipe.label == {"file": "recipe.yaml", "sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    """YAML takes 2e-4 for a string."""
    train = read(tmp_path, NF4 + "lora:\ntrain: {learning_rate: 2e-4}\n").workflow.train
    assert train is not None and train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- int4\n", "a recipe has sections such as 'quantize', this holds list"),
        ("", "this holds NoneType"),
        ("quantize: [int4\n", "is not YAML"),
        ("quantize: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("method: int4\n", "write 'method' and its options into a section 'quantize:'"),
        ("evaluate:\n", "line 1: the recipe: there is nothing to do"),
        ("4: 5\n", "keys should be strings, got 4"),
        (NF4 + "lora:\n  rnk: 4\ntrain:\n", r"line 3: lora.rnk: there is no such entry; lora has rank, alpha, "),
        (NF4 + "lora:\n  alpha: 4\n  rank: 0\ntrain:\n", "line 4: lora.rank: .*greater than or equal to 1, got 0"),
        (NF4 + "tune:\n", "line 2: tune: there is no such entry; a recipe has quantize, lora, qat, train, exit, "),
        (NF4 + "lora:\n  targets: [q_proj, 3]\ntrain:\n", r"line 3: lora.targets.1: .*valid string, got 3"),
        (NF4 + "lora:\ntrain:\n  checkpointing: 1\n", "line 4: train.checkpointing: .*valid boolean, got 1"),
        (NF4 + "lora:\ntrain:\n  steps: 2.5\n", "line 4: train.steps: .*valid integer, got 2.5"),
        (NF4 + "lora:\n  pooled: true\n  dora: true\ntrain:\n", "line 2: lora: pooled adapters are plain ones"),
        (NF4 + "lora:\nexit: sell\n", "line 3: exit: .*'adapter', 'merge' or 'exact', got 'sell'"),
        ("quantize:\n  method: int4\n  bits: 4\n  method: nf4\n", "line 4: 'method' is given twice, first in line 2"),
        (NF4 + "train:\n", "'train' has nothing to train"),
        (NF4 + "lora:\n", "adapters that are not trained change nothing"),
        (NF4 + "lora:\nqat:\ntrain:\n", "write one of them"),
        ("lora:\ntrain:\nexit: merge\n", "exit: merge quantizes again, and there is no section 'quantize'"),
        (NF4 + "lora:\ntrain:\nexit: exact\n", r"exit: exact and lora: \{pooled: true\} go together"),
        (NF4 + "exit: merge\n", "'exit' is about adapters"),
        ("qat:\ntrain:\nlora:\n", "write one of them"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(SpecError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(SpecError) as caught:
        read(tmp_path, NF4 + "lora:\n  rank: x\n  drop: 1\ntrain:\n  length: 1\n")
    assert [line.split(": ")[0].rpartition(" ")[2] for line in str(caught.value).splitlines()] == ["3", "4", "6"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match=r"cannot read the recipe .*: No such file"):
        read_recipe(tmp_path / "absent.yaml")


sections = st.fixed_dictionaries(
    {"quantize": st.just({"method": "int4"}), "lora": st.fixed_dictionaries({"rank": st.integers(1, 512)})},
    optional={
        "train": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 10**6), "learning_rate": st.floats(1e-9, 1.0)}
        ),
        "evaluate": st.fixed_dictionaries({}, optional={"sequences": st.integers(1, 99)}),
    },
).map(lambda data: data | ({} if "train" in data else {"lora": data["lora"] | {"init": "eora"}}))


@given(sections)
def test_what_is_written_is_read_and_every_entry_has_its_line(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(data, sort_keys=False)
        recipe = read(Path(folder), text)
    assert recipe.workflow == Workflow.model_validate(data)
    for place, line in recipe.lines.items():
        if place:
            assert str(place[-1]) in text.splitlines()[line - 1]
