"""`mpt train` with the small worker in the place of the real one: open a run, supervise it, exit with its code."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from mpt.cli.train import _report
from mpt.errors import MptError
from mpt.recipe.yaml_tree import core_value
from mpt.reporting.live import live_view
from mpt.running.launcher import build_command
from mpt.running.opening import locate, opened
from mpt.running.signals import listening
from mpt.running.supervisor import supervise
from tests.running.small_runs import small_plan

WORKER = (sys.executable, str(Path(__file__).with_name("small_worker.py")))


def read(value: str) -> Any:
    """Read a change's value: a block, or one word."""
    return yaml.safe_load(value) if value.startswith("{") else core_value(value)


def main(runs_dir: str, resume: str, *changes: str) -> int:
    accept_changes = "accept" in changes
    plan = small_plan(**{key: read(value) for key, _, value in (c.partition("=") for c in changes) if value})
    run = locate(Path(runs_dir), plan.name)
    with listening() as wish, opened(plan, run, resume=resume, accept_changes=accept_changes) as found:
        for note in found.notes:
            print(note, file=sys.stderr)
        verdict = None
        if not found.finished:
            wish.is_immediate = False
            build = functools.partial(build_command, worker=WORKER)
            with live_view() as view:
                verdict = supervise(plan, run, view, wish, os.environ, start_from=found.start_from, build=build)
    _report(run, verdict, True)
    return 0 if verdict is None else int(verdict.exit_code)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except MptError as error:
        print(f"error: {error.problem}\n  {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
