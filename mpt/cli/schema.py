"""`mpt schema`: the recipe as JSON Schema."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpt.errors import MptError


def schema(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it here, not to stdout.")
    ] = None,
) -> None:
    """Print the JSON Schema of a recipe: every key with its type, default and meaning. Editors complete from it."""
    from mpt.recipe.json_schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MptError(
            f"can't write {output}: {error.strerror}", remedy="Give a file in a writable directory."
        ) from None
