"""The files that are made from other files: write them, or with --check compare them. Called by `scripts/regenerate`.

Each maker returns {path: text}. A path is relative to the project's root.
"""

import argparse
import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def to_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def training_argument_types(annotation: Any) -> tuple[list[str], list[str] | None]:
    """Turn a field's annotation into JSON type names, and the choices where it is an enumeration."""
    names: list[str] = []
    choices: list[str] | None = None
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for part in typing.get_args(annotation) if is_union else (annotation,):
        origin = typing.get_origin(part)
        if isinstance(part, type) and issubclass(part, enum.Enum):
            choices = [str(member.value) for member in part]
            names.append("string")
        elif origin is list:
            names.append("array")
        elif origin is dict or part is dict:
            names.append("object")
        elif part in JSON_TYPES:
            names.append(JSON_TYPES[part])
    return sorted(set(names)), choices


def training_arguments() -> dict[str, str]:
    import transformers
    from transformers import TrainingArguments

    lines = (inspect.getdoc(TrainingArguments) or "").splitlines()
    helps: dict[str, str] = {}
    name = None
    for line in lines:
        head = re.match(r"^\s*([a-z_0-9]+) \(`", line)
        if head:
            name = head[1]
        elif name and line.strip() and name not in helps:
            helps[name] = re.split(r"(?<=[.!])\s", line.strip())[0]
    keys = {}
    for field in dataclasses.fields(TrainingArguments):
        types, choices = training_argument_types(field.type)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        entry: dict[str, Any] = {"types": types, "default": getattr(default, "value", default)}
        entry["help"] = helps.get(field.name, "")
        if choices:
            entry["choices"] = choices
        keys[field.name] = entry
    made = {"transformers": transformers.__version__, "keys": dict(sorted(keys.items()))}
    return {"mpt/recipe/training_arguments.json": to_json(made)}


def recipe_schema() -> dict[str, str]:
    from mpt.recipe.json_schema import recipe_schema

    return {"configs/recipe.schema.json": to_json(recipe_schema())}


def deepspeed_configurations() -> dict[str, str]:
    from golden_deepspeed import deepspeed_files

    return deepspeed_files()


def readme() -> dict[str, str]:
    """Write the README's generated parts, each between its two markers."""
    from mpt.recipe.reference import recipe_reference
    from mpt.reporting.checklist_table import checklist_reference
    from mpt.reporting.findings_text import findings_reference

    parts = {
        "recipe reference": recipe_reference(),
        "checklist": checklist_reference(),
        "findings": findings_reference(),
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, made in parts.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- end of the {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n\n{made}\n{end}{tail}"
    return {"README.md": text}


MAKERS: tuple[Callable[[], dict[str, str]], ...] = (
    training_arguments,
    recipe_schema,
    deepspeed_configurations,
    readme,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for make in MAKERS:
        for name, text in make().items():
            path = ROOT / name
            if path.exists() and path.read_text(encoding="utf-8") == text:
                continue
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    verb = "stale, run scripts/regenerate" if check else "written"
    print("\n".join(f"{name}: {verb}" for name in stale) or "generated files are up to date")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
