"""Which rung comes next where a run's numbers went bad for good."""

from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.planning.repair import Repair, apply
from mpt.recipe.schema import Recipe, RecoverySection
from mpt.running.ladder import next_rung, tried
from tests.unit.test_repair import TINY

N2 = {"code": "N2", "onset": 40, "step": 42}
RETRY = Repair("retry", {"code": "N2", "onset": 40})


def plan_of(machine: str, precision: Any, **training: Any) -> Plan:
    recipe = Recipe.model_validate(TINY | {"precision": precision, "training": {"learning_rate": 1e-3} | training})
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
        ({"rungs": ["pray"]}, "Input should be"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(block: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RecoverySection.model_validate(block)
