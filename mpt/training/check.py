"""The process that looks at data for `mpt check`: `python -m mpt.training.check FOLDER`.

It prepares the data of FOLDER/plan.json as a run would, into the same cache, and writes one line of JSON on stdout:
`facts` and `notices`, or `error` with its problem and remedy. Started by `mpt.measuring.preflight`.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.running.journal import Journal, read_events
from mpt.running.run_directory import RunDirectory
from mpt.running.tie import die_with_parent
from mpt.training.imports import heavy_imports, leave


def main(arguments: list[str]) -> int:
    """Answer; give the exit code."""
    die_with_parent()
    if len(arguments) != 1:
        print("usage: python -m mpt.training.check FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        plan = Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        print(json.dumps(look_at(plan, RunDirectory(folder))), flush=True)
    except MptError as error:
        print(json.dumps({"error": {"problem": error.problem, "remedy": error.remedy}}), flush=True)
    except Exception:  # noqa: BLE001 - a main function: the parent says where the traceback is
        traceback.print_exc()
        return 1
    return 0


def look_at(plan: Plan, run: RunDirectory) -> dict[str, Any]:
    """Prepare the data in `run`, an empty folder, and gather what is to know of it."""
    with heavy_imports():
        from transformers import TrainingArguments

        from mpt.training.preflight import learn
        from mpt.training.preparation import prepare
        from mpt.training.tasks import task_module
        from mpt.training.worker import quiet_libraries

    quiet_libraries()
    keys = {key: plan.training_arguments[key] for key in ("seed", "data_seed") if key in plan.training_arguments}
    # The machine of the plan may be another: nothing here computes.
    arguments = TrainingArguments(output_dir=str(run.checkpoints), use_cpu=True, report_to="none", **keys)
    journal = Journal(run.journal, 1)
    attempt = run.attempt(1)
    attempt.path.mkdir(parents=True)
    prepared = prepare(plan, run, attempt, arguments, journal, task_module(plan.value("task"), plan.task_folder))
    notices = [event["text"] for event in read_events(run.journal) if event["kind"] == "notice"]
    return {"facts": learn(plan, prepared).to_json(), "notices": notices}


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
