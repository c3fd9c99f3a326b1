"""Which trackers a run has is decided before it starts, and a later attempt goes on in their runs."""

from pathlib import Path
from typing import Any

import pytest

from mpt.errors import StorageError, UnsupportedError
from mpt.hardware.packages import CONSIDERED
from mpt.planning.trackers import choose_trackers, tracker_arguments
from mpt.recipe.load import check_recipe
from mpt.recipe.schema import Recipe
from mpt.recipe.trackers import PACKAGES, TRACKERS
from mpt.running.run_directory import RunDirectory
from mpt.running.trackers import keep_tracker_run, tracker_environment, tracker_runs

THERE = frozenset({"tensorboard", "trackio", "torch"})


def recipe(report_to: Any = None, **training: Any) -> Recipe:
    given = training if report_to is None else training | {"report_to": report_to}
    return Recipe.model_validate({"model": "gpt2", "data": "a.txt", "training": given})


@pytest.mark.parametrize(
    ("asked", "packages", "chosen"),
    [
        (None, THERE, []),
        ("none", THERE, []),
        ([], THERE, []),
        (["none"], THERE, []),
        ("tensorboard", THERE, ["tensorboard"]),
        (["trackio", "tensorboard", "trackio"], THERE, ["trackio", "tensorboard"]),
        ("all", THERE, ["tensorboard", "trackio"]),
        ("all", frozenset(), []),
        ("all", None, ["tensorboard"]),
        ("wandb", None, ["wandb"]),
        ("kubeflow", frozenset(), ["kubeflow"]),
    ],
)
def test_the_trackers_are_those_that_are_asked_for_and_installed(
    asked: Any, packages: frozenset[str] | None, chosen: list[str]
) -> None:
    decision = choose_trackers(recipe(asked), packages)
    assert decision.value == chosen
    assert decision.reason


@pytest.mark.parametrize(
    ("asked", "package", "install"),
    [
        ("wandb", "wandb", "pip install wandb"),
        (["tensorboard", "mlflow"], "mlflow", "pip install mlflow"),
        ("comet_ml", "comet_ml", "pip install comet-ml"),
        ("dagshub", "dagshub, mlflow", "pip install dagshub mlflow"),
    ],
)
def test_a_missing_package_is_refused_with_the_line_that_installs_it(asked: Any, package: str, install: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{package} is not installed") as raised:
        choose_trackers(recipe(asked), THERE)
    assert install in raised.value.remedy and raised.value.exit_code == 3


def test_every_tracker_s_package_is_looked_for() -> None:
    assert set(PACKAGES) <= set(CONSIDERED)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("wandbb", "did you mean wandb?"),
        ("[tensorboard, excel]", "tensorboard, trackio, wandb, all and none"),
        ("[all, wandb]", "write one of them"),
        ("[none, wandb]", "write one of them"),
    ],
)
def test_an_unknown_tracker_is_a_flaw_of_the_recipe(tmp_path: Path, asked: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: gpt2\ndata: a.txt\ntraining:\n  report_to: {asked}\n")
    problems = check_recipe(path)
    assert [(problem.line, problem.key) for problem in problems] == [(4, "training.report_to")]
    assert says in problems[0].suggestion


def test_the_run_is_called_as_the_plan_is() -> None:
    assert tracker_arguments(["wandb"], recipe("wandb"), "tiny") == {"report_to": ["wandb"], "run_name": "tiny"}
    assert tracker_arguments(["wandb"], recipe("wandb", run_name="mine"), "tiny")["run_name"] == "mine"
    assert tracker_arguments([], recipe(), "tiny") == {"report_to": "none"}


def test_a_later_attempt_gets_the_same_runs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    trackers = list(TRACKERS)
    first = tracker_environment(trackers, run, {})
    assert set(first) == {"WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR"}
    assert (first["WANDB_RESUME"], first["WANDB_DIR"]) == ("allow", str(tmp_path))
    keep_tracker_run(run, "mlflow", "m1")
    later = tracker_environment(trackers, run, {})
    assert later == first | {"MLFLOW_RUN_ID": "m1"}
    assert tracker_runs(run) == {"wandb": first["WANDB_RUN_ID"], "mlflow": "m1"}


def test_two_runs_have_different_ids_and_the_user_s_own_settings_stay(tmp_path: Path) -> None:
    ids = [tracker_environment(["wandb"], RunDirectory(tmp_path / name), {})["WANDB_RUN_ID"] for name in "ab"]
    assert ids[0] != ids[1]
    own = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must", "WANDB_DIR": "/elsewhere", "MLFLOW_RUN_ID": "m2"}
    assert tracker_environment(["wandb", "mlflow"], RunDirectory(tmp_path / "c"), own) == {}


def test_without_trackers_nothing_is_set_or_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert tracker_environment(["tensorboard", "trackio"], run, {}) == {}
    assert not run.trackers.exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.trackers.write_text('{"wandb": ')
    with pytest.raises(StorageError, match=r"trackers\.json"):
        tracker_environment(["wandb"], run, {})
