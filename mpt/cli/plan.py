"""`mpt plan`: print what would happen."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpt.planning.checklist.point import Case
    from mpt.planning.plan import Plan


def make_plan(recipe: str, overrides: list[str], machine: str | None, name: str | None) -> "Plan":
    """Read, detect, learn, resolve: the way from a recipe to its plan that every command goes."""
    return make_case(recipe, overrides, machine, name).plan


def make_case(recipe: str, overrides: list[str], machine: str | None, name: str | None) -> "Case":
    """Make the plan, and keep what it takes to plan the same with other values."""
    import os

    from mpt.hardware.detect import detect_machine
    from mpt.hardware.packages import installed_packages
    from mpt.hardware.specs import parse_machine
    from mpt.planning.checklist.point import Case
    from mpt.planning.model_facts import learn_model_facts
    from mpt.planning.modules import learn_modules
    from mpt.planning.plan import resolve
    from mpt.recipe.catalog import find_recipe
    from mpt.recipe.load import load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    where = detect_machine(os.environ) if machine is None else parse_machine(machine)
    packages = installed_packages() if machine is None else None
    modules = learn_modules(loaded)
    made = resolve(
        loaded,
        where,
        learn_model_facts(loaded),
        name=name or loaded.name or path.stem,
        packages=packages,
        modules=modules,
        task_folder=str(path.resolve().parent),
    )
    return Case(made, packages, None if modules is None else tuple(modules))


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="Plan for this machine: T4, 8xH100, 2x8xA100-80GB, cpu, or a file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what would happen, every value with its reason and the options rejected."""
    made = make_plan(recipe, overrides or [], machine, None)
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
        return
    from mpt.reporting.plan_table import print_plan

    print_plan(made)
