"""`mpt report`: what a run was, attempt by attempt."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name.")],
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List a run's attempts: where each began, what its plan changed of the one before and why, how it ended.

    It only reads, and a run that is at work may be asked about. Exit code 83 where journal or plans are damaged.
    """
    from mpt.reporting.run_report import gather_report, to_text
    from mpt.running.run_directory import find_run

    found = gather_report(find_run(run, runs_dir))
    print(json.dumps(found.to_json(), indent=2, allow_nan=False) if as_json else to_text(found))
