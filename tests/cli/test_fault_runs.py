"""Whole runs whose worker meets what stops a training elsewhere: `mpt train` finishes them unattended."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpt.reporting.summary import read_rows
from tests.cli.real_runs import RECIPE, Folder, environment

pytestmark = pytest.mark.slow
MODEL = {"config": RECIPE["model"]["config"] | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
WEIGHT = "transformer.h.0.mlp.c_fc.weight"


def train(folder: Path, faults: list[dict[str, Any]], **changes: Any) -> Folder:
    """Carry out `mpt train` with faults, to its end."""
    made = Folder(folder)
    made.write(model=MODEL, sample=None, **changes)
    command = [sys.executable, "-m", "tests.training.faulty_train", json.dumps(faults), "train", "tiny.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def losses(folder: Folder) -> dict[int, float]:
    return {step: row["loss"] for step, row in read_rows(folder.run).items()}


def weights(folder: Folder) -> bytes:
    return folder.run.final.joinpath("model.safetensors").read_bytes()


# --- no room for the batch, a loader that hangs, a weight that goes bad

TRAINING = {"max_steps": 8, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 4}
BATCHES = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def unlucky(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Three faults, one an attempt; the last attempt is spared."""
    faults = [
        {"no_memory_above": 2},
        {"in_attempts": [2], "evaluation_takes": 6, "loader_sleeps_at": 5},
        {"in_attempts": [3], "nan_weight_after": 5, "of": WEIGHT},
    ]
    folder = tmp_path_factory.mktemp("unlucky")
    return train(folder, faults, training=TRAINING, restart={"step_timeout": 2}, recovery={"margin": 0}, **BATCHES)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run that nothing befell, with the batch as `unlucky` had it in the end."""
    batches = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    return train(tmp_path_factory.mktemp("halved"), [], training=TRAINING, **batches)


@pytest.mark.fault(29)
def test_without_room_for_the_batch_half_of_it_is_accumulated_twice(
    unlucky: Folder, halved: Folder, tmp_path: Path
) -> None:
    change = unlucky.listed("plan_changed", "changes")[0]
    assert {entry["key"]: (entry["was"], entry["now"]) for entry in change} == {
        "micro_batch_size": (4, 2),
        "gradient_accumulation_steps": (1, 2),
    }
    assert losses(unlucky) == losses(halved)
    whole = losses(train(tmp_path / "whole", [], training=TRAINING, **BATCHES))
    # fp32 sums in another order; AdamW's first steps divide by tiny numbers and magnify it.
    assert losses(unlucky) == pytest.approx(whole, rel=1e-5)


@pytest.mark.fault(10)
def test_a_loader_that_hangs_is_found_out_and_a_slow_evaluation_is_left_alone(unlucky: Folder) -> None:
    """The evaluation was silent for longer than a step may be."""
    (hang,) = [event for event in unlucky.events if event["kind"] == "hang"]
    assert (hang["attempt"], hang["phase"], hang["step"]) == (2, "training", 5)
    assert "late_samples" in unlucky.run.attempt(2).stacks(0).read_text()
    assert {"step": 4, "attempt": 2}.items() <= next(e for e in unlucky.events if e["kind"] == "evaluated").items()
    assert unlucky.listed("attempt_started", "resume_from")[2] == "checkpoint-4"


@pytest.mark.fault(25)
def test_a_weight_that_went_bad_is_in_no_checkpoint_and_the_run_goes_back_to_a_good_one(
    unlucky: Folder, halved: Folder
) -> None:
    """Though only one checkpoint is kept."""
    (word,) = [event for event in unlucky.events if event["kind"] == "diverged"]
    assert (word["attempt"], word["step"], word["code"]) == (3, 6, "N4")
    assert WEIGHT in word["reason"]
    assert unlucky.listed("attempt_started", "resume_from")[3:] == ["checkpoint-4"]
    assert weights(unlucky) == weights(halved)


# --- spikes of the loss


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The loss is up for six steps in every attempt, and later for good in the first two."""
    faults = [
        {"loss_raised": {"by": 3.0, "at": [[20, 25]]}},
        {"loss_raised": {"by": 3.0, "at": [[60, 90]]}, "in_attempts": [1, 2]},
    ]
    return train(
        tmp_path_factory.mktemp("spiky"),
        faults,
        micro_batch_size=8,
        training={"max_steps": 90, "save_steps": 5, "save_total_limit": 30, "learning_rate": 1e-4},
        health={"min_seen": 8, "window": 16, "settle_steps": 16, "known_good_after": 20},
        recovery={"margin": 20, "rewarm_steps": 5, "rungs": ["retry", "lower_learning_rate"]},
    )


@pytest.mark.fault(28)
def test_a_spike_that_passes_is_an_event_and_no_more(spiky: Folder) -> None:
    found = [event for event in spiky.events if event["kind"] == "health" and event["attempt"] == 1]
    assert [(event["step"], event["action"]) for event in found[:2]] == [(22, "apply"), (38, "apply")]
    assert "the spike has passed" in found[1]["reason"]


@pytest.mark.fault(28)
def test_a_loss_that_stays_up_takes_the_run_far_enough_back_and_then_lowers_its_rate(spiky: Folder) -> None:
    ends = [event for event in spiky.events if event["kind"] == "diverged"]
    assert [(word["code"], word["onset"], word["step"]) for word in ends] == [("N6", 60, 78)] * 2
    begun = [int(name.rpartition("-")[2]) for name in spiky.listed("attempt_started", "resume_from")[1:]]
    assert len(begun) == 2
    assert all(0 < step <= 60 - 20 for step in begun)
    for step, given_up in zip(begun, spiky.listed("checkpoints_quarantined", "names"), strict=True):
        assert given_up == [f"checkpoint-{later}" for later in range(step + 5, 80, 5)]
    assert [change["kind"] for change in spiky.listed("plan_changed", "repair")] == ["retry", "learning_rate"]
    # What the abandoned lineages saved is no checkpoint of the run, whatever its number was.
    kept = {path.name for path in spiky.run.checkpoints.glob("quarantine-*/*")}
    assert {"checkpoint-70", "checkpoint-75"} <= kept
    assert sorted(losses(spiky)) == list(range(1, 91))


# --- a loss scale without room


@pytest.mark.fault(27)
def test_overflow_without_end_is_known_by_the_collapse_of_the_scale_and_another_precision_follows(
    tmp_path: Path,
) -> None:
    run = train(
        tmp_path / "endless",
        [{"nan_gradient_at": list(range(1, 41)), "of": WEIGHT, "in_attempts": [1]}],
        precision={"mode": "fp16", "allow_emulation": True},
        training={"max_steps": 24, "save_steps": 10, "learning_rate": 1e-3},
    )
    (word,) = [event for event in run.events if event["kind"] == "diverged"]
    assert (word["code"], word["what"]) == ("N1", "loss_scale")
    plan = json.loads(run.run.attempt(2).plan.read_text())
    assert plan["values"]["precision"]["value"] in ("bf16", "fp32")
    assert run.listed("finished", "step") == [24]
