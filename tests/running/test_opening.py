"""What is allowed with a run directory that is already there."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.running.journal import Journal
from mpt.running.manifest import read_manifest, write_manifest
from mpt.running.opening import locate, opened
from mpt.running.retention import prune
from tests.running.small_runs import SmallRun, small_plan

NewRun = Callable[..., SmallRun]


def test_a_run_that_trained_nothing_takes_new_values_and_makes_its_tokenizer_anew(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 0, "do": "2"}])
    assert run.train().code == 2
    tokenizer = run.directory.tokenizer
    tokenizer.mkdir()
    run.wishes = {}
    mended = run.train("max_steps=30")
    assert mended.code == 0
    assert "nothing was trained yet" in mended.err
    assert run.kinds("changes_accepted", "changes") == [[{"key": "training.max_steps", "was": 20, "now": 30}]]
    assert not tokenizer.exists()


def test_from_its_first_step_on_a_run_keeps_its_values(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 1, "do": "2"}])  # it died in that step, before any checkpoint
    assert run.train().code == 2
    run.wishes = {}
    refused = run.train("max_steps=30")
    assert refused.code == 2
    assert "training.max_steps: 20 -> 30" in refused.err
    assert "--accept-changes" in refused.err


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"to": "fp32"}, None),
        ({"to": "fp32"}, {"to": "fp32", "require": {"max_loss_gap": 0.1}}),
        ({"to": "fp32", "require": {"max_loss_gap": 0.1}}, {"to": "bf16", "steps": 3}),
        (None, {"to": "fp32", "steps": 3, "require": {"min_gradient_cosine": 0.9}}),
    ],
    ids=["left out", "another bound", "another reference", "added"],
)
def test_a_comparison_changes_nothing_that_is_trained_and_keeps_no_run_from_going_on(
    new_run: NewRun, before: dict[str, Any] | None, now: dict[str, Any] | None
) -> None:
    run = new_run()
    assert run.train().code == 0
    begun = small_plan(compare=before)
    run.directory.attempt(1).plan.write_text(json.dumps(begun.to_json()))
    with opened(small_plan(compare=now), run.directory, resume="auto", accept_changes=False) as found:
        assert found.finished
    with (
        pytest.raises(MptError, match=r"training\.max_steps: 20 -> 30") as refused,
        opened(small_plan(max_steps=30, compare=now), run.directory, resume="auto", accept_changes=False),
    ):
        pytest.fail("it went on")
    assert "compare" not in refused.value.problem


def test_the_old_run_keeps_its_name_when_the_new_one_can_not_begin(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    assert run.train().code == 0
    before = sorted(path.name for path in run.directory.path.iterdir())
    mkdir = os.mkdir

    def full(path: str, *arguments: int) -> None:
        if Path(path) == run.directory.path:
            raise OSError(28, "No space left on device")
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", full)
    plan = small_plan()
    with (
        pytest.raises(Exception, match="No space left"),
        opened(plan, locate(run.runs_dir, "small"), resume="never", accept_changes=False),
    ):
        pytest.fail("it began")
    assert sorted(path.name for path in run.directory.path.iterdir()) == before
    assert [path.name for path in run.runs_dir.iterdir()] == ["small"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_with_something_else_in_it_is_begun_in_and_keeps_it(new_run: NewRun, resume: str) -> None:
    run = new_run()
    run.directory.path.mkdir(parents=True)
    run.directory.path.joinpath("notes.txt").write_text("mine")
    assert run.train(resume=resume).code == 0
    assert run.directory.path.joinpath("notes.txt").read_text() == "mine"


def test_never_moves_the_old_run_aside_whole_each_time(new_run: NewRun) -> None:
    run = new_run()
    for _ in range(3):
        assert run.train(resume="never").code == 0
    assert sorted(path.name for path in run.runs_dir.iterdir()) == ["small", "small.old-1", "small.old-2"]
    assert (run.runs_dir / "small.old-1" / "final" / "state").read_text() == run.state


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "-x"])
def test_a_name_that_is_no_folder_s_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="is no name for a run"):
        locate(tmp_path, name)


def stopped_at_13(new_run: NewRun) -> SmallRun:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "2"}])
    assert run.train().code == 2
    run.wishes = {}
    return run


def test_a_move_into_quarantine_that_a_kill_cut_short_is_finished_before_the_run_goes_on(
    new_run: NewRun, undisturbed: str
) -> None:
    run = stopped_at_13(new_run)
    Journal(run.directory.journal, 1).append(
        "checkpoints_quarantined", names=["checkpoint-10"], lineage=1, step=5, reason="it rose"
    )
    assert run.train().code == 0
    assert run.kinds("attempt_started", "resume_from") == [None, "checkpoint-5"]
    assert [path.name for path in run.directory.checkpoints.glob("quarantine-*/*")] == ["checkpoint-10"]
    assert read_manifest(run.directory.checkpoints / "checkpoint-10")["lineage"] == 2
    assert run.state == undisturbed


def test_going_back_as_asked_begins_a_lineage_and_says_why(new_run: NewRun) -> None:
    run = stopped_at_13(new_run)
    assert run.train(resume="checkpoint-5").code == 0
    assert run.kinds("checkpoints_quarantined", "names") == [["checkpoint-10"]]
    assert run.kinds("checkpoints_quarantined", "reason") == ["--resume checkpoint-5"]
    assert run.kinds("quarantine_completed", "lineage") == [1]


def test_a_run_with_a_newer_mpt_s_checkpoint_is_refused_and_stays(new_run: NewRun) -> None:
    run = stopped_at_13(new_run)
    manifest = run.directory.checkpoints / "checkpoint-10" / "manifest.json"
    content = json.loads(manifest.read_text()) | {"version": 3}
    manifest.write_text(json.dumps(content))
    refused = run.train()
    assert refused.code == 3
    assert "written by a newer mpt" in refused.err
    assert "Traceback" not in refused.err
    assert run.checkpoints == ["checkpoint-10", "checkpoint-5"]


def begun_as(new_run: NewRun, plan: Plan) -> SmallRun:
    """Make a run that was killed after its checkpoint of step 10, as `plan` would have had it."""
    run = stopped_at_13(new_run)
    run.directory.attempt(1).plan.write_text(json.dumps(plan.to_json()))
    for folder in run.directory.checkpoints.iterdir():
        step, world_size = int(folder.name.rpartition("-")[2]), plan.value("world_size")
        write_manifest(folder, step=step, world_size=world_size, lineage=1, health={"finite": True})
    return run


def reopen(run: SmallRun, plan: Plan, *, accept_changes: bool) -> str:
    """Open the run under `plan`; give the step that it goes on from, or what it is refused with."""
    try:
        with opened(plan, run.directory, resume="auto", accept_changes=accept_changes) as found:
            assert found.start_from is not None
            return found.start_from.path.name
    except MptError as error:
        assert error.exit_code == 2
        return f"{error.problem}\n{error.remedy}"


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("before", "now"),
    [({"processes": 2}, {}), ({}, {"processes": 2}), ({"processes": 2, "zero_stage": 2}, {"zero_stage": 2})],
    ids=["two to one", "one to two", "zero2, two to one"],
)
def test_another_number_of_processes_is_refused_with_the_differences_listed(
    new_run: NewRun, before: dict[str, int], now: dict[str, int]
) -> None:
    was, plan = small_plan(**before), small_plan(**now)
    run = begun_as(new_run, was)
    events = run.events
    refusal = reopen(run, plan, accept_changes=False)
    for key in ("world_size", "global_batch_size"):
        assert f"{key}: {was.value(key)} -> {plan.value(key)}" in refusal
    assert "--accept-changes" in refusal
    assert run.events == events


@pytest.mark.fault(32)
def test_another_number_of_processes_is_accepted_where_the_global_batch_stays_and_journalled(new_run: NewRun) -> None:
    run = begun_as(new_run, small_plan(processes=2))
    events = run.events
    refusal = reopen(run, small_plan(), accept_changes=True)
    assert "the global batch was 2 and would be 1 with 1 process:" in refusal
    assert "Add global_batch_size=2" in refusal
    assert run.events == events
    assert reopen(run, small_plan(global_batch_size=2), accept_changes=True) == "checkpoint-10"
    (changes,) = run.kinds("changes_accepted", "changes")
    assert {"key": "world_size", "was": 2, "now": 1} in changes
    assert run.kinds("run_resumed", "accepts_changes") == [True]


@pytest.mark.fault(32)
def test_another_global_batch_that_the_recipe_asks_for_is_accepted(new_run: NewRun) -> None:
    run = begun_as(new_run, small_plan(processes=2))
    assert reopen(run, small_plan(micro_batch_size=3), accept_changes=True) == "checkpoint-10"


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"zero_stage": 2}, "written by 2 processes with zero2"),
        ({"zero_stage": 3, "processes": 2}, "written by zero2 and can't be loaded by zero3"),
        ({"processes": 2}, "written by zero2 and can't be loaded by ddp"),
        ({}, "written by zero2 and can't be loaded by single"),
    ],
    ids=["one process", "another stage", "ddp", "single"],
)
def test_a_checkpoint_that_another_engine_or_world_can_not_load_is_refused_though_the_change_is_accepted(
    new_run: NewRun, now: dict[str, int], words: str
) -> None:
    run = begun_as(new_run, small_plan(processes=2, zero_stage=2))
    events = run.events
    refusal = reopen(run, small_plan(global_batch_size=2, **now), accept_changes=True)
    assert words in refusal
    assert "--accept-changes does not help" in refusal
    assert "Go on with zero2 and 2 processes" in refusal
    assert run.events == events


@pytest.mark.fault(30)
@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_was_set_otherwise_changes_nothing(new_run: NewRun, years: int) -> None:
    """Every time that the run has written is another one, and every file's: it goes on from the same step."""
    run = stopped_at_13(new_run)
    records = [event | {"time": f"{2026 + years}{event['time'][4:]}"} for event in run.events]
    run.directory.journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    chance = random.Random(years)
    for path in sorted(run.directory.path.rglob("*")):
        moment = 1e9 + years * 3e7 + chance.uniform(0, 1e6)
        os.utime(path, (moment, moment))
    assert prune(run.directory, 1) == ["checkpoint-5"]
    assert run.train().code == 0
    assert run.kinds("attempt_started", "resume_from")[-1] == "checkpoint-10"
    straight = new_run()
    straight.train()
    assert run.state == straight.state
