"""What a run's events say about it and about its recipe: tables, without a process or a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.planning.repair import Repair, apply, halve_micro_batch, with_keys
from mpt.recipe.schema import Recipe
from mpt.reporting.checkpoint_list import ListedCheckpoint
from mpt.reporting.diagnosis import Diagnosis, diagnose, to_text
from mpt.reporting.evidence import Evidence
from tests.unit.test_repair import BATCHES, TINY
from tests.unit.test_repair import plan_of as plan_of_batch

Event = dict[str, Any]


def plan_of(machine: str = "A100", precision: Any = "bf16", **keys: Any) -> Plan:
    training = {"learning_rate": 1e-3, "max_steps": 1000} | keys.pop("training", {})
    recipe = Recipe.model_validate(TINY | {"precision": precision, "training": training} | keys)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan")


def event(kind: str, attempt: int = 1, second: int = 0, **payload: Any) -> Event:
    return {"time": f"2026-01-01T00:00:{second:02d}.000+00:00", "attempt": attempt, "rank": 0, "kind": kind} | payload


def started(attempt: int = 1, resume_from: str | None = None) -> list[Event]:
    return [
        event("attempt_started", attempt, resume_from=resume_from),
        event("training_started", attempt, step=0, max_steps=1000),
    ]


def health(step: int, code: str, action: str, attempt: int = 1, **more: Any) -> Event:
    return event("health", attempt, step=step, code=code, action=action, reason=f"a reason for {code}", **more)


def bad(step: int, code: str, attempt: int = 1) -> list[Event]:
    """An attempt that ends with its numbers."""
    told = {"what": "loss", "reason": f"a reason for {code}", "onset": step}
    return [
        health(step, code, "roll_back", attempt),
        event("diverged", attempt, step=step, code=code, value="nan", **told),
        event("attempt_ended", attempt, 9, returncode=81, verdict="diverged", reason="it went bad"),
    ]


def given_up(reason: str = "it went bad", code: int = 81, outcome: str = "diverged") -> Event:
    return event("run_finished", outcome=outcome, exit_code=code, reason=reason)


def finished(attempt: int = 1) -> list[Event]:
    return [
        event("finished", attempt, step=1000, train_loss=2.5, eval_loss=None),
        event("attempt_ended", attempt, 9, returncode=0, verdict="finished", reason="finished at step 1000"),
        event("run_finished", attempt, outcome="finished", exit_code=0, reason="finished at step 1000"),
    ]


def rows(first: int, last: int, attempt: int = 1, **more: Any) -> list[Event]:
    return [{"step": step, "attempt": attempt, "loss": 2.5, **more} for step in range(first, last + 1)]


def diagnosis(events: list[Event], plan: Plan | None = None, **evidence: Any) -> Diagnosis:
    plans = evidence.pop("plans", {} if plan is None else {1: plan})
    return diagnose(Evidence(Path("runs/mine"), events, plans=plans, **evidence))


def advised(told: Diagnosis) -> dict[str, Any]:
    return {key: value for finding in told.findings for key, value in finding.recipe.items()}


@pytest.mark.parametrize(
    ("machine", "precision", "code", "onset", "recipe"),
    [
        ("A100", "fp16", "N2", 40, {"precision": "bf16"}),
        ("A100", "fp16", "N1", 40, {"precision": "bf16"}),
        ("T4", "fp16", "N2", 40, {"precision": "fp32"}),
        ("T4", "fp16", "N3", 40, {"precision": "fp32"}),
        ("A100", "bf16", "N2", 40, {"training.learning_rate": 5e-4, "training.warmup_steps": 100}),
        ("A100", "fp32", "N6", 40, {"training.learning_rate": 5e-4, "training.warmup_steps": 100}),
        ("A100", "bf16", "dead", 40, {"training.learning_rate": 5e-4, "training.warmup_steps": 100}),
        ("A100", "bf16", "N4", 40, {"training.learning_rate": 5e-4, "training.warmup_steps": 100}),
        ("A100", "bf16", "N4", 1, {}),
        ("A100", "bf16", "N7", 40, {}),
    ],
)
def test_what_to_write_where_no_rung_helped(
    machine: str, precision: str, code: str, onset: int, recipe: dict[str, Any]
) -> None:
    told = diagnosis([*started(), *bad(onset, code), given_up()], plan_of(machine, precision))
    assert len(told.findings) == 1
    assert code in told.findings[0].problem or code == "dead"
    assert advised(told) == recipe
    assert told.go_on is not None
    assert told.go_on.startswith("mpt train runs/mine/recipe.yaml --name mine ")
    assert told.go_on.endswith("--resume never")
    assert all(f" {key}=" in told.go_on for key in recipe)


@pytest.mark.parametrize(
    ("training", "recipe"),
    [
        ({"learning_rate": 1e6}, {"training.learning_rate": 5e-5, "training.warmup_steps": 100}),
        ({"learning_rate": 1e-2}, {"training.learning_rate": 5e-3, "training.warmup_steps": 100}),
        ({"warmup_steps": 150}, {"training.learning_rate": 5e-4, "training.warmup_steps": 300}),
        ({"warmup_steps": 0.05}, {"training.learning_rate": 5e-4, "training.warmup_steps": 100}),
        ({"warmup_steps": 400}, {"training.learning_rate": 5e-4, "training.warmup_steps": 500}),
        ({"warmup_steps": 600}, {"training.learning_rate": 5e-4}),
        ({"max_steps": 5}, {"training.learning_rate": 5e-4, "training.warmup_steps": 1}),
        (
            {"max_grad_norm": 0},
            {"training.learning_rate": 5e-4, "training.warmup_steps": 100, "training.max_grad_norm": 1.0},
        ),
    ],
)
def test_a_calmer_run_than_the_recipe_asked_for(training: dict[str, Any], recipe: dict[str, Any]) -> None:
    told = diagnosis([*started(), *bad(40, "N2"), given_up()], plan_of(training=training))
    assert advised(told) == pytest.approx(recipe)


@pytest.mark.parametrize(("onsets", "is_said"), [((40, 44), True), ((40, 400), False), ((40,), False), ((2, 2), False)])
def test_the_same_place_each_time_points_to_the_data(onsets: tuple[int, ...], is_said: bool) -> None:
    events = [one for n, onset in enumerate(onsets, 1) for one in [*started(n), *bad(onset, "N2", n)]]
    told = diagnosis([*events, given_up()], plans=dict.fromkeys(range(1, len(onsets) + 1), plan_of()))
    assert any("the same place" in line for line in told.findings[0].evidence) == is_said


@pytest.mark.parametrize(
    ("repairs", "recipe"),
    [
        ([Repair("retry", {"code": "N2", "onset": 40})], {}),
        ([Repair("learning_rate", {"learning_rate": 5e-4, "warmup_steps": 100})], {"training.learning_rate": 5e-4}),
        ([Repair("precision", {"mode": "fp32"})], {"precision": "fp32"}),
        (
            [
                Repair("learning_rate", {"learning_rate": 5e-4, "warmup_steps": 9}),
                Repair("precision", {"mode": "fp32"}),
            ],
            {"training.learning_rate": 5e-4, "precision": "fp32"},
        ),
    ],
)
def test_what_a_run_settled_at_goes_into_the_recipe(repairs: list[Repair], recipe: dict[str, Any]) -> None:
    plan = plan_of()
    told = diagnosis([*started(), *started(2), *finished(2)], plans={1: plan, 2: apply(plan, repairs)})
    assert advised(told) == recipe
    assert not told.findings or "the run finished with" in told.findings[0].problem


@pytest.mark.parametrize(("machine", "keys", "sizes"), BATCHES)
def test_the_batch_that_is_advised_plans_to_the_one_that_the_run_settled_at(
    machine: str, keys: dict[str, Any], sizes: list[int]
) -> None:
    plan = plan_of_batch(machine, **keys)
    repair = halve_micro_batch(plan)
    assert repair is not None
    settled = apply(plan, [repair])
    told = diagnosis([*started(), *finished()], settled)
    recipe = with_keys(plan.recipe, advised(told))
    again = resolve(recipe, plan.machine, plan.facts, name="again")
    for key in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "world_size"):
        assert again.value(key) == settled.value(key), key


def test_an_event_that_did_not_come_again_points_to_the_machine() -> None:
    change = {"changes": [], "reason": "once more", "repair": Repair("retry", {"code": "N2", "onset": 40}).to_json()}
    events = [*started(), *bad(40, "N2"), event("plan_changed", **change), *started(2), *finished(2)]
    told = diagnosis(events, plan_of(), rows=rows(1, 39) + rows(30, 60, 2))
    assert [finding.problem.partition(" did")[0] for finding in told.findings] == ["N2 at step 40"]
    assert "machine" in told.findings[0].remedy
    early = diagnosis(events[:-3], plan_of(), rows=rows(1, 39) + rows(30, 44, 2))
    assert early.findings == ()  # not passed yet


def test_data_that_were_left_out_are_told_with_the_incident_that_shows_them() -> None:
    values = {"code": "N2", "onset": 40, "until": 55, "epoch": 0, "first": 272, "last": 432}
    change = {
        "changes": [{"key": "excluded_data", "was": None, "now": "epoch 0: 272 to 431"}],
        "reason": "N2 at step 40 again",
        "repair": Repair("exclude_data", values).to_json(),
    }
    looked = event("autopsy", 2, incident="0002", step=40, cause="the loss is inf", rank=0)
    events = [*started(2), *bad(40, "N2", 2), looked, event("plan_changed", 2, **change), *started(3), *finished(3)]
    told = diagnosis(events, plan_of(), rows=rows(1, 60, 3))
    (finding,) = [finding for finding in told.findings if "left out" in finding.problem]
    assert finding.problem == "160 samples are left out: N2 came at them twice"
    assert finding.evidence[1] == "incidents/0002: the loss is inf"
    assert told.story.changes[0].changes == (("excluded_data", None, "epoch 0: 272 to 431"),)


@pytest.mark.parametrize(
    ("clips", "norm", "training", "recipe"),
    [
        (2, 0.2, {}, None),
        (3, 0.2, {}, {"training.max_grad_norm": 0.3, "training.warmup_steps": 100}),
        (3, 0.5, {}, {"training.warmup_steps": 100}),
        (3, 0.5, {"max_grad_norm": 0}, {"training.max_grad_norm": 0.75, "training.warmup_steps": 100}),
        (3, 0.5, {"max_steps": 100}, {"training.learning_rate": 5e-4}),
    ],
)
def test_spikes_that_were_clipped_again_and_again(
    clips: int, norm: float, training: dict[str, Any], recipe: dict[str, Any] | None
) -> None:
    events = [*started(), *(health(50 + n, "N5", "clip") for n in range(clips)), *finished()]
    told = diagnosis(events, plan_of(training=training), rows=rows(1, 99, grad_norm=norm))
    assert (advised(told) if told.findings else None) == recipe


@pytest.mark.parametrize(("clips_after", "is_found"), [(2, False), (3, True)])
def test_clips_under_a_learning_rate_that_was_given_up_are_what_that_rate_did(clips_after: int, is_found: bool) -> None:
    plan = plan_of()
    lowered = Repair("learning_rate", {"learning_rate": 1e-4, "warmup_steps": 100})
    change = event("plan_changed", changes=[], repair=lowered.to_json(), reason="N6 at step 20 again")
    events = [*started(), *(health(10 + n, "N5", "clip") for n in range(8)), *bad(20, "N6"), change]
    events += [*started(2), *(health(40 + n, "N5", "clip", 2) for n in range(clips_after)), *finished(2)]
    made = rows(1, 20, grad_norm=5e3) + rows(1, 99, 2, grad_norm=0.2)
    told = diagnosis(events, plans={1: plan, 2: apply(plan, [lowered])}, rows=made)
    assert ("N5: the gradient norm spiked again and again, and was clipped" in to_text(told)) == is_found
    assert advised(told).get("training.max_grad_norm") == (0.3 if is_found else None)
    assert ("3 times at steps 40 to 42" in to_text(told)) == is_found


def test_clips_by_the_dozen_with_nothing_known_of_the_norm() -> None:
    events = [*started(), *(health(50 + n, "N5", "clip") for n in range(12)), *finished()]
    told = diagnosis(events, plan_of(), rows=rows(1, 99, grad_norm=None))
    assert set(advised(told)) == {"training.warmup_steps"}


@pytest.mark.parametrize(
    ("skipped", "steps", "is_found"), [(10, 100, False), (11, 100, True), (30, 60, False), (0, 1000, False)]
)
def test_fp16_that_skips_too_many_steps(skipped: int, steps: int, is_found: bool) -> None:
    made = rows(1, skipped, loss_scale=1024.0, skipped=True) + rows(skipped + 1, steps, loss_scale=512.0, skipped=False)
    told = diagnosis([*started(), *finished()], plan_of("A100", "fp16"), rows=made)
    assert advised(told) == ({"precision": "bf16"} if is_found else {})
    assert f"{skipped} of {steps} steps skipped" in to_text(told)
    scaling = told.story.scaling
    assert scaling is not None
    assert (scaling.lowest, scaling.last) == (512.0, 512.0)


@pytest.mark.parametrize(
    ("phase", "made", "key"),
    [
        ("training", 5, "restart.step_timeout"),
        ("training", 0, "restart.first_step_timeout"),
        ("model", 0, "restart.loading_timeout"),
        ("starting", 0, "restart.loading_timeout"),
        ("saving", 5, "restart.phase_timeout"),
        ("evaluating", 5, "restart.phase_timeout"),
    ],
)
def test_a_hang_names_the_limit_of_its_phase(phase: str, made: int, key: str) -> None:
    told = {"phase": phase, "step": made, "silent_s": 600.5, "limit_s": 600.0, "ranks": [1]}
    events = [
        *started(),
        event("hang", **told, stacks={"1": "stacks-1.txt", "0": "none: the process is gone"}),
        event("attempt_ended", returncode=-9, verdict="failed", reason="it hung"),
        given_up("it hung", 87, "failed"),
    ]
    found = diagnosis(events, plan_of(), rows=rows(1, made))
    assert advised(found) == {key: 1200}
    assert "runs/mine/attempts/001/stacks-1.txt" in found.findings[0].remedy
    assert any("rank 0 of attempt 1 left no stacks" in line for line in found.findings[0].evidence)


@pytest.mark.parametrize(
    ("keys", "machine", "recipe"),
    [
        ({"gradient_checkpointing": False}, "A100", {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": True}, "A100", {"data.sequence_length": 32}),
        (
            {"gradient_checkpointing": True, "global_batch_size": 8, "distributed": {"strategy": "zero2"}},
            "8xA100",
            {"distributed.strategy": "zero3"},
        ),
        (
            {"micro_batch_size": 4, "restart": {"halve_micro_batch": False}},
            "A100",
            {"restart.halve_micro_batch": True},
        ),
    ],
)
def test_too_little_memory_names_the_cheapest_change(
    keys: dict[str, Any], machine: str, recipe: dict[str, Any]
) -> None:
    keys = {"micro_batch_size": 1} | keys
    told = diagnosis([*started(), given_up("out of memory", 86, "failed")], plan_of(machine, **keys))
    assert advised(told) == recipe


def test_a_full_disk_says_what_the_run_could_spare() -> None:
    listed = [
        ListedCheckpoint(name, step, 2**30, None, 1, state)
        for name, step, state in (
            ("checkpoint-10", 10, "committed"),
            ("checkpoint-20", 20, "committed"),
            ("quarantine-1/checkpoint-30", 30, "quarantined"),
        )
    ]
    told = diagnosis([*started(), given_up("no space", 83, "failed")], plan_of(), checkpoints=listed)
    assert "1.0 GiB of checkpoints that were given up lie in runs/mine/checkpoints/quarantine-*" in (
        told.findings[0].remedy
    )
    assert "mpt checkpoints prune runs/mine --keep 1" in told.findings[0].remedy
    bare = diagnosis([*started(), given_up("no space", 83, "failed")], plan_of(training={"save_total_limit": 1}))
    assert "nothing to spare" in bare.findings[0].remedy
    assert advised(bare) == {}


def test_updates_that_were_left_out_are_no_reason_to_change_anything() -> None:
    told = diagnosis([*started(), health(40, "N3", "skip"), *finished()], plan_of())
    assert advised(told) == {}
    assert "step 40" in told.findings[0].remedy


@pytest.mark.parametrize("code", ["N0", "N1", "N2", "N3", "N4", "N5", "N6", "N7", "dead", "N99"])
def test_every_code_is_told_in_words_with_its_count(code: str) -> None:
    events = [*started(), health(4, code, "skip"), health(9, code, "skip"), *started(2), health(7, code, "clip", 2)]
    seen = diagnosis(events).story.seen(code)
    assert seen is not None
    assert (seen.count, seen.first_step, seen.last_step, seen.attempts) == (3, 4, 9, (1, 2))
    assert seen.actions == {"skip": 2, "clip": 1}
    assert ("does not know" in seen.meaning) == (code == "N99")


def test_the_codes_are_those_of_the_watch() -> None:
    from mpt.reporting.story import MEANINGS
    from mpt.training.verdict import Code

    assert list(MEANINGS) == [code.value for code in Code]


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([], "interrupted"),
        ([event("run_created")], "interrupted"),
        (started(), "interrupted"),
        ([*started(), *finished()], "finished"),
        ([*started(), *finished()[:1]], "finished"),  # killed between the last word and the verdict
        ([*started(), *finished(), event("run_resumed")], "interrupted"),
        ([*started(), given_up("as asked", 80, "stopped")], "stopped"),
        ([*started(), *bad(4, "N2"), given_up()], "diverged"),
    ],
)
def test_the_outcome_is_that_of_the_newest_start(events: list[Event], outcome: str) -> None:
    told = diagnosis(events)
    assert told.story.outcome == outcome
    assert (told.go_on is None) == (outcome == "finished")
    live = diagnosis(events, owner="process 1 on here, since today")
    assert (live.story.outcome, live.go_on) == ("running", None)
    for one in (told, live):
        assert to_text(one)
        json.dumps(one.to_json(), allow_nan=False)


def test_an_attempt_that_the_night_cut_off_did_not_last_until_the_morning() -> None:
    late = {"time": "2026-01-01T08:00:00.000+00:00"}
    events = [*started(), event("checkpoint_saved", 1, 5, step=9, name="checkpoint-9"), event("run_resumed") | late]
    (attempt,) = diagnosis(events).story.attempts
    assert (attempt.ending, attempt.seconds, attempt.saved) == ("cut off", 5.0, 1)


def test_a_run_with_nothing_wrong_is_one_line_with_its_numbers() -> None:
    told = diagnosis([*started(), *finished()], plan_of(), rows=rows(1, 1000))
    assert told.findings == ()
    assert "nothing is wrong: 1 attempt, no bad number, no damaged checkpoint" in to_text(told)
    assert "what to change" not in to_text(told)


def test_a_failure_that_no_rule_knows_is_told_in_its_own_words() -> None:
    told = diagnosis([*started(), given_up("odd", 85, "failed")], plan_of())
    assert [finding.problem for finding in told.findings] == ["odd"]


def test_the_way_on_quotes_names_and_names_the_folder_where_it_is_another() -> None:
    told = diagnose(Evidence(Path("elsewhere/my run"), started()))
    assert told.go_on == "mpt train 'elsewhere/my run/recipe.yaml' --name 'my run' --runs-dir elsewhere"
    usual = diagnose(Evidence(Path("runs/mine"), started()))
    assert usual.go_on == "mpt train runs/mine/recipe.yaml --name mine"
