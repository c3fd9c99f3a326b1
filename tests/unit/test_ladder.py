"""Which rung comes next where a run's numbers went bad for good."""

from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.data_window import Epoch
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.planning.repair import Repair, apply
from mpt.recipe.schema import Recipe, RecoverySection
from mpt.running.ladder import LEVEL, next_rung, tried
from tests.unit.test_repair import TINY

N2 = {"code": "N2", "onset": 40, "step": 42}
RETRY = Repair("retry", {"code": "N2", "onset": 40})


def plan_of(machine: str, precision: Any, **training: Any) -> Plan:
    keys = {"precision": precision, "global_batch_size": 8, "training": {"learning_rate": 1e-3} | training}
    recipe = Recipe.model_validate(TINY | keys)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan")


def climb(word: dict[str, Any], plan: Plan, **policy: Any) -> list[tuple[str, Any]]:
    """Climb until no rung is left; each repair changes the plan that the next one looks at."""
    repairs: list[Repair] = []
    section = RecoverySection.model_validate(policy)
    while (rung := next_rung(word, repairs, apply(plan, repairs), section)) is not None:
        repairs.append(rung.repair)
        assert word["code"] in rung.reason
        assert len(repairs) < 20
    return [(repair.kind, repair.values.get("learning_rate", repair.values.get("mode"))) for repair in repairs]


LOWER = [("learning_rate", 5e-4), ("learning_rate", 2.5e-4)]


@pytest.mark.parametrize(
    ("machine", "precision", "code", "rungs"),
    [
        ("A100", "fp32", "N2", [("retry", None), *LOWER]),
        ("A100", "bf16", "N2", [("retry", None), *LOWER, ("precision", "fp32")]),
        ("A100", "bf16", "N6", [("retry", None), *LOWER, ("precision", "fp32")]),
        ("A100", "bf16_pure", "dead", [("retry", None), *LOWER, ("precision", "bf16"), ("precision", "fp32")]),
        ("A100", "fp16", "N3", [("retry", None), *LOWER, ("precision", "bf16"), ("precision", "fp32")]),
        # No scale and no rate helps a forward pass that leaves fp16's range.
        ("A100", "fp16", "N2", [("precision", "bf16"), ("retry", None), *LOWER, ("precision", "fp32")]),
        ("T4", "fp16", "N2", [("precision", "fp32"), ("retry", None), *LOWER]),
        ("T4", "fp16", "N1", [("precision", "fp32")]),
    ],
)
def test_the_rungs_in_their_order(machine: str, precision: str, code: str, rungs: list[tuple[str, Any]]) -> None:
    assert climb(N2 | {"code": code}, plan_of(machine, precision)) == rungs


@pytest.mark.parametrize(
    ("onset", "code", "is_tried_again"),
    [(40, "N2", False), (44, "N2", False), (48, "N2", False), (49, "N2", True), (20, "N2", True), (40, "N3", True)],
)
def test_an_event_is_confirmed_once_at_a_position(onset: int, code: str, is_tried_again: bool) -> None:
    rung = next_rung({"code": code, "onset": onset, "step": onset}, [RETRY], plan_of("A100", "bf16"), RecoverySection())
    assert rung is not None
    assert (rung.repair.kind == "retry") is is_tried_again


EPOCH = Epoch(samples=8000, steps=1000)


def exclude(code: str, onset: int, repairs: list[Repair], **policy: Any) -> dict[str, Any] | None:
    section = RecoverySection.model_validate({"rungs": ["exclude_data"]} | policy)
    word = {"code": code, "onset": onset, "step": onset}
    rung = next_rung(word, repairs, plan_of("A100", "bf16"), section, EPOCH)
    return None if rung is None else dict(rung.repair.values)


def test_data_are_left_out_where_an_event_came_again_at_its_place() -> None:
    plan = plan_of("A100", "bf16")
    repairs: list[Repair] = []
    for kind in ("retry", "exclude_data", "learning_rate"):
        rung = next_rung(N2, repairs, plan, RecoverySection(), EPOCH)
        assert rung is not None and rung.repair.kind == kind
        repairs.append(rung.repair)
    assert repairs[1].values == {"code": "N2", "onset": 40, "until": 55, "epoch": 0, "first": 272, "last": 432}
    assert tried(repairs) == "trained again unchanged, without 160 samples, learning rate 0.0005"


@pytest.mark.parametrize(
    ("code", "onset", "is_left_out"),
    [
        ("N2", 40, False),  # within what is left out already: the data are not to blame
        ("N3", 155, False),  # soon after it
        ("N3", 156, True),
        ("N1", 500, False),
        ("N4", 500, False),
        ("N7", 500, False),
        ("dead", 500, False),
        ("N6", 500, True),
    ],
)
def test_data_are_left_out_only_where_they_may_be_to_blame(code: str, onset: int, is_left_out: bool) -> None:
    first = Repair("exclude_data", exclude("N2", 40, []) or {})
    assert (exclude(code, onset, [first]) is not None) is is_left_out


def test_half_of_the_data_stays() -> None:
    short = Epoch(samples=128, steps=16)
    section = RecoverySection.model_validate({"rungs": ["exclude_data"], "margin": 0})
    plan = plan_of("A100", "bf16")
    first = next_rung(N2, [], plan, section, short)
    assert first is not None and first.repair.values["last"] - first.repair.values["first"] == 64
    assert next_rung(N2 | {"onset": 400}, [first.repair], plan, section, short) is None


def test_no_more_than_three_windows_are_left_out_and_none_of_a_stream() -> None:
    repairs: list[Repair] = []
    for onset in (40, 400, 800):
        repairs.append(Repair("exclude_data", exclude("N2", onset, repairs) or {}))
    assert exclude("N2", 1200, repairs) is None
    section = RecoverySection.model_validate({"rungs": ["exclude_data"]})
    assert next_rung(N2, [], plan_of("A100", "bf16"), section, None) is None


def test_the_recipe_says_how_much_is_left_out() -> None:
    found = exclude("N2", 40, [], exclude_batches=3)
    assert found is not None and found["last"] - found["first"] == 24


def test_the_recipe_chooses_rungs_order_and_factor() -> None:
    plan = plan_of("A100", "bf16")
    assert climb(N2, plan, rungs=[]) == []
    assert climb(N2, plan, rungs=["raise_precision"]) == [("precision", "fp32")]
    assert climb(N2, plan, rungs=["raise_precision", "retry"]) == [("precision", "fp32"), ("retry", None)]
    lowered = climb(N2, plan, rungs=["lower_learning_rate"], learning_rate_factor=0.1)
    assert [rate for _, rate in lowered] == pytest.approx([1e-4, 1e-5])


def test_a_lowered_rate_is_a_number_that_one_would_write_into_a_recipe() -> None:
    plan = plan_of("A100", "bf16", learning_rate=3.0)
    lowered = climb(N2, plan, rungs=["lower_learning_rate"], learning_rate_factor=0.003)
    assert [rate for _, rate in lowered] == [0.009, 2.7e-5]  # and no 0.009000000000000001


def test_a_raised_precision_is_planned_as_if_it_had_been_asked_for() -> None:
    plan = plan_of("T4", {"mode": "fp16", "loss_scale": {"initial": 1024}, "reduce_dtype": None})
    raised = apply(plan, [Repair("precision", {"mode": "fp32"})])
    found = [raised.value(key) for key in ("precision", "loss_scale", "autocast_dtype")]
    assert found == ["fp32", None, None]
    assert raised.recipe == plan.recipe  # the user's words stay
    assert raised.value("micro_batch_size") == plan.value("micro_batch_size")
    assert "fp16" not in {key for key, value in raised.training_arguments.items() if value is True}


def test_what_was_tried_is_said_in_order() -> None:
    repairs = [RETRY, Repair("micro_batch", {"micro_batch_size": 2}), Repair("precision", {"mode": "fp32"})]
    assert tried(repairs) == "trained again unchanged, precision fp32"
    assert tried([]) == "nothing"


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"rungs": ["retry", "retry"]}, "names one twice"),
        ({"rungs": ["retry"], "learning_rate_factor": 0.5}, "lower_learning_rate"),
        ({"learning_rate_factor": 1.0}, "less than 1"),
        ({"rungs": ["retry"], "exclude_batches": 3}, "add it to rungs"),
        ({"rungs": ["pray"]}, "Input should be"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(block: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RecoverySection.model_validate(block)


@pytest.mark.parametrize(("code", "onset", "is_left_out"), [("N6", 8, False), ("N6", 9, True), ("N2", 1, True)])
def test_a_loss_that_rises_from_the_first_steps_on_is_not_blamed_on_the_data(
    code: str, onset: int, is_left_out: bool
) -> None:
    assert (exclude(code, onset, []) is not None) is is_left_out


def test_a_loss_that_drifts_away_over_many_steps_is_not_blamed_on_the_data() -> None:
    word = N2 | {"code": "N6", "what": LEVEL}
    plan = plan_of("A100", "fp32")
    policy = RecoverySection(rungs=["exclude_data", "lower_learning_rate"])
    rung = next_rung(word, [], plan, policy, EPOCH)
    assert rung is not None and rung.repair.kind == "learning_rate"
    rung = next_rung(word | {"what": "loss"}, [], plan, policy, EPOCH)
    assert rung is not None and rung.repair.kind == "exclude_data"
