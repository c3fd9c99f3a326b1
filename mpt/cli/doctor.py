"""`mpt doctor`: explain a run from its directory, or go through the optimisation checklist of a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    subject: Annotated[
        str,
        typer.Argument(metavar="RUN|RECIPE", help="A run's directory or name; a recipe file, or a built-in recipe."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, over the recipe's; for a recipe.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="The recipe's checklist on this machine: T4, 8xH100, cpu, or a file.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain a run: its attempts, what went bad, what was changed, what to change in the recipe, how to go on.

    Or check a recipe on a machine against the optimisation checklist: what is done, what is not for this case, what
    there is to gain, and the lines to write.

    A name that is a run's and a built-in recipe's means the run, unless --machine or key.path=value are given. It only
    reads, and a run that is at work may be asked about. Exit code 83 where the journal is damaged.
    """
    from mpt.running.run_directory import find_run

    if machine is not None or overrides or is_recipe(subject, runs_dir):
        _check_off(subject, overrides or [], machine, as_json)
        return
    from mpt.reporting.diagnosis import diagnose, to_text
    from mpt.reporting.evidence import gather

    diagnosis = diagnose(gather(find_run(subject, runs_dir)))
    print(json.dumps(diagnosis.to_json(), indent=2, allow_nan=False) if as_json else to_text(diagnosis))


def is_recipe(subject: str, runs_dir: Path) -> bool:
    """Tell a recipe from a run: a file is a recipe, a folder a run; a name a run where there is one, else a recipe."""
    from mpt.recipe.catalog import recipes_directory

    path = Path(subject)
    if path.is_file():
        return True
    if path.is_dir() or (runs_dir / subject).is_dir():
        return False
    return (recipes_directory() / f"{subject}.yaml").is_file() or path.suffix in (".yaml", ".yml")


def _check_off(recipe: str, overrides: list[str], machine: str | None, as_json: bool) -> None:
    from mpt.cli.plan import make_case
    from mpt.planning.checklist import check_list

    case = make_case(recipe, overrides, machine, None)
    points = check_list(case)
    if as_json:
        plan = case.plan
        told = {"recipe": plan.name, "machine": plan.machine.label, "memory": plan.memory.to_json()}
        print(json.dumps(told | {"points": [point.to_json() for point in points]}, indent=2, allow_nan=False))
        return
    from mpt.reporting.checklist_table import print_checklist

    print_checklist(case.plan, points)
