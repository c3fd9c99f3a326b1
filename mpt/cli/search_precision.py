"""`mpt search-precision`: find the cheapest precision of each layer that leaves the loss where it is."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpt.measuring.search_precision import Found, Subject


def search_precision(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's.")] = None,
    candidates: Annotated[
        str | None,
        typer.Option(help="Formats to choose from: fp8,bf16,fp32. Left out: those of them that the machine computes."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How far the loss may move, as a share of the fp32 model's loss.")
    ] = 0.01,
    batches: Annotated[int, typer.Option(help="Micro batches of the recipe's data to measure on.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the recipe with what was found; never over a file."),
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Search for this machine: 8xH100, A100, cpu, or a file; its speed by the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the cheapest precision of each layer that leaves the loss where it is, and prove it on the model."""
    import os

    from rich.console import Console

    from mpt.cli.output import write_output
    from mpt.measuring.evidence_table import print_evidence, sentences, to_json
    from mpt.measuring.precision_block import to_yaml
    from mpt.measuring.search_precision import search

    if output is not None:
        _check_output(output)
    subject, path = _make_subject(recipe, overrides or [], machine)
    found = search(
        subject,
        asked=None if candidates is None else [part.strip() for part in candidates.split(",") if part.strip()],
        tolerance=tolerance,
        batches=batches,
        say=_say,
        environ=os.environ,
    )
    print_evidence(found, Console(stderr=True, highlight=False))
    if output is not None:
        _check_output(output)
        comments = ["Found by mpt search-precision.", *sentences(found)]
        write_output(output, _recipe_text(path, overrides or [], found, comments))
        _say(f"written: {output}")
    if as_json:
        print(json.dumps(to_json(found) | {"written": None if output is None else str(output)}, indent=2))
    else:
        print(to_yaml(found.section), end="")


def _make_subject(recipe: str, overrides: list[str], machine: str | None) -> "tuple[Subject, Path]":
    import os

    from mpt.hardware.detect import detect_machine
    from mpt.hardware.packages import installed_packages
    from mpt.hardware.specs import parse_machine
    from mpt.measuring.search_precision import Subject, check_packages, check_recipe
    from mpt.planning.model_facts import ask_about_modules, learn_model_facts
    from mpt.planning.modules import ModuleShape
    from mpt.recipe.catalog import find_recipe
    from mpt.recipe.load import load_recipe
    from mpt.recipe.sources import check_sources

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    here = detect_machine(os.environ)
    target = here if machine is None else parse_machine(machine)
    packages = installed_packages()
    check_recipe(loaded)
    check_packages(packages)
    check_sources(loaded.data)
    subject = Subject(
        name=loaded.name or path.stem,
        recipe=loaded,
        facts=learn_model_facts(loaded),
        modules=tuple(ModuleShape(**entry) for entry in ask_about_modules(loaded)),
        target=target,
        here=here,
        is_named=machine is not None,
        packages=packages,
    )
    return subject, path


def _recipe_text(path: Path, overrides: list[str], found: "Found", comments: list[str]) -> str:
    """Write the found recipe in the words of the file that it came from, and say so where that can't be."""
    from mpt.measuring.precision_block import to_yaml
    from mpt.measuring.recipe_text import with_overrides
    from mpt.recipe.catalog import copied_text
    from mpt.recipe.schema_errors import validate
    from mpt.recipe.yaml_text import read_yaml

    text, is_kept = with_overrides(copied_text(path), to_yaml(found.section, comments), overrides)
    if not is_kept:
        _say(f"the comments of {path} are lost: its lines could not take {' '.join(overrides)}, and were written anew")
    written, wanted = validate(read_yaml(text).value)[0], found.recipe
    if written is None or written.model_dump(exclude_unset=True) != wanted.model_dump(exclude_unset=True):
        raise RuntimeError(f"the recipe that was found could not be written in the words of {path}")
    return text


def _check_output(path: Path) -> None:
    """Refuse a file that is there, or can't be: before the long part, and again before writing."""
    from mpt.cli.output import REMEDY
    from mpt.errors import MptError, StorageError

    if path.exists() or path.is_symlink():
        raise MptError(f"{path} exists", remedy="Give another name, or remove it first.")
    if not path.parent.is_dir():
        raise StorageError(f"can't write {path}: there is no folder {path.parent}", remedy=REMEDY)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
