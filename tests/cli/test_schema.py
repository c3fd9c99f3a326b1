"""`mpt schema` prints the JSON Schema that `configs/` holds."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mpt.cli.schema import schema
from mpt.errors import MptError
from mpt.recipe.json_schema import recipe_schema

app = typer.Typer()
app.command()(schema)


def test_the_schema_goes_to_stdout() -> None:
    result = CliRunner().invoke(app, [], catch_exceptions=False)
    assert json.loads(result.stdout) == recipe_schema()
    assert result.stderr == ""


def test_the_schema_goes_to_a_file(tmp_path: Path) -> None:
    target = tmp_path / "schema.json"
    result = CliRunner().invoke(app, ["-o", str(target)], catch_exceptions=False)
    assert result.stdout == ""
    assert json.loads(target.read_text(encoding="utf-8")) == recipe_schema()


def test_a_place_that_can_not_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(MptError, match="can't write"):
        CliRunner().invoke(app, ["-o", str(tmp_path / "none" / "schema.json")], catch_exceptions=False)
