"""A run that is gone on with under something else than it was begun with: refused, or accepted and journalled."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.real_runs import RECIPE, Folder

pytestmark = [pytest.mark.slow, pytest.mark.fault(32)]
BEGUN: dict[str, Any] = {key: value for key, value in RECIPE.items() if key != "sample"}


def begin(path: Path, **changes: Any) -> Folder:
    """Train a run whole."""
    folder = Folder(path)
    folder.write(**BEGUN | changes, sample=None)
    done = folder.train("tiny.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def cut_short(whole: Folder, path: Path) -> Folder:
    """Copy a run as a kill after its step 3 would have left it, its last word aside."""
    shutil.copytree(whole.path, path)
    folder = Folder(path)
    shutil.rmtree(folder.run.checkpoints / "checkpoint-6")
    shutil.rmtree(folder.run.final)
    return folder


def test_changed_data_is_refused_with_the_differences_and_goes_on_where_they_are_accepted(tmp_path: Path) -> None:
    folder = cut_short(begin(tmp_path / "whole"), tmp_path / "cut")
    (before,) = (event for event in folder.events if event["kind"] == "data_prepared")
    assert before["documents"] == 1 and before["tokens"] > 9000 and before["eval_samples"] > 10
    with folder.path.joinpath("reference.txt").open("a") as file:
        file.write("\nOne line more.\n")

    refused = folder.train("tiny.yaml")
    assert refused.returncode == 2
    assert "the data is not what this run was trained on before" in refused.stderr
    for key in ("eval_tokens", "eval_fingerprint"):
        assert f"    {key}: {before[key]} -> " in refused.stderr
    assert "--accept-changes" in refused.stderr and "--resume never" in refused.stderr
    assert len(folder.listed("attempt_started", "attempt")) == 2  # no restart
    assert folder.listed("data_prepared", "attempt") == [1]
    assert folder.listed("training_started", "step") == [0]

    done = folder.train("tiny.yaml", "--accept-changes")
    assert done.returncode == 0, done.stderr
    (changes,) = folder.listed("changes_accepted", "changes")
    assert "data.eval_fingerprint" in [change["key"] for change in changes]
    assert folder.listed("training_started", "step") == [0, 3]
    # What was accepted is what the run is trained on from now on.
    shutil.rmtree(folder.run.final)
    again = folder.train("tiny.yaml")
    assert again.returncode == 0, again.stderr
    assert len(folder.listed("changes_accepted", "changes")) == 1


def test_a_run_begun_by_two_processes_goes_on_with_one_at_the_same_place_in_its_data(tmp_path: Path) -> None:
    two = {"distributed": {"strategy": "ddp", "processes_per_node": 2}, "gradient_accumulation_steps": 1}
    without_dropout = RECIPE["model"]["config"] | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    whole = begin(tmp_path / "whole", **two, model={"config": without_dropout})
    folder = cut_short(whole, tmp_path / "cut")
    one = ("distributed.processes_per_node=1", "distributed.strategy=single")

    refused = folder.train("tiny.yaml", *one)
    assert refused.returncode == 2
    assert "world_size: 2 -> 1" in refused.stderr
    refused = folder.train("tiny.yaml", *one, "--accept-changes")
    assert refused.returncode == 2
    assert "the global batch was 4 and would be 2 with 1 process" in refused.stderr

    keys = ("global_batch_size=4", "gradient_accumulation_steps=2")
    done = folder.train("tiny.yaml", *one, *keys, "--accept-changes")
    assert done.returncode == 0, done.stderr
    (changes,) = folder.listed("changes_accepted", "changes")
    assert {"key": "world_size", "was": 2, "now": 1} in changes
    was, now = ({row["step"]: row for row in there.rows if "loss" in row} for there in (whole, folder))
    for step in (4, 5, 6):
        # The same samples; without dropout only the order of fp32 sums differs, which Adam's first steps magnify.
        assert now[step]["loss"] == pytest.approx(was[step]["loss"], rel=1e-5)
        assert now[step]["tokens"] == was[step]["tokens"]
    assert now[4]["attempt"] == 2
