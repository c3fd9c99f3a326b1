"""`mpt recipes` lists, shows and copies, and never overwrites."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mpt.cli.recipes import app
from mpt.errors import MptError
from mpt.recipe.catalog import find_built_in, list_recipes
from mpt.recipe.load import check_recipe


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_list_names_every_recipe_and_what_it_is_for() -> None:
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [entry.name for entry in list_recipes()]
    assert all(entry.description in line for entry, line in zip(list_recipes(), lines, strict=True))


def test_list_as_json_is_one_object() -> None:
    rows = json.loads(run("list", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == [entry.name for entry in list_recipes()]
    assert all(Path(row["path"]).is_file() for row in rows)


def test_show_prints_the_file() -> None:
    assert run("show", "quickstart").stdout == find_built_in("quickstart").read_text(encoding="utf-8")


def test_a_copy_is_valid_and_its_place_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("copy", "quickstart").stdout == "quickstart.yaml\n"
    assert check_recipe(tmp_path / "quickstart.yaml") == []


def test_a_copy_goes_into_a_directory_or_to_a_file(tmp_path: Path) -> None:
    run("copy", "quickstart", str(tmp_path))
    run("copy", "quickstart", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "quickstart.yaml").read_bytes() == (tmp_path / "mine.yaml").read_bytes()


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(MptError, match="exists"):
        run("copy", "quickstart", str(target))
    assert target.read_text(encoding="utf-8") == "mine"


def test_a_place_that_can_not_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(MptError, match="can't write"):
        run("copy", "quickstart", str(tmp_path / "none" / "mine.yaml"))


@pytest.mark.parametrize("command", ["show", "copy"])
def test_an_unknown_name_is_answered_with_the_near_ones(command: str) -> None:
    with pytest.raises(MptError, match="did you mean quickstart"):
        run(command, "quickstrt")
