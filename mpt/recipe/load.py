"""A recipe file and its overrides -> Recipe, or everything that is wrong with them, each with its place and remedy."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpt.errors import RecipeError, RecipeProblem
from mpt.recipe.overrides import Override, apply_overrides
from mpt.recipe.rules import broken_rules
from mpt.recipe.schema import Recipe
from mpt.recipe.schema_errors import show, validate
from mpt.recipe.yaml_text import MAX_BYTES, Document, read_yaml
from mpt.recipe.yaml_tree import Flaw, KeyPath
from mpt.secrets import holds_secret, secret_values


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with `key.path=value` overrides over it; raises RecipeError with every problem at once."""
    recipe, problems = _read(path, overrides)
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def check_recipe(path: Path, overrides: Sequence[str] = ()) -> list[RecipeProblem]:
    """Name every problem of a recipe, in the order of its lines; an empty list: it is valid."""
    return _read(path, overrides)[1]


def _read(path: Path, overrides: Sequence[str]) -> tuple[Recipe | None, list[RecipeProblem]]:
    name = str(path)
    raw, unreadable = _read_bytes(path)
    if unreadable is not None:
        return None, [unreadable]
    document = read_yaml(raw)
    if not isinstance(document.value, dict):
        return None, [_to_problem(flaw, name, document, []) for flaw in document.flaws or [_not_a_map(document)]]
    applied, problems = apply_overrides(document.value, overrides)
    recipe, flaws = _judge(document.value)
    replaced = {override.path for override in applied}
    flaws = [flaw for flaw in document.flaws if not any(flaw.path[: len(path)] == path for path in replaced)] + flaws
    before = _flaws_without_overrides(raw) if applied and flaws else None
    found: dict[str, RecipeProblem] = {}
    for flaw in flaws:
        problem = _to_problem(flaw, name, document, applied, before)
        found.setdefault(problem.key, problem)
    problems += sorted(found.values(), key=lambda problem: (problem.line is None, problem.line or 0))
    return recipe, problems


def _read_bytes(path: Path) -> tuple[bytes, RecipeProblem | None]:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1), None
    except FileNotFoundError:
        problem, suggestion = "there is no such file", "check the path; `mpt recipes list` names the built-in recipes"
    except IsADirectoryError:
        problem, suggestion = "is a directory", "give a recipe file"
    except PermissionError:
        problem, suggestion = "may not be read", "give yourself the permission to read it"
    except (OSError, ValueError) as error:
        problem, suggestion = f"can't be read: {error}", "give a readable file"
    return b"", RecipeProblem(str(path), None, "", problem, suggestion)


def _not_a_map(document: Document) -> Flaw:
    suggestion = "write at least `model:` and `data:`; `mpt recipes show quickstart` shows a whole recipe"
    if document.value is None:
        return Flaw((), "holds no keys", suggestion, 1)
    return Flaw((), f"must be a map of keys (got {show(document.value)})", suggestion, document.lines[()])


def _judge(values: dict[str, Any]) -> tuple[Recipe | None, list[Flaw]]:
    recipe, flaws = validate(values)
    exposed = list(_secrets((), values, secret_values(os.environ)))
    flaws = [flaw for flaw in flaws if flaw.path not in {one.path for one in exposed}]
    return recipe, exposed + (flaws if recipe is None else broken_rules(recipe))


def _secrets(path: KeyPath, value: Any, secrets: Sequence[str]) -> Iterator[Flaw]:
    """Refuse credentials: a recipe is copied into the run directory, into checkpoints and into trackers."""
    if isinstance(value, str) and holds_secret(value, secrets):
        yield Flaw(
            path,
            "holds a credential, and a recipe is copied into the run directory",
            "leave it out and set it in the environment: HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD",
        )
    elif isinstance(value, (dict, list)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secrets((*path, key), entry, secrets)


def _flaws_without_overrides(raw: bytes) -> set[tuple[KeyPath, str]]:
    _, flaws = _judge(read_yaml(raw).value)
    return {(flaw.path, flaw.problem) for flaw in flaws}


def _to_problem(
    flaw: Flaw,
    name: str,
    document: Document,
    applied: Sequence[Override],
    before: Iterable[tuple[KeyPath, str]] | None = None,
) -> RecipeProblem:
    """Give a flaw its place: the argument that set the value, or the line of the nearest key that the file has."""
    key = ".".join(map(str, flaw.path))
    argument = _blame(flaw, applied, before)
    if argument is not None:
        return RecipeProblem(argument, None, key, flaw.problem, flaw.suggestion)
    line = flaw.line
    path = flaw.path
    while line is None and path:
        line = document.lines.get(path)
        path = path[:-1]
    return RecipeProblem(name, line, key, flaw.problem, flaw.suggestion)


def _blame(flaw: Flaw, applied: Sequence[Override], before: Iterable[tuple[KeyPath, str]] | None) -> str | None:
    """Find the override that a flaw comes from: the last that set the key, or else the last if the file alone is free
    of the flaw."""
    for override in reversed(applied):
        if flaw.path[: len(override.path)] == override.path:
            return override.argument
    if before is None or flaw.line is not None or (flaw.path, flaw.problem) in before:
        return None
    near = [one for one in applied if flaw.path and one.path[0] == flaw.path[0]]
    return (near or list(applied))[-1].argument
