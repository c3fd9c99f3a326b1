"""pydantic's errors -> one flaw a key, in the words of a recipe: what must stand there, what does, what to write."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpt.recipe.schema import Recipe
from mpt.recipe.suggestions import is_list_of, keys_of, name_of, nearest, sections, suggest_key, suggest_missing
from mpt.recipe.yaml_tree import Flaw, KeyPath, core_value

TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "none_required": "null",
    "too_large": "a number within 64 bits",
    "finite_number": "a finite number",
    "duration": "a duration such as 90s, 30m or 12h, or seconds",
    "string_too_short": "text, not an empty one",
    "string_pattern_mismatch": "letters, digits and . _ - with a letter or digit first",
}
LIMITS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}
CHOICES = {"literal_error", "enum"}
# Where a value fits one branch of a union and breaks its limit, the other branches are noise.
SPECIFIC = {*LIMITS, "too_large", "finite_number", "duration", "string_too_short", "string_pattern_mismatch"}
NUMBERS = {"a whole number", "a number"}
MANY = 12


def validate(values: Mapping[str, Any]) -> tuple[Recipe | None, list[Flaw]]:
    """Make a Recipe of plain values, or say everything that keeps them from being one."""
    try:
        return Recipe.model_validate(dict(values)), []
    except ValidationError as error:
        return None, to_flaws(error.errors(include_url=False), values)


def to_flaws(errors: Sequence[ErrorDetails], values: Mapping[str, Any]) -> list[Flaw]:
    """Gather the errors of a union's branches into one flaw for each key."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_real_path(error, values), []).append(error)
    flaws: list[Flaw] = []
    for path, group in by_path.items():
        rules = [error for error in group if error["type"] == "value_error"]
        has_deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if rules:
            flaws += [_rule(path, error, _value_at(values, path)) for error in rules]
        elif group[0]["type"] == "extra_forbidden":
            flaws.append(Flaw(path, *suggest_key(name_of(path[:-1]), str(path[-1]))))
        elif group[0]["type"] == "missing":
            flaws.append(Flaw(path, "is missing", suggest_missing(name_of(path[:-1]), str(path[-1]))))
        elif not has_deeper:
            flaws.append(_wrong_value(path, group, _value_at(values, path)))
    return flaws


def show(value: Any) -> str:
    """Write a value as it would stand in a recipe, shortened.

    >>> show(True), show("8"), show(None), show({"a": 1}), show([1, 2])
    ('true', "'8'", 'null', 'a map', 'a list')
    """
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _real_path(error: ErrorDetails, values: Any) -> KeyPath:
    """Leave out of pydantic's location the names of union branches and of keys that a short form implies."""
    path: list[str | int] = []
    here = values
    last = len(error["loc"]) - 1
    for i, part in enumerate(error["loc"]):
        if isinstance(here, dict):
            is_new_key = i == last and error["type"] == "missing"
            if part in here or is_new_key:
                path.append(part)
                here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
    return tuple(path)


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _rule(path: KeyPath, error: ErrorDetails, section: Any) -> Flaw:
    """Split a validator's `problem; suggestion`. A problem that begins with a key of its section is that key's."""
    problem, _, suggestion = str(error["ctx"]["error"]).rpartition("; ")
    first = problem.split()[0].rstrip(",:")
    is_key = isinstance(section, dict) and first in section
    return Flaw((*path, first) if is_key else path, problem, suggestion)


def _wrong_value(path: KeyPath, group: list[ErrorDetails], value: Any) -> Flaw:
    specific = [error for error in group if error["type"] in SPECIFIC]
    if specific:
        group = specific
    section = name_of(path)
    if is_list_of(section) and not specific:
        allowed = "text or a map" if isinstance(path[-1], int) else "text or a list of texts and maps"
        return Flaw(path, f"must be {allowed} (got {show(value)})", "write `[a.jsonl, {source: b.jsonl, weight: 2}]`")
    if section in sections() and not isinstance(value, (str, dict)):
        return Flaw(path, f"must be a map of keys (got {show(value)})", keys_of(section))
    choices = [choice for error in group if error["type"] in CHOICES for choice in _choices(error)]
    words = list(dict.fromkeys(_words(error) for error in group if error["type"] not in CHOICES))
    listed = f"one of {len(choices)} words that `mpt schema` lists" if len(choices) > MANY else ", ".join(choices)
    allowed = " or ".join(filter(None, [listed, *words]))
    suggestion = _mend(value, choices, words) or (keys_of(section) if section in sections() else f"write {allowed}")
    if group[0]["type"] in LIMITS:
        suggestion = f"write a number that is {allowed}"
    return Flaw(path, f"must be {allowed} (got {show(value)})", suggestion)


def _words(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind in LIMITS:
        return LIMITS[kind].format(**error["ctx"])
    return TYPES.get(kind, error["msg"])


def _choices(error: ErrorDetails) -> list[str]:
    """Read the values back out of pydantic's "'a', 'b' or 'c'"."""
    return [text.strip("'") for text in re.split(r", | or ", str(error["ctx"]["expected"]))]


def _mend(value: Any, choices: list[str], words: list[str]) -> str | None:
    """Find what was probably meant."""
    if isinstance(value, str):
        meant = core_value(value.strip().lower().replace("_", ""))
        wants_number = NUMBERS & set(words) or (choices and choices[0].isdigit())
        if (wants_number and type(meant) in (int, float)) or ("true or false" in words and isinstance(meant, bool)):
            plain = value.strip().replace("_", "")
            return f"leave the underscore out: {plain}" if "_" in value else f"remove the quotes: {plain}"
    elif isinstance(value, bool):
        word = "yes" if value else "no"
        if word in choices:
            return f"write {word}"
    elif isinstance(value, (int, float)):
        if "true or false" in words and value in (0, 1):
            return f"write {'true' if value else 'false'}"
        if "text" in words:
            return f'put it in quotes: "{value}"'
    near = nearest(str(value), choices) if isinstance(value, str) else None
    return None if near is None else f"did you mean {near}?"
