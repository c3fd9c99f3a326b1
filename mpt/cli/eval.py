"""`mpt eval`: the loss, the perplexity and the task's metrics of trained weights."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mpt.measuring.evaluation import Evaluated
    from mpt.planning.plan import Plan
    from mpt.recipe.schema import Recipe
    from mpt.running.trained import Trained


def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a folder with a model, or a hub id.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="Whose data and task; a run has its own. Then key.path=value, over the recipe's.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Evaluate on all of this file, glob or hub:OWNER/NAME, not on the recipe's data.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Of a run: a step, best or final. Left out: the final model, else the newest checkpoint."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    machine: Annotated[str | None, typer.Option(help="`cpu` keeps off the GPUs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate trained weights on a recipe's evaluation data, in its precision, and print loss, perplexity and metrics.

    Nothing of a run is changed, and one that is at work may be evaluated.
    """
    import os

    from mpt.errors import ExitCode
    from mpt.measuring import evaluation
    from mpt.running.signals import listening
    from mpt.running.trained import find_trained

    trained = find_trained(model, runs_dir, checkpoint)
    plan = _plan(trained, arguments or [], data, machine)
    if trained.note:
        print(trained.note, file=sys.stderr)
    print(f"evaluating {trained.place} in {plan.value('precision')} on {plan.machine.label} ...", file=sys.stderr)
    with listening() as wish:
        wish.is_immediate = False
        wish.is_urgent = True  # nothing of it is worth saving
        found = evaluation.evaluate(plan, trained, _Quiet(), wish, os.environ)
        if found is None:
            raise typer.Exit(ExitCode.INTERRUPTED if wish.signal == 2 else ExitCode.TERMINATED)
    print(json.dumps(found.to_json(), indent=2) if as_json else _to_text(found))


def _plan(trained: "Trained", arguments: list[str], data: str | None, machine: str | None) -> "Plan":
    import os

    from mpt.errors import UnsupportedError
    from mpt.hardware.detect import detect_machine
    from mpt.hardware.packages import installed_packages
    from mpt.hardware.specs import parse_machine
    from mpt.measuring.evaluation import check_held_out
    from mpt.measuring.trained_plan import plan_trained, with_weights
    from mpt.recipe.sources import check_sources
    from mpt.running.trained import newest_plan_of

    named = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    of_run = newest_plan_of(trained.run) if trained.run is not None else None
    recipe, folder = (of_run.recipe, of_run.task_folder) if of_run is not None and not named else _recipe(named)
    made = with_weights(recipe, trained, of_run=of_run, data=data, overrides=overrides)
    check_held_out(made)
    check_sources(made.data)
    here = detect_machine(os.environ) if machine is None else parse_machine(machine)
    if machine is not None and not here.is_cpu:
        raise UnsupportedError(
            f"--machine {machine}: an evaluation runs on this machine",
            remedy="Leave --machine out, or write cpu.",
        )
    return plan_trained(made, here, installed_packages(), "evaluation", task_folder=folder)


def _recipe(named: list[str]) -> tuple["Recipe", str | None]:
    """Load the recipe that is named, and say where a task of the user's own lies."""
    from mpt.errors import MptError
    from mpt.recipe.catalog import find_recipe
    from mpt.recipe.load import load_recipe

    if len(named) == 1:
        file = find_recipe(named[0])
        return load_recipe(file), str(file.resolve().parent)
    if named:
        raise MptError(
            f"{len(named)} recipes are named: {', '.join(named)}", remedy="Give one; overrides are key.path=value."
        )
    raise MptError(
        "a model alone says neither what to evaluate on nor how",
        remedy="Name the recipe behind it: mpt eval MODEL RECIPE, with --data FILE for other data.",
    )


def _to_text(found: "Evaluated") -> str:
    rows: list[tuple[str, Any]] = [("data", found.data), ("loss", found.loss), ("perplexity", found.perplexity)]
    rows += sorted(found.metrics.items())
    width = max(12, *(len(name) + 2 for name, _ in rows))
    lines = [f"{found.model}, {found.precision}"]
    lines += [f"  {name:<{width}}{_spell(value)}" for name, value in rows if value is not None]
    count = "" if found.samples is None else f"{found.samples} in "
    return "\n".join([*lines, f"  {'samples':<{width}}{count}{found.seconds:.1f} s"])


def _spell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:.1f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


class _Quiet:
    """Shows of the attempt what went wrong, and no more: what it says of the data is about those to train on."""

    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)
