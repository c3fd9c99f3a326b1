"""A found block and overrides go into a recipe's text, which keeps its other lines and its values' types."""

import pytest

from mpt.measuring.recipe_text import with_overrides
from mpt.recipe.yaml_text import read_yaml

TEXT = """\
# mine
model: m  # short
data: {source: r, sequence_length: 32}
precision:
  mode: bf16
training:
  max_steps: 3
  save_steps: 3  # once
"""
BLOCK = "precision: {mode: bf16}\n"
BEFORE, AFTER = TEXT.split("precision:\n  mode: bf16\n")
WITHOUT_CHANGES = BEFORE + BLOCK + AFTER


@pytest.mark.parametrize(
    ("overrides", "old", "new"),
    [
        ([], "", ""),
        (["precision.mode=fp8", "precision=fp32"], "", ""),  # the block says it all
        (["training.max_steps=4"], "max_steps: 3\n", "max_steps: 4\n"),
        (["training.save_steps=4"], "save_steps: 3  # once", "save_steps: 4  # once"),
        (["training.save_steps=4", "training.save_steps=0.5"], "save_steps: 3  # once", "save_steps: 0.5  # once"),
        (["data.sequence_length=16"], "{source: r, sequence_length: 32}", "{source: r, sequence_length: 16}"),
        (["data.source=a/b.txt"], "{source: r,", "{source: a/b.txt,"),
        (["data=builtin:x"], "{source: r, sequence_length: 32}", "builtin:x"),
        (["model=a#b"], "model: m  # short", "model: a#b  # short"),
        (["training.eval_steps=5"], "training:\n", "training:\n  eval_steps: 5\n"),
        (["name=two words"], "# once\n", "# once\nname: two words\n"),
        (["lora={rank: 4}"], "# once\n", "# once\nlora: {rank: 4}\n"),
    ],
)
def test_an_override_of_a_line_changes_that_line_alone(overrides: list[str], old: str, new: str) -> None:
    assert with_overrides(TEXT, BLOCK, overrides) == (WITHOUT_CHANGES.replace(old, new, 1), True)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["training={max_steps: 5}"], {"training": {"max_steps": 5}}),
        (["training.save_steps=null"], {"training": {"max_steps": 3}}),
        (["lora.rank=4", 'name="1e5"'], {"lora": {"rank": 4}, "name": "1e5"}),
        (
            ["lora.rank=4", "training.save_steps=0.5"],
            {"lora": {"rank": 4}, "training": {"max_steps": 3, "save_steps": 0.5}},
        ),
    ],
)
def test_what_no_line_can_take_is_written_anew_with_every_value_as_it_was(
    overrides: list[str], changes: dict[str, object]
) -> None:
    text, is_kept = with_overrides(TEXT, BLOCK, overrides)
    value = read_yaml(text).value
    assert not is_kept
    assert value == read_yaml(WITHOUT_CHANGES).value | changes
    assert type(value["training"]["max_steps"]) is int
    assert type(value.get("name", "")) is str
