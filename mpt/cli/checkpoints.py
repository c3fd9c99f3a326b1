"""`mpt checkpoints`: list, verify and prune what a run has saved."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name.")]
RunsDir = Annotated[Path, typer.Option(help="Where runs are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RUNS = Path("runs")


@app.command("list")
def list_all(run: Run, runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """Show every checkpoint with its size, age, lineage and state. Sizes are compared with the manifest, hashes not."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from mpt.reporting.checkpoint_list import describe, to_table
    from mpt.running.lineage import current_lineage
    from mpt.running.run_directory import find_run

    directory = find_run(run, runs_dir)
    listed = describe(directory, hashes=False)
    if as_json:
        rows = [asdict(entry) for entry in listed]
        answer = {"run": str(directory.path), "lineage": current_lineage(directory), "checkpoints": rows}
        print(json.dumps(answer, indent=2))
    elif listed:
        print(to_table(listed, datetime.now(UTC)))
    else:
        _say(f"{directory.path} has no checkpoint yet")


@app.command("verify")
def verify(run: Run, runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """Read every byte and compare it with what was saved. Exit code 84 if there are checkpoints and none is usable."""
    from mpt.reporting.checkpoint_list import describe
    from mpt.running.checkpoints import no_usable
    from mpt.running.run_directory import find_run

    directory = find_run(run, runs_dir)
    checked = [entry for entry in describe(directory, hashes=True) if entry.state != "quarantined"]
    usable = [entry.name for entry in checked if entry.problem is None]
    damaged = [(entry.name, entry.problem) for entry in checked if entry.problem is not None]
    if as_json:
        answer = {
            "run": str(directory.path),
            "usable": usable[-1] if usable else None,
            "verified": usable,
            "damaged": [{"name": name, "problem": problem} for name, problem in damaged],
        }
        print(json.dumps(answer, indent=2))
    else:
        for entry in checked:
            print(f"{entry.name}: {entry.problem or 'verified'}")
    if not checked:
        _say(f"{directory.path} has no checkpoint yet")
    elif not usable:
        raise no_usable(directory, damaged)


@app.command("prune")
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints of a run that nobody is at (exit code 85 otherwise).

    The newest that verify stay, the newest that is known to be good, the best, and the two newest quarantines.
    """
    from mpt.running import retention
    from mpt.running.journal import Journal
    from mpt.running.lineage import complete_quarantine
    from mpt.running.lock import locked
    from mpt.running.run_directory import find_run

    directory = find_run(run, runs_dir)
    if dry_run:
        names = retention.superfluous(directory, keep, hashes=True)
    else:
        with locked(directory.lock):
            journal = Journal(directory.journal, max(directory.attempt_numbers(), default=0))
            complete_quarantine(directory, journal)
            names = retention.prune(directory, keep, hashes=True)
            if names:
                journal.append("checkpoints_pruned", names=names, keep=keep)
    if as_json:
        print(json.dumps({"run": str(directory.path), "dry_run": dry_run, "deleted": names}, indent=2))
        return
    for name in names:
        print(f"{'would delete' if dry_run else 'deleted'} {name}")
    if not names:
        _say("nothing to delete")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
