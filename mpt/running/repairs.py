"""The repairs of a run as its journal tells them, and the plan that follows: what a supervisor that was killed goes on
with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpt.hardware.packages import installed_packages
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan
from mpt.planning.repair import Repair, apply, changes

# What a repair of each kind sets; whoever sets one of these keys anew means it.
SET_BY: dict[str, tuple[str, ...]] = {
    "micro_batch": (
        "micro_batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
    ),
    # They are places in the data's order.
    "exclude_data": (
        "data",
        "tokenizer",
        "training.seed",
        "training.data_seed",
        "training.train_sampling_strategy",
    ),
    "learning_rate": ("training.learning_rate",),
    "precision": ("precision",),
}


def repairs_of(events: Iterable[Mapping[str, Any]]) -> tuple[Repair, ...]:
    """Gather what recovery has changed so far, oldest first; what the user has set anew since then is the user's."""
    repairs: list[Repair] = []
    for event in events:
        if event["kind"] == "plan_changed":
            repairs.append(Repair.from_json(event["repair"]))
        elif event["kind"] == "changes_accepted":
            anew = [change["key"] for change in event["changes"]]
            repairs = [repair for repair in repairs if not _is_set_anew(repair, anew)]
    return tuple(repairs)


def _is_set_anew(repair: Repair, keys: Sequence[str]) -> bool:
    own = SET_BY.get(repair.kind, ())
    return any(key == set_by or key.startswith(f"{set_by}.") for key in keys for set_by in own)


def repaired(plan: Plan, repairs: Sequence[Repair]) -> Plan:
    """Plan again with repairs, on this machine; `plan` has none."""
    if not repairs:
        return plan
    return apply(plan, repairs, modules=learn_modules(plan.recipe), packages=installed_packages())


def to_event(was: Plan, now: Plan, repair: Repair, reason: str) -> dict[str, Any]:
    """Give the payload of the journal's `plan_changed` event, from which `repairs_of` reads the repair back."""
    listed = [{"key": change.key, "was": change.was, "now": change.now} for change in changes(was, now)]
    return {"changes": listed, "reason": reason, "repair": repair.to_json()}
