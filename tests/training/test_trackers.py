"""What trackers get of a run: TensorBoard's own event files, and the calls that MLflow's library sees."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mpt.recipe.trackers import TRACKERS
from mpt.running.trackers import tracker_runs
from tests.training.tiny_runs import Run

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]
TRAINING = {"max_steps": 8, "learning_rate": 3e-3, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}

# MLflow's fluent API, as far as transformers calls it: every call becomes a line of the file `$MLFLOW_CALLS`.
MLFLOW = """
import json, os, types
__version__ = "3.0.0"
utils = types.SimpleNamespace(validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100))
_active = None

def _tell(call, **what):
    with open(os.environ["MLFLOW_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, "run": _active and _active.info.run_id} | what) + "\\n")

def start_run(run_name=None, nested=False):
    global _active
    if os.environ.get("MLFLOW_REFUSES"):
        raise RuntimeError("401 unauthorized")
    number = os.environ.get("MLFLOW_RUN_ID") or f"served-{os.getpid()}"
    _active = types.SimpleNamespace(info=types.SimpleNamespace(run_id=number))
    _tell("start", name=run_name)

def end_run():
    global _active
    _tell("end")
    _active = None

def log_metrics(metrics, step, synchronous=True):
    if os.environ.get("MLFLOW_BREAKS_AT") == str(step):
        raise ConnectionError("the server is gone")
    _tell("metrics", step=step, names=sorted(metrics))

active_run = lambda: _active
is_tracking_uri_set = lambda: True
get_tracking_uri = lambda: "fake"
log_params = lambda params, synchronous=True: None
"""


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Put such a library where workers find it; give a reader of its calls."""
    (tmp_path / "mlflow.py").write_text(MLFLOW)
    monkeypatch.setenv("MLFLOW_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("LIBRARIES", str(tmp_path))
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def tracked(make: MakeRun, tracker: str, **training: Any) -> Run:
    """Make a run that reports to a tracker; its workers look for libraries in $LIBRARIES too."""
    run = make(training=TRAINING | {"report_to": tracker} | training)
    run.fault = {"finds_libraries": True}
    return run


def test_the_names_are_those_of_the_installed_transformers() -> None:
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_has_the_curves_of_the_run_and_of_its_later_attempt(new_run: MakeRun) -> None:
    run = new_run(training=TRAINING | {"report_to": "tensorboard", "logging_steps": 1})
    run.fault = {"raises_at": 6, "naming": ["HOME"]}
    assert run.train() == 1
    run.fault = None
    assert run.train(2, "checkpoint-4") == 0, run.log(2)
    found = scalars(run.path / "tensorboard")
    losses = dict(found["train/loss"])
    assert sorted(losses) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [losses[step] for step in (1, 8)] == pytest.approx([run.steps[step]["loss"] for step in (1, 8)], abs=1e-4)
    assert all(0 < norm < 100 and math.isfinite(norm) for _, norm in found["train/grad_norm"])
    evaluated = {event["step"]: event["eval_loss"] for event in run.events if event["kind"] == "evaluated"}
    assert dict(found["eval/loss"]) == pytest.approx(evaluated) and sorted(evaluated) == [4, 8]


def test_mlflow_has_one_run_for_all_attempts_and_the_last_evaluation_in_it(
    new_run: MakeRun, mlflow: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked(new_run, "mlflow", logging_steps=4, eval_strategy="no")
    run.fault |= {"raises_at": 6, "naming": ["HOME"]}  # type: ignore[operator]
    assert run.train() == 1
    number = tracker_runs(run.directory)["mlflow"]
    assert [call["call"] for call in mlflow()] == ["start", "metrics", "end"]  # closed though it failed
    run.fault = {"finds_libraries": True}
    monkeypatch.setenv("MLFLOW_RUN_ID", number)  # as the launcher does
    assert run.train(2, "checkpoint-4") == 0, run.log(2)
    calls = mlflow()
    assert {call["run"] for call in calls} == {number} and number.startswith("served-")
    assert {call["name"] for call in calls if call["call"] == "start"} == {"tiny"}
    assert [call["call"] for call in calls[3:]][-2:] == ["metrics", "end"]
    assert "eval_loss" in calls[-2]["names"] and calls[-2]["step"] == 8


def test_a_tracker_that_breaks_is_left_out_and_the_run_goes_on(
    new_run: MakeRun, mlflow: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_BREAKS_AT", "4")
    run = tracked(new_run, "mlflow", logging_steps=2)
    assert run.train() == 0, run.log()
    assert [text for text in run.texts("notice", "text") if "mlflow" in text] == [
        "mlflow fails and is left out from here on: the server is gone"
    ]
    assert [call.get("step") for call in mlflow() if call["call"] == "metrics"] == [2]


def test_a_tracker_that_cannot_begin_is_one_message(
    new_run: MakeRun, mlflow: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REFUSES", "1")
    run = tracked(new_run, "mlflow")
    assert run.train() == 2
    word = run.last_word()
    assert word["kind"] == "failed" and word["exit_code"] == 2
    assert word["problem"] == "training.report_to: mlflow can't begin: 401 unauthorized"
    assert "leave mlflow out" in word["remedy"]
