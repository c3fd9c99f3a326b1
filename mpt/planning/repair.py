"""What a run's recovery changes of its plan, as values: the repairs, and the plan that they lead to. Pure.

A repair is small, absolute (what a value becomes, never by how much) and journalled, so that whoever takes the run up
again comes to the same plan. To add a kind: a function from the recipe to the one that it should have been, and a row
in `KINDS`; a kind that leaves the recipe alone is read from `Plan.repairs` by whoever obeys it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpt.errors import StorageError
from mpt.planning.data_window import windows_of
from mpt.planning.decision import Decision, Origin
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Repair:
    """One change: its kind, a key of `KINDS`, and what that kind needs to know."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give the repair as JSON values; `Repair.from_json` reads them back."""
        return {"kind": self.kind, "values": dict(self.values)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Repair":
        """Read a repair back; raises StorageError for one that another version of mpt made."""
        if data["kind"] not in KINDS:
            raise StorageError(
                f"the run was repaired by {data['kind']}, which this mpt does not know",
                remedy="Go on with the mpt that began the run, or begin anew with --resume never.",
            )
        return cls(data["kind"], dict(data["values"]))


@dataclass(frozen=True, slots=True)
class Change:
    """A planned value that a repair changes."""

    key: str
    was: Any
    now: Any


def apply(
    plan: Plan,
    repairs: Sequence[Repair],
    *,
    modules: Sequence[ModuleShape] | None = None,
    packages: frozenset[str] | None = None,
) -> Plan:
    """Plan again with all `repairs`, oldest first; `plan` is the recipe's own, without any.

    What recovery did not mean to change stays as it was planned, batch and layout above all: fewer samples a pass would
    otherwise open another choice of sharding or checkpointing. The recipe in the plan stays the user's. `modules` and
    `packages` are those of `resolve`.
    """
    if not repairs:
        return plan
    recipe = pinned(plan)
    for repair in repairs:
        recipe = KINDS[repair.kind](recipe, plan, repair.values)
    repaired = resolve(
        recipe,
        plan.machine,
        plan.facts,
        name=plan.name,
        modules=modules,
        packages=packages,
        task_folder=plan.task_folder,
    )
    kinds = ", ".join(dict.fromkeys(repair.kind for repair in repairs))
    values = {key: _decision(plan.values.get(key), now, kinds) for key, now in repaired.values.items()}
    told = tuple(repair.to_json() for repair in repairs)
    if windows := windows_of(told):
        left_out = ", ".join(f"epoch {window.epoch}: {window.first} to {window.last - 1}" for window in windows)
        values["excluded_data"] = Decision(left_out, Origin.DERIVED, "positions in the data on which numbers went bad")
    return replace(repaired, recipe=plan.recipe, values=values, resume_from=plan.resume_from, repairs=told)


def changes(was: Plan, now: Plan) -> list[Change]:
    """List the values that two plans of a run differ in."""
    keys = dict.fromkeys([*was.values, *now.values])
    pairs = [(key, was.values.get(key), now.values.get(key)) for key in keys]
    values = [(key, a and a.value, b and b.value) for key, a, b in pairs]
    return [Change(key, a, b) for key, a, b in values if a != b]


def halve_micro_batch(plan: Plan) -> Repair | None:
    """Make the repair for too little memory: half the samples a pass, or the next fewer that divide a rank's share of
    the global batch. None where a pass holds a single one."""
    micro = plan.value("micro_batch_size")
    return Repair("micro_batch", {"micro_batch_size": _largest_part(plan, micro // 2)}) if micro > 1 else None


def _micro_batch(recipe: Recipe, plan: Plan, values: Mapping[str, Any]) -> Recipe:
    """Set the samples a pass; the global batch is pinned, so that the accumulation follows."""
    wanted = min(values["micro_batch_size"], plan.value("micro_batch_size"))
    return with_keys(recipe, {"micro_batch_size": _largest_part(plan, wanted)})


def _same_recipe(recipe: Recipe, plan: Plan, values: Mapping[str, Any]) -> Recipe:
    """Change no value of the plan: to have gone back is all, or the sampler obeys the repair itself."""
    return recipe


def _learning_rate(recipe: Recipe, plan: Plan, values: Mapping[str, Any]) -> Recipe:
    """Set the rate; the trainer warms it up again (`Plan.repairs`)."""
    return with_keys(recipe, {"training.learning_rate": values["learning_rate"]})


def _precision(recipe: Recipe, plan: Plan, values: Mapping[str, Any]) -> Recipe:
    """Set the mode. Of the rest of the block stays what every mode has: sums over ranks and over micro batches."""
    kept = {"mode": values["mode"]}
    for key in ("reduce_dtype", "grad_accum_dtype"):
        if getattr(recipe.precision, key) == "fp32":
            kept[key] = "fp32"
    return with_keys(recipe, {"precision": kept})


# Each gets the recipe as the repairs before it left it, the plan without any repair, and the repair's values.
KINDS: dict[str, Callable[[Recipe, Plan, Mapping[str, Any]], Recipe]] = {
    "micro_batch": _micro_batch,
    "retry": _same_recipe,
    "exclude_data": _same_recipe,
    "learning_rate": _learning_rate,
    "precision": _precision,
}


def with_keys(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """Give the recipe with other values, by dotted key; None leaves the key out.

    >>> recipe = Recipe.model_validate({"model": "gpt2", "data": "a.txt", "training": {"learning_rate": 1e-3}})
    >>> with_keys(recipe, {"training.learning_rate": 5e-4}).training_keys
    {'learning_rate': 0.0005}
    """
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in keys.items():
        *sections, last = key.split(".")
        here = data
        for section in sections:
            here = here.setdefault(section, {})
        if value is None:
            here.pop(last, None)
        else:
            here[last] = value
    return Recipe.model_validate(data)


def pinned(plan: Plan) -> Recipe:
    """Write into the recipe what was planned of batch and layout."""
    keys = {
        "training.per_device_train_batch_size": None,
        "training.gradient_accumulation_steps": None,
        "gradient_accumulation_steps": None,
        "global_batch_size": plan.value("global_batch_size"),
        "micro_batch_size": plan.value("micro_batch_size"),
        "distributed.strategy": plan.value("distributed.strategy"),
        "distributed.processes_per_node": plan.value("processes_per_node"),
    }
    if plan.recipe.asked_gradient_checkpointing is None:
        keys["gradient_checkpointing"] = plan.value("gradient_checkpointing")
    if plan.recipe.offload == "auto" and plan.deepspeed is not None:
        keys["offload"] = plan.value("offload")
    return with_keys(plan.recipe, keys)


def _decision(was: Decision[Any] | None, now: Decision[Any], kinds: str) -> Decision[Any]:
    """Keep the reason of a value that stayed, which is no wish of the recipe though it was pinned."""
    if was is None:
        return now
    if was.value == now.value:
        return was
    return Decision(now.value, Origin.DERIVED, f"changed from {was.value} to recover ({kinds})")


def _largest_part(plan: Plan, at_most: int) -> int:
    """Find the largest micro batch up to `at_most` that divides what a rank does of the global batch."""
    share = plan.value("global_batch_size") // plan.value("world_size")
    return next(size for size in range(max(1, at_most), 0, -1) if share % size == 0)
