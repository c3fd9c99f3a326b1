"""The recipe reference in Markdown, made from the schema: a table a section."""

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpt.recipe.json_schema import recipe_schema
from mpt.recipe.scalars import DURATION
from mpt.recipe.suggestions import is_list_of, sections
from mpt.recipe.training_keys import OWNED

TRAINING_ARGUMENTS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true, false",
    "object": "map",
    "array": "list",
}
LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def recipe_reference() -> str:
    """Render every section of a recipe as a Markdown table, and the keys that `training:` does not take."""
    schema = recipe_schema()
    parts = []
    shown = set()
    for name, section in sections().items():
        if name == "training" or section in shown:
            continue
        shown.add(section)
        title = f"### `{name}:`" if name else "### Top level"
        title += ", a map of the list" if is_list_of(name) else ""
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        rows += [_row(name, key, field, schema, section) for key, field in section.model_fields.items()]
        parts.append("\n".join([title, "", *rows]))
    return "\n\n".join([*parts, _training()]) + "\n"


def _training() -> str:
    rows = [f"| `{key}` | {_cell(instead)} |" for key, instead in sorted(OWNED.items())]
    intro = (
        f"The keys of [`transformers.TrainingArguments`]({TRAINING_ARGUMENTS}),\n"
        "under their own names and with their own defaults, less these, which are not for a recipe to set:"
    )
    return "\n".join(["### `training:`", "", intro, "", "| key | instead |", "|---|---|", *rows])


def _row(name: str, key: str, field: FieldInfo, schema: dict[str, Any], section: type[BaseModel]) -> str:
    properties = schema["properties"] if not name else schema["$defs"][section.__name__]["properties"]
    default = "required" if field.is_required() else _default(field.default)
    meaning = " ".join((field.description or "").split())
    return f"| `{key}` | {_cell(_type(properties[key], schema))} | {default} | {_cell(meaning)} |"


def _default(value: Any) -> str:
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _type(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """Say in words what a key takes.

    >>> _type({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]}, {})
    'whole number > 0'
    """
    if any(branch.get("pattern") == f"^{DURATION}$" for branch in entry.get("anyOf", ())):
        return "duration"
    if "anyOf" in entry:
        return ", ".join(
            dict.fromkeys(_type(branch, schema) for branch in entry["anyOf"] if branch != {"type": "null"})
        )
    if "$ref" in entry:
        return _type(schema["$defs"][entry["$ref"].removeprefix("#/$defs/")], schema)
    if "const" in entry or "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {_type(entry['items'], schema)}"
    limits = [f"{sign} {entry[limit]:g}" for limit, sign in LIMITS.items() if limit in entry]
    return " ".join([WORDS[entry["type"]], ", ".join(limits)]).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
