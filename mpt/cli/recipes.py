"""`mpt recipes`: list, show and copy the built-in recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpt.errors import MptError

app = typer.Typer(help="List, show and copy the built-in recipes.", no_args_is_help=True)


@app.command("list")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Name every built-in recipe and what it is for."""
    from mpt.recipe.catalog import list_recipes

    entries = list_recipes()
    if as_json:
        rows = [{"name": entry.name, "description": entry.description, "path": str(entry.path)} for entry in entries]
        print(json.dumps({"recipes": rows}, indent=2))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.description}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")]) -> None:
    """Print a built-in recipe."""
    from mpt.recipe.catalog import find_built_in

    print(find_built_in(name).read_text(encoding="utf-8"), end="")


@app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or directory; NAME.yaml here if left out.")
    ] = None,
) -> None:
    """Copy a built-in recipe to begin your own with. An existing file is never overwritten."""
    from mpt.recipe.catalog import copied_text, find_built_in

    source = find_built_in(name)
    target = destination or Path()
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(copied_text(source))
    except FileExistsError:
        raise MptError(f"{target} exists", remedy="Give another name, or remove the file first.") from None
    except OSError as error:
        raise MptError(
            f"can't write {target}: {error.strerror}", remedy="Give a file in a writable directory."
        ) from None
    print(target)
