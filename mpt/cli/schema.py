"""`mpt schema`: the recipe as JSON Schema."""

import json
from pathlib import Path
from typing import Annotated

import typer


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
    from mpt.cli.output import write_output

    write_output(output, text)
