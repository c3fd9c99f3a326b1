"""Whether checkpoints are written while the training goes on."""

from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.hardware.specs import parse_machine
from mpt.planning.background_saving import choose_background_saving
from mpt.planning.memory import MemoryEstimate
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import resolve
from mpt.recipe.schema import Recipe
from mpt.terms import Method, Strategy
from tests.unit.test_repair import TINY


def decide(asked: Any, machine: Machine, strategy: Strategy, *, optimizer_gib: float = 1.0) -> tuple[bool, str]:
    recipe = Recipe.model_validate(TINY | ({} if asked is None else {"background_saving": asked}))
    parts = {"optimizer": optimizer_gib, "weights": optimizer_gib / 2, "activations": 9.0}
    memory = MemoryEstimate(parts, peak_gib=2 * optimizer_gib)
    decision = choose_background_saving(recipe, machine, memory, strategy, Method.FULL)
    return decision.value, decision.reason


def on_a_host_of(gib: float | None) -> Machine:
    from dataclasses import replace

    return replace(parse_machine("A100"), host_memory_gib=gib)


@pytest.mark.parametrize(
    ("asked", "machine", "strategy", "found"),
    [
        (None, "A100", Strategy.SINGLE, True),
        (None, "8xH100", Strategy.DDP, True),
        (None, "8xH100", Strategy.ZERO2, False),
        (False, "A100", Strategy.SINGLE, False),
        (None, "cpu", Strategy.SINGLE, False),
        (True, "cpu", Strategy.SINGLE, True),
        (True, "cpu", Strategy.DDP, True),
    ],
)
def test_what_machine_and_engine_allow(asked: Any, machine: str, strategy: Strategy, found: bool) -> None:
    value, reason = decide(asked, parse_machine(machine), strategy)
    assert value is found and reason


@pytest.mark.parametrize(("host", "found"), [(None, True), (64.0, True), (60.0, True), (59.0, False), (16.0, False)])
def test_the_copy_takes_no_more_than_half_of_the_hosts_memory(host: float | None, found: bool) -> None:
    value, reason = decide(None, on_a_host_of(host), Strategy.SINGLE, optimizer_gib=20.0)
    assert value is found
    assert "30" in reason


def test_it_is_refused_where_deepspeeds_ranks_write_together() -> None:
    with pytest.raises(MptError, match="background_saving is true, and under zero2"):
        decide(True, parse_machine("8xH100"), Strategy.ZERO2)


def test_it_is_a_planned_value() -> None:
    recipe = Recipe.model_validate(TINY)
    plan = resolve(recipe, parse_machine("A100"), learn_model_facts(recipe), name="a-plan")
    assert plan.value("background_saving") is True
