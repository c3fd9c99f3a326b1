"""The repairs of a run as its journal tells them, and the plan that follows: what a supervisor that was killed goes on
with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpt.hardware.packages import installed_packages
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan
from mpt.planning.repair import Repair, apply, changes

BATCH_KEYS = {
    "micro_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
}


def repairs_of(events: Iterable[Mapping[str, Any]]) -> tuple[Repair, ...]:
    """Gather what recovery has changed so far, oldest first. A user who has set the batch anew since then means it."""
    repairs: list[Repair] = []
    for event in events:
        if event["kind"] == "plan_changed":
            repairs.append(Repair.from_json(event["repair"]))
        elif event["kind"] == "changes_accepted" and BATCH_KEYS & {change["key"] for change in event["changes"]}:
            repairs = [repair for repair in repairs if repair.kind != "micro_batch"]
    return tuple(repairs)


def repaired(plan: Plan, repairs: Sequence[Repair]) -> Plan:
    """Plan again with repairs, on this machine; `plan` has none."""
    if not repairs:
        return plan
    return apply(plan, repairs, modules=learn_modules(plan.recipe), packages=installed_packages())


def to_event(was: Plan, now: Plan, repair: Repair, reason: str) -> dict[str, Any]:
    """Give the payload of the journal's `plan_changed` event, from which `repairs_of` reads the repair back."""
    listed = [{"key": change.key, "was": change.was, "now": change.now} for change in changes(was, now)]
    return {"changes": listed, "reason": reason, "repair": repair.to_json()}
