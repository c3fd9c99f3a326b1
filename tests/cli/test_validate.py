"""`mpt validate` names every problem of every file, and its exit code says whether there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from mpt.cli.validate import validate

app = typer.Typer()
app.command()(validate)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text("model: gpt2\ndata: a.txt\nprecison: bf16\ntraining:\n  learning_rate: -1\n", encoding="utf-8")
    return str(path)


def test_valid_recipes_are_named() -> None:
    result = run("quickstart", "gpt2-pretrain")
    assert (result.exit_code, result.stdout) == (0, "quickstart: valid\ngpt2-pretrain: valid\n")


def test_all_problems_of_all_files_are_printed(bad: str) -> None:
    result = run(bad, "quickstart", "none.yaml")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        f"{bad}:3: precison: is no key of a recipe; did you mean precision?",
        f"{bad}:5: training.learning_rate: must be at least 0 (got -1); write a number that is at least 0",
        "quickstart: valid",
        next(line for line in result.stdout.splitlines() if line.startswith("none.yaml: there is no such file")),
    ]


def test_json_is_one_object_with_every_error(bad: str) -> None:
    code, answer = run_json(bad, "quickstrt")
    assert code == 2
    assert answer["valid"] is False
    assert [(error["file"], error["line"], error["key"]) for error in answer["errors"]] == [
        (bad, 3, "precison"),
        (bad, 5, "training.learning_rate"),
        ("quickstrt", None, ""),
    ]
    assert all(set(error) == {"file", "line", "key", "problem", "suggestion"} for error in answer["errors"])


def test_json_of_a_valid_recipe() -> None:
    assert run_json("quickstart") == (0, {"valid": True, "errors": []})


def test_overrides_are_checked_with_the_recipe() -> None:
    assert run_json("quickstart", "training.max_steps=5")[0] == 0
    code, answer = run_json("quickstart", "training.max_steps=many")
    assert code == 2
    assert answer["errors"][0]["file"] == "training.max_steps=many"


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a=b.yaml"
    path.write_text("model: gpt2\ndata: a.txt\n", encoding="utf-8")
    assert run(str(path)).stdout == f"{path}: valid\n"


@pytest.mark.parametrize("arguments", [[], ["training.max_steps=5"]])
def test_no_recipe_at_all_is_a_usage_error(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_process_ends_with_the_documented_code(bad: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "validate", bad, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["valid"] is False
