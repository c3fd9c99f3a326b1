"""`mpt check`: what would quietly spoil or slow a run, without starting it."""

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpt.measuring.preflight import Checked


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="Check for this machine: T4, 8xH100, 2x8xA100-80GB, cpu, or a file.")
    ] = None,
    data: Annotated[
        bool, typer.Option(help="Read and tokenise the data as a run would; --no-data looks at the plan alone.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at plan, tokenizer and data for what would quietly spoil or slow a run, with the lines that mend it.

    `mpt train` does the same before the model is built. Exit code 2 where a finding would stop the run. What is
    tokenised stays in the cache for the run.
    """
    checked = _check(recipe, overrides or [], machine, data)
    if as_json:
        print(json.dumps(checked.to_json(), indent=2, allow_nan=False))
    else:
        from mpt.reporting.findings_text import checked_text

        plan = checked.plan
        name, label = (None, None) if plan is None else (plan.name, plan.machine.label)
        print(checked_text(name, label, checked.findings, checked.facts, checked.notices))
    if not checked.may_start:
        from mpt.errors import ExitCode

        raise typer.Exit(ExitCode.USAGE)


def _check(recipe: str, overrides: list[str], machine: str | None, data: bool) -> "Checked":
    import os

    from mpt.cli.plan import make_plan
    from mpt.cli.train import check_packages
    from mpt.measuring.preflight import look_in_child, preflight
    from mpt.planning.plan import Plan

    def look(plan: Plan) -> dict[str, object]:
        check_packages(plan)
        print("reading and tokenising the data", file=sys.stderr)
        return look_in_child(plan, os.environ)

    return preflight(partial(make_plan, recipe, overrides, machine, None), look if data else None)
