"""Which runs of the trackers belong to a run directory: a later attempt goes on in them, in the place of new ones.

Weights & Biases lets us choose the id; MLflow's comes from its server, and the worker notes it down. Trackio finds a
run by project and name, and TensorBoard by the folder.
"""

import json
import uuid
from collections.abc import Mapping

from mpt.errors import StorageError
from mpt.running.run_directory import RunDirectory, write_json


def tracker_runs(run: RunDirectory) -> dict[str, str]:
    """Read the ids by tracker. Raises StorageError for a damaged file."""
    if not run.trackers.exists():
        return {}
    try:
        return {str(name): str(number) for name, number in json.loads(run.trackers.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{run.trackers} can't be read ({error})",
            remedy="Restore it, or delete it: the trackers then get a new run.",
        ) from error


def keep_tracker_run(run: RunDirectory, tracker: str, number: str) -> None:
    """Note a tracker's run down. Raises StorageError where that can't be written."""
    known = tracker_runs(run)
    if known.get(tracker) != number:
        write_json(run.trackers, known | {tracker: number})


def tracker_environment(trackers: list[str], run: RunDirectory, environment: Mapping[str, str]) -> dict[str, str]:
    """Give the variables by which the trackers' own libraries go on in this run's; what the user has set is left."""
    added: dict[str, str] = {}
    if "wandb" in trackers:
        if "wandb" not in tracker_runs(run):
            keep_tracker_run(run, "wandb", uuid.uuid4().hex[:16])
        added |= {"WANDB_RUN_ID": tracker_runs(run)["wandb"], "WANDB_RESUME": "allow"}
        added["WANDB_DIR"] = str(run.path.resolve())
    if "mlflow" in trackers and "mlflow" in tracker_runs(run):
        added["MLFLOW_RUN_ID"] = tracker_runs(run)["mlflow"]
    return {name: value for name, value in added.items() if name not in environment}
