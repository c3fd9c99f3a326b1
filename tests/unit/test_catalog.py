"""The built-in recipes are found by name, from a checkout and from an installed package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpt
from mpt.errors import RecipeError
from mpt.recipe.catalog import CatalogEntry, copied_text, find_built_in, find_recipe, list_recipes
from mpt.recipe.load import load_recipe

ROOT = Path(mpt.__file__).parent.parent


def test_every_built_in_recipe_is_listed_with_what_it_is_for() -> None:
    entries = list_recipes()
    assert {"quickstart", "gpt2-pretrain", "llama2-7b-qlora", "llama3-8b-zero3"} <= {entry.name for entry in entries}
    assert all(entry.description for entry in entries)
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)


@pytest.mark.parametrize("entry", list_recipes(), ids=lambda entry: entry.name)
def test_a_built_in_recipe_is_short_and_says_how_to_launch_it(entry: CatalogEntry) -> None:
    path = entry.path
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert lines[0] == "# yaml-language-server: $schema=../configs/recipe.schema.json"
    assert lines[1].startswith(f"# mpt train {path.stem}")
    assert max(map(len, lines)) <= 120
    assert load_recipe(path).training_keys["max_steps"] > 0


def test_a_name_finds_the_built_in_recipe() -> None:
    assert find_recipe("quickstart") == find_built_in("quickstart") == ROOT / "recipes/quickstart.yaml"


def test_a_file_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("model: gpt2\n", encoding="utf-8")
    assert find_recipe("quickstart") == Path("quickstart")


def test_a_directory_does_not_hide_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart") == ROOT / "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstrt", "did you mean quickstart?"),
        ("some/where/quickstart.yml", "did you mean quickstart?"),
        ("banana", "built in are"),
        ("x" * 5000, ""),
        ("../recipes/quickstart", "quickstart"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_ones(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as raised:
        find_recipe(name)
    (problem,) = raised.value.problems
    assert problem.file == name
    assert words in problem.suggestion


def test_a_copy_loses_the_editors_line_and_nothing_else() -> None:
    path = find_built_in("quickstart")
    assert copied_text(path).splitlines() == path.read_text(encoding="utf-8").splitlines()[1:]


def test_an_installed_package_finds_the_recipes_inside_itself(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mpt", tmp_path / "mpt", ignore=shutil.ignore_patterns("__pycache__", "training"))
    shutil.copytree(ROOT / "recipes", tmp_path / "mpt/recipes")
    program = "from mpt.recipe.catalog import find_recipe; print(find_recipe('quickstart'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert Path(done.stdout.strip()) == tmp_path / "mpt/recipes/quickstart.yaml"
