"""Whatever stands in a recipe, the answer is a Recipe or a list of problems with remedies; never another exception."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpt.errors import RecipeError
from mpt.recipe.catalog import list_recipes
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe
from mpt.recipe.suggestions import sections
from mpt.recipe.yaml_text import read_yaml

TEXTS = [entry.path.read_text(encoding="utf-8") for entry in list_recipes()]
KEYS = sorted({key for section in sections().values() for key in section.model_fields} | {"", "<<", "lr", "bf16", "0"})
WORDS = [
    "auto",
    "bf16",
    "no",
    "yes",
    "true",
    "8",
    "1_000",
    "2e-5",
    "cpu",
    "hub:a/b",
    "hub:",
    "builtin:x",
    "",
    " ",
    "\x00",
]
EXAMPLES = settings(
    max_examples=1200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**63, 10**400, 1e400, -0.0])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe | None]:
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"

    def load(raw: bytes | str, overrides: Sequence[str] = ()) -> Recipe | None:
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
        try:
            recipe = load_recipe(path, overrides)
        except RecipeError as error:
            check_error(error, path, overrides)
            return None
        assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_unset=True)) == recipe
        json.dumps(recipe.model_dump(mode="json"), allow_nan=False)
        return recipe

    return load


def check_error(error: RecipeError, path: Path, overrides: Sequence[str]) -> None:
    assert error.problems and error.remedy
    for problem in error.problems:
        assert problem.file in (str(path), *overrides)
        assert problem.problem and problem.suggestion, problem
        assert problem.line is None or problem.line >= 1
        for noise in ("function-", "literal[", "Input should", "pydantic", "validation error"):
            assert noise not in problem.problem + problem.suggestion, problem


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key, below in value.items() if isinstance(value, dict) else []:
        found += paths_of(below, (*path, key))
    return found


@given(data=st.data())
@EXAMPLES
def test_any_value_in_any_place(answer: Callable[..., Recipe | None], data: st.DataObject) -> None:
    recipe = read_yaml(data.draw(st.sampled_from(TEXTS))).value
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(paths_of(recipe)[1:] or [("model",)]))
        here = recipe
        for part in way:
            here = here[part]
        change = data.draw(st.sampled_from(["value", "key", "remove", "add"]))
        if change == "value":
            here[last] = data.draw(values)
        elif change == "add":
            here[data.draw(st.sampled_from(KEYS))] = data.draw(values)
        elif change == "key":
            here[data.draw(st.sampled_from(KEYS) | st.text(max_size=6))] = here.pop(last)
        else:
            here.pop(last)
    # JSON is YAML, save for the names of what is not finite.
    text = json.dumps(recipe).replace("NaN", ".nan").replace("Infinity", ".inf")
    answer(text)


@given(text=st.sampled_from(TEXTS), data=st.data())
@EXAMPLES
def test_any_change_of_the_text(answer: Callable[..., Recipe | None], text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.sampled_from([0, 0, 1, 2, 5, 40]))
        insert = data.draw(st.sampled_from([*"\t\n :-[]{}&*!|>'\"%@#,?~\\", "\n  ", "- ", "&a ", "*a", "<<: ", "---\n",
                                            "!!int ", "? ", "\r", "\ufeff", "\u2028", "\x85", "\0", "\ud800"])
                           | st.text(max_size=4))  # fmt: skip
        text = text[:start] + insert + text[start + length :]
    answer(text)


@given(text=st.sampled_from(TEXTS), data=st.data())
@EXAMPLES
def test_any_change_of_the_bytes(answer: Callable[..., Recipe | None], text: str, data: st.DataObject) -> None:
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    answer(bytes(raw))


@given(raw=st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"%@#,?~ \n\t<0", max_size=40))
@EXAMPLES
def test_any_file(answer: Callable[..., Recipe | None], raw: bytes | str) -> None:
    answer(raw)


@given(
    text=st.sampled_from(TEXTS),
    overrides=st.lists(
        st.tuples(
            st.lists(st.sampled_from(KEYS) | st.text(max_size=4), min_size=1, max_size=4).map(".".join),
            values.map(lambda value: json.dumps(value)) | st.text(max_size=8),
        ).map("=".join)
        | st.text(max_size=8),
        max_size=3,
    ),
)
@EXAMPLES
def test_any_override(answer: Callable[..., Recipe | None], text: str, overrides: list[str]) -> None:
    answer(text, overrides)
