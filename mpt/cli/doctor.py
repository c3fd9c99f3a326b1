"""`mpt doctor`: read a run's directory and explain it."""

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name.")],
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain a run: its attempts, what went bad, what was changed, what to change in the recipe, how to go on.

    It only reads, and a run that is at work may be asked about. Exit code 83 where the journal is damaged.
    """
    from mpt.reporting.diagnosis import diagnose, to_text
    from mpt.reporting.evidence import gather
    from mpt.running.run_directory import find_run

    diagnosis = diagnose(gather(find_run(run, runs_dir)))
    print(json.dumps(diagnosis.to_json(), indent=2, allow_nan=False) if as_json else to_text(diagnosis))
