"""`mpt replay`: make the step of an incident again."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mpt.measuring.replay import Replayed


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name.")],
    incident: Annotated[
        str | None, typer.Argument(metavar="[INCIDENT]", help="Its number, such as 0001. Left out: the newest.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the step again in which a run's numbers went bad, and say whether it comes out the same.

    Weights, batches and random state are the incident's, engine and precision those of its attempt. Nothing of the run
    is changed. Exit code 85 while somebody trains in it.
    """
    import os

    from mpt.errors import ExitCode
    from mpt.measuring.replay import find_incident
    from mpt.measuring.replay import replay as make_again
    from mpt.running.run_directory import find_run
    from mpt.running.signals import listening

    directory = find_run(run, runs_dir)
    folder = find_incident(directory, incident)
    with listening() as wish:
        wish.is_immediate = False
        wish.is_urgent = True  # nothing of it is worth saving
        replayed = make_again(directory, folder, _Notes(), wish, os.environ)
        if replayed is None:
            raise typer.Exit(ExitCode.INTERRUPTED if wish.signal == 2 else ExitCode.TERMINATED)
    if as_json:
        print(json.dumps(replayed.to_json(), indent=2, allow_nan=False))
    else:
        print(_to_text(replayed))


def _to_text(replayed: "Replayed") -> str:
    was, now = replayed.was, replayed.now
    loss = f"loss {was.get('loss')}"
    lines = [f"incident {replayed.incident}: {was['code']} at step {was['step']} of attempt {was['attempt']}, {loss}"]
    lines.append(f"  then  {was['cause']}")
    lines.append(f"  now   {now['cause'] if now is not None else f'every number is finite, loss {replayed.loss}'}")
    shown = now if now is not None else was
    place = f"rank {shown['rank']}" + ("" if shown["micro_batch"] is None else f", micro batch {shown['micro_batch']}")
    lines.append(f"  where {place}, samples {', '.join(map(str, was['sample_ids'] or [])) or 'unknown'}")
    lines.append("reproduced" if replayed.reproduced else "not reproduced")
    return "\n".join(lines)


class _Notes:
    """Shows of the attempt what it has to say, and no more."""

    def attempt(self, number: int, resume_from: str | None) -> None:
        print("making the step again ...", file=sys.stderr)

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...
