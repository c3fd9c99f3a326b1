"""Recovery is a new plan: what a repair changes, and that it changes nothing else."""

import json
from typing import Any

import pytest

from mpt.errors import StorageError
from mpt.hardware.specs import parse_machine
from mpt.planning.data_window import DataWindow, windows_of
from mpt.planning.decision import Origin
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.planning.repair import Change, Repair, apply, changes, halve_micro_batch
from mpt.recipe.schema import Recipe
from mpt.running.repairs import repairs_of

TINY: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 128}},
    "data": {"source": "builtin:python-reference", "sequence_length": 64},
}  # fmt: skip
BATCHES: list[tuple[str, dict[str, Any], list[int]]] = [
    ("cpu", {"micro_batch_size": 8}, [8, 4, 2, 1]),
    ("cpu", {"global_batch_size": 12, "micro_batch_size": 6}, [6, 3, 1]),
    ("cpu", {"micro_batch_size": 5, "gradient_accumulation_steps": 2}, [5, 2, 1]),
    ("cpu", {"training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}}, [4, 2, 1]),
    ("cpu", {"micro_batch_size": 7}, [7, 1]),
    ("8xH100", {"global_batch_size": 64, "distributed": "auto"}, [8, 4, 2, 1]),
    ("8xH100", {"global_batch_size": 64, "distributed": "zero3", "offload": "cpu"}, [8, 4, 2, 1]),
    ("cpu", {"global_batch_size": 16, "micro_batch_size": 4, "distributed": "2"}, [4, 2, 1]),
]


def plan_of(machine: str = "cpu", **keys: Any) -> Plan:
    strategy = keys.pop("distributed", "auto")
    keys["distributed"] = {"processes_per_node": 2} if strategy == "2" else {"strategy": strategy}
    recipe = Recipe.model_validate(TINY | keys)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan")


@pytest.mark.parametrize(("machine", "keys", "sizes"), BATCHES)
def test_too_little_memory_halves_the_micro_batch_down_to_one_and_keeps_the_global_batch(
    machine: str, keys: dict[str, Any], sizes: list[int]
) -> None:
    base = plan_of(machine, **keys)
    repairs: list[Repair] = []
    plan, seen = base, [base.value("micro_batch_size")]
    while (repair := halve_micro_batch(plan)) is not None:
        repairs.append(repair)
        plan = apply(base, repairs)
        seen.append(plan.value("micro_batch_size"))
        parts = [plan.value(key) for key in ("micro_batch_size", "gradient_accumulation_steps", "world_size")]
        assert parts[0] * parts[1] * parts[2] == base.value("global_batch_size") == plan.value("global_batch_size")
        assert plan.training_arguments["per_device_train_batch_size"] == parts[0]
        assert plan.training_arguments["gradient_accumulation_steps"] == parts[1]
        if plan.deepspeed is not None:
            assert plan.deepspeed["gradient_accumulation_steps"] == parts[1]
    assert seen == sizes


@pytest.mark.parametrize(("machine", "keys", "sizes"), BATCHES)
def test_a_repair_changes_nothing_but_what_it_means_to(machine: str, keys: dict[str, Any], sizes: list[int]) -> None:
    base = plan_of(machine, **keys)
    repair = halve_micro_batch(base)
    assert repair is not None
    plan = apply(base, [repair])
    accumulation = base.value("gradient_accumulation_steps")
    assert changes(base, plan) == [
        Change("micro_batch_size", sizes[0], sizes[1]),
        Change("gradient_accumulation_steps", accumulation, accumulation * sizes[0] // sizes[1])
        if sizes[0] % sizes[1] == 0
        else Change("gradient_accumulation_steps", accumulation, plan.value("gradient_accumulation_steps")),
    ]
    assert plan.recipe == base.recipe
    assert plan.values["micro_batch_size"].origin is Origin.DERIVED
    assert "to recover" in plan.values["micro_batch_size"].reason
    assert plan.values["distributed.strategy"] == base.values["distributed.strategy"]
    assert plan.values["global_batch_size"] == base.values["global_batch_size"]
    # Half the activations, and gradients that now stand while more are made: of a tiny model they weigh about as much.
    assert plan.memory.peak_gib <= base.memory.peak_gib + base.memory.parts_gib.get("gradients", 0)


def test_an_automatic_choice_that_depends_on_the_batch_is_kept() -> None:
    """At a smaller micro batch the model would fit without what it was given at the larger one."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
    base = plan_of(
        "8xH100",
        model={"config": config},
        data={"source": "builtin:python-reference", "sequence_length": 4096},
        micro_batch_size=16,
    )
    repair = halve_micro_batch(base)
    assert repair is not None
    assert {change.key for change in changes(base, apply(base, [repair]))} == {
        "micro_batch_size",
        "gradient_accumulation_steps",
    }


def test_repairs_travel_with_the_plan_and_make_the_same_one_again() -> None:
    base = plan_of(micro_batch_size=4)
    repair = halve_micro_batch(base)
    assert repair is not None
    plan = apply(base, [repair])
    read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read.to_json() == plan.to_json()
    assert apply(base, [Repair.from_json(data) for data in read.repairs]) == plan
    assert apply(base, []) == base
    assert base.repairs == ()


def test_a_user_who_asks_for_less_than_a_repair_gets_it() -> None:
    plan = apply(plan_of(micro_batch_size=1, global_batch_size=8), [Repair("micro_batch", {"micro_batch_size": 2})])
    assert plan.value("micro_batch_size") == 1


def test_a_repair_of_another_version_is_refused() -> None:
    with pytest.raises(StorageError, match="wind_back_the_clock"):
        Repair.from_json({"kind": "wind_back_the_clock", "values": {}})


def test_a_plan_from_before_there_were_repairs_has_none() -> None:
    data = plan_of().to_json()
    del data["repairs"]
    assert Plan.from_json(data).repairs == ()


@pytest.mark.parametrize(
    ("key", "left"),
    [
        ("training.learning_rate", ["micro_batch", "retry", "precision"]),
        ("precision.mode", ["micro_batch", "retry", "learning_rate"]),
        ("precision", ["micro_batch", "retry", "learning_rate"]),
        ("micro_batch_size", ["retry", "learning_rate", "precision"]),
        ("training.gradient_accumulation_steps", ["retry", "learning_rate", "precision"]),
        ("training.max_steps", ["micro_batch", "retry", "learning_rate", "precision"]),
    ],
)
def test_what_the_user_sets_anew_is_the_users(key: str, left: list[str]) -> None:
    made = [
        Repair("micro_batch", {"micro_batch_size": 2}),
        Repair("retry", {"code": "N2", "onset": 7}),
        Repair("learning_rate", {"learning_rate": 1e-4, "warmup_steps": 10}),
        Repair("precision", {"mode": "fp32"}),
    ]
    events = [{"kind": "plan_changed", "repair": repair.to_json()} for repair in made]
    accepted = {"kind": "changes_accepted", "changes": [{"key": key, "was": 1, "now": 2}]}
    assert [repair.kind for repair in repairs_of([*events, accepted])] == left
    assert len(repairs_of([accepted, *events])) == 4  # a repair made since then holds


def test_data_that_are_left_out_are_a_planned_value_and_change_no_other() -> None:
    base = plan_of("cpu", micro_batch_size=8)
    values = {"code": "N2", "onset": 6, "until": 8, "epoch": 0, "first": 40, "last": 56}
    left = apply(base, [Repair("retry", {"code": "N2", "onset": 6}), Repair("exclude_data", values)])
    assert changes(base, left) == [Change("excluded_data", None, "epoch 0: 40 to 55")]
    assert left.training_arguments == base.training_arguments
    assert windows_of(Plan.from_json(left.to_json()).repairs) == (DataWindow(0, 40, 56),)


@pytest.mark.parametrize(
    ("key", "is_kept"),
    [("data.tokens", False), ("data", False), ("training.seed", False), ("training.learning_rate", True)],
)
def test_places_in_the_data_hold_for_the_order_that_they_were_found_in(key: str, is_kept: bool) -> None:
    values = {"code": "N2", "onset": 6, "until": 8, "epoch": 0, "first": 40, "last": 56}
    excluded = {"kind": "plan_changed", "repair": Repair("exclude_data", values).to_json()}
    accepted = {"kind": "changes_accepted", "changes": [{"key": key, "was": 1, "now": 2}]}
    assert bool(repairs_of([excluded, accepted])) is is_kept
