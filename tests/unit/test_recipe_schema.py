"""The JSON Schema and the reference say what the loader does."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mpt.recipe.catalog import list_recipes
from mpt.recipe.json_schema import DIALECT, recipe_schema
from mpt.recipe.load import check_recipe
from mpt.recipe.reference import recipe_reference
from mpt.recipe.schema import LossScaleSection, Recipe
from mpt.recipe.suggestions import sections
from mpt.recipe.training_keys import OWNED, RANGES, REMOVED, training_arguments
from mpt.recipe.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema.Draft202012Validator(recipe_schema())


def test_the_schema_is_itself_valid() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_in_configs_is_this_one() -> None:
    assert json.loads((ROOT / "configs/recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema()


@pytest.mark.parametrize("entry", list_recipes(), ids=lambda entry: entry.name)
def test_every_built_in_recipe_is_valid_under_the_schema_and_the_loader(entry: Any, validator: Any) -> None:
    validator.validate(read_yaml(entry.path.read_bytes()).value)
    assert check_recipe(entry.path) == []


@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        ({}, True),
        ({"precision": "bf16"}, True),
        ({"precision": {"mode": "bf16"}}, True),
        ({"tokenizer": "gpt2"}, True),
        ({"tokenizer": None}, True),
        ({"sample": "Hello"}, True),
        ({"sample": ["Hello", "Good bye"]}, True),
        ({"sample": {"prompt": ["Hello"], "temperature": 0.5}}, True),
        ({"sample": []}, False),
        ({"data": ["a.txt", "b.txt"]}, True),
        ({"offload": "cpu"}, True),
        ({"training": {"learning_rate": 1, "eval_strategy": "no"}}, True),
        ({"restart": {"backoff": 5, "step_timeout": "90s", "stop_before": "1.5h", "time_limit": "2d"}}, True),
        ({"restart": {"stop_before": "soon"}}, False),
        ({"restart": {"stop_before": -1}}, False),
        ({"precision": "bf17"}, False),
        ({"precison": "bf16"}, False),
        ({"micro_batch_size": 0}, False),
        ({"micro_batch_size": "8"}, False),
        ({"lora": {"rank": 0}}, False),
        ({"training": {"learning_rate": -1}}, False),
        ({"training": {"bf16": True}}, False),
        ({"training": {"adam_beta1": 1}}, False),
        ({"model": ""}, False),
    ],
)
def test_the_schema_and_the_loader_agree(keys: dict[str, Any], valid: bool, validator: Any, tmp_path: Path) -> None:
    values = {"model": "gpt2", "data": "a.txt"} | keys
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert validator.is_valid(values) is valid
    assert (check_recipe(path) == []) is valid


def test_every_key_of_every_section_says_what_it_means() -> None:
    for name, section in sections().items():
        for key, field in section.model_fields.items():
            if name != "training":
                assert field.description, f"{name}.{key}"


def test_the_tables_of_training_keys_name_real_keys() -> None:
    known = set(training_arguments())
    assert set(OWNED) <= known
    assert set(RANGES) <= known - set(OWNED)
    assert not set(REMOVED) & known


def test_every_key_is_in_the_reference() -> None:
    text = recipe_reference()
    for name, section in sections().items():
        assert f"### `{name}:`" in text or not name or name == "data.eval_source"  # which is as data.source
        if name != "training":
            assert all(f"| `{key}` |" in text for key in section.model_fields)
    assert all(f"| `{key}` |" in text for key in OWNED)


def test_the_tables_of_the_reference_have_rows_of_equal_width() -> None:
    for line in recipe_reference().splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") in (3, 5), line


def test_a_recipe_survives_the_way_through_json() -> None:
    for entry in list_recipes():
        recipe = Recipe.model_validate(read_yaml(entry.path.read_bytes()).value)
        written = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
        assert Recipe.model_validate(written) == recipe


@pytest.mark.parametrize(
    ("key", "largest", "beyond"),
    [
        ("initial", 2.0**126, 2.0**127),
        ("min", 65536.0, 1e39),
        ("static", 2.0**126, 1e39),
        ("growth_interval", 2**31 - 1, 2**31),
        ("hysteresis", 2**31 - 1, 2**31),
    ],
)
def test_a_loss_scale_stays_inside_what_torch_counts_in(key: str, largest: float, beyond: float) -> None:
    section = LossScaleSection.model_validate({key: largest})
    assert getattr(section, key) == largest
    with pytest.raises(ValueError, match="less than"):
        LossScaleSection.model_validate({key: beyond})
