"""`mpt validate`: every problem of every recipe, without a machine, a model or a network."""

import json
from typing import Annotated

import typer

from mpt.errors import ExitCode, RecipeError, RecipeProblem


def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, names of built-in recipes; key.path=value.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check recipes and name every problem with its file, line, key and remedy. Exit code 2 if there is one."""
    overrides = [argument for argument in recipes if is_override(argument)]
    names = [argument for argument in recipes if argument not in overrides]
    if not names:
        raise typer.BadParameter("give a recipe before the key.path=value", param_hint="RECIPE")
    found = {name: problems_of(name, overrides) for name in names}
    problems = [problem for of_one in found.values() for problem in of_one]
    if as_json:
        print(json.dumps({"valid": not problems, "errors": [to_json(problem) for problem in problems]}, indent=2))
    else:
        for name, of_one in found.items():
            print("\n".join(str(problem) for problem in of_one) or f"{name}: valid")
    if problems:
        raise typer.Exit(ExitCode.USAGE)


def is_override(argument: str) -> bool:
    """Tell `key.path=value` from a path or name."""
    from pathlib import Path

    return "=" in argument and not Path(argument).exists()


def problems_of(name: str, overrides: list[str]) -> list[RecipeProblem]:
    from mpt.recipe.catalog import find_recipe
    from mpt.recipe.load import check_recipe

    try:
        return check_recipe(find_recipe(name), overrides)
    except RecipeError as error:
        return list(error.problems)


def to_json(problem: RecipeProblem) -> dict[str, str | int | None]:
    return {
        "file": problem.file,
        "line": problem.line,
        "key": problem.key,
        "problem": problem.problem,
        "suggestion": problem.suggestion,
    }
