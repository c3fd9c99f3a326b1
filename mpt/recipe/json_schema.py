"""The recipe as JSON Schema, for editors: completion, documentation and errors while typing."""

from typing import Any

from mpt.recipe.schema import SHORT_FORMS, Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NULL = {"type": "null"}
# pydantic leaves its own words where a validator stands before the number.
LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
VALUES = {"default", "const", "enum"}
NOTES = {"title", "description", "default"}


def recipe_schema() -> dict[str, Any]:
    """Make the JSON Schema (draft 2020-12) of a recipe, its short forms included."""
    made = Recipe.model_json_schema()
    for section, key in SHORT_FORMS.items():
        _allow_short_form(made["properties"][section], _main_key(made, section, key))
    schema: dict[str, Any] = _without_noise(made)
    return {"$schema": DIALECT, "title": "mpt recipe"} | schema


def _main_key(schema: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    branches = schema["properties"][section].get("anyOf") or [schema["properties"][section]]
    name = next(branch["$ref"] for branch in branches if "$ref" in branch).removeprefix("#/$defs/")
    found: dict[str, Any] = schema["$defs"][name]["properties"][key]
    return found


def _allow_short_form(section: dict[str, Any], main_key: dict[str, Any]) -> None:
    long_forms = section.get("anyOf") or [{"$ref": section.pop("$ref")}]
    short = {key: value for key, value in main_key.items() if key not in NOTES}
    short_forms = [form for form in short.get("anyOf", [short]) if form != NULL]
    section["anyOf"] = [*short_forms, *long_forms]


def _without_noise(schema: Any, is_map_of_keys: bool = False) -> Any:
    """Drop titles that only repeat the key, and defaults that say "not given" or repeat a whole section."""
    if isinstance(schema, list):
        return [_without_noise(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if is_map_of_keys:
        return {key: _without_noise(value) for key, value in schema.items()}
    return {
        LIMITS.get(key, key): value if key in VALUES else _without_noise(value, key in ("properties", "$defs"))
        for key, value in schema.items()
        if key != "title" and not (key == "default" and (value is None or isinstance(value, dict)))
    }
