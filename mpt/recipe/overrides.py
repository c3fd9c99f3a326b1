"""`key.path=value` arguments: read like a recipe, put over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpt.errors import RecipeProblem
from mpt.recipe.schema import SHORT_FORMS
from mpt.recipe.suggestions import sections
from mpt.recipe.yaml_text import read_yaml
from mpt.recipe.yaml_tree import MAX_DEPTH, Flaw


@dataclass(frozen=True, slots=True)
class Override:
    """One argument: what it sets, and to what."""

    argument: str
    path: tuple[str, ...]
    value: Any


def read_override(argument: str) -> tuple[Override | None, list[RecipeProblem]]:
    """Split `key.path=value` and read the value as YAML. None where nothing can be set."""
    key, separator, text = argument.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not separator:
        return None, [_problem(argument, (), "has no `=`", "write key.path=value: training.learning_rate=2e-5")]
    if not all(path):
        return None, [_problem(argument, (), "names no key before the `=`", "write key.path=value: precision=fp16")]
    if len(path) > MAX_DEPTH:
        return None, [_problem(argument, (), f"is nested more than {MAX_DEPTH} deep", "set a key of the recipe")]
    document = read_yaml(text)
    problems = [
        _problem(argument, (*path, *(str(part) for part in flaw.path)), flaw.problem, flaw.suggestion)
        for flaw in document.flaws
    ]
    if document.is_readable and not document.flaws and document.value is None and not text.strip():
        problems.append(_problem(argument, path, "has no value", f"write {key}=null to leave the key out"))
    return (None if problems else Override(argument, path, document.value)), problems


def apply_override(values: dict[str, Any], override: Override) -> list[RecipeProblem]:
    """Set the value in place, making the maps on the way to it. A map replaces what stood there, and null takes a key
    of the schema away, back to its default."""
    here = values
    for depth, part in enumerate(override.path[:-1], start=1):
        below: Any = here.get(part)
        if below is None:
            below = {}
        elif depth == 1 and part in SHORT_FORMS and not isinstance(below, dict):
            below = {SHORT_FORMS[part]: below}
        if not isinstance(below, dict):
            flaw = _below_a_value(override, depth, below)
            return [_problem(override.argument, flaw.path, flaw.problem, flaw.suggestion)]
        here[part] = below
        here = below
    section, key = sections().get(".".join(override.path[:-1])), override.path[-1]
    if override.value is None and section is not None and key in section.model_fields:
        here.pop(key, None)
    else:
        here[key] = override.value
    return []


def apply_overrides(values: dict[str, Any], arguments: Sequence[str]) -> tuple[list[Override], list[RecipeProblem]]:
    """Read every argument and put it over `values`, in order; the later one wins."""
    applied: list[Override] = []
    problems: list[RecipeProblem] = []
    for argument in arguments:
        override, found = read_override(argument)
        if override is not None:
            found = apply_override(values, override)
        if override is not None and not found:
            applied.append(override)
        problems += found
    return applied, problems


def _below_a_value(override: Override, depth: int, value: Any) -> Flaw:
    parent = ".".join(override.path[:depth])
    if isinstance(value, list):
        return Flaw(override.path, f"{parent} is a list", f"give the whole list: {parent}=[...]")
    return Flaw(override.path, f"{parent} is not a map, so nothing can be set below it", f"set {parent} itself")


def _problem(argument: str, path: tuple[str | int, ...], problem: str, suggestion: str) -> RecipeProblem:
    return RecipeProblem(argument, None, ".".join(map(str, path)), problem, suggestion)
