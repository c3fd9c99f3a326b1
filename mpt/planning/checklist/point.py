"""A point of the checklist, and the case that the rules look at."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from mpt.errors import MptError
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.planning.repair import pinned, with_keys
from mpt.recipe.schema import Recipe


class Status(StrEnum):
    """What there is to say of a point."""

    TICKED = "ticked"
    GAIN = "gain"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule found. `recipe`: dotted keys with the values to write.

    `memory_gib` is what the change would free of a device's memory (below 0: what it takes), by mpt's own formulas;
    `speed` how many times as fast a step's matrix multiplications would be at the most, by the table's peak rates. None
    where nothing is known; `gain` says the rest in words.
    """

    status: Status
    reason: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    memory_gib: float | None = None
    speed: float | None = None
    gain: str = ""

    def parts(self) -> dict[str, Any]:
        """Give the fields as keywords for a `Point`."""
        return {name: getattr(self, name) for name in ("status", "reason", "recipe", "memory_gib", "speed", "gain")}


@dataclass(frozen=True, slots=True)
class Point:
    """A verdict with the code and the title of its rule."""

    code: str
    title: str
    status: Status
    reason: str
    recipe: Mapping[str, Any]
    memory_gib: float | None
    speed: float | None
    gain: str

    def to_json(self) -> dict[str, Any]:
        """Give the point as JSON values."""
        data = asdict(self)
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in data.items()}
        return rounded | {"status": self.status.value, "recipe": dict(self.recipe)}


def ticked(reason: str) -> Verdict:
    return Verdict(Status.TICKED, reason)


def not_applicable(reason: str) -> Verdict:
    return Verdict(Status.NOT_APPLICABLE, reason)


def to_gain(
    reason: str,
    recipe: Mapping[str, Any],
    *,
    gain: str = "",
    memory_gib: float | None = None,
    speed: float | None = None,
) -> Verdict:
    return Verdict(Status.GAIN, reason, recipe, memory_gib, speed, gain)


@dataclass(frozen=True, slots=True)
class Case:
    """A plan, and what it takes to plan the same recipe with other values. `packages` and `modules` as in `resolve`."""

    plan: Plan
    packages: frozenset[str] | None = None
    modules: tuple[ModuleShape, ...] | None = None

    def with_only(self, keys: Mapping[str, Any]) -> Plan | None:
        """Plan with other values, batch and layout as they were planned; None where that can't be."""
        return self._resolve(pinned(self.plan), keys)

    def anew(self, keys: Mapping[str, Any]) -> Plan | None:
        """Plan with other values and choose everything else anew; None where that can't be."""
        return self._resolve(self.plan.recipe, keys)

    def freed_gib(self, other: Plan | None) -> float | None:
        """Memory that another plan needs less of on a device; None without one."""
        return None if other is None else self.plan.memory.peak_gib - other.memory.peak_gib

    def _resolve(self, recipe: Recipe, keys: Mapping[str, Any]) -> Plan | None:
        plan = self.plan
        try:
            changed = with_keys(recipe, keys)
            return resolve(
                changed, plan.machine, plan.facts, name=plan.name, packages=self.packages, modules=self.modules
            )
        except (MptError, ValueError):  # pydantic's ValidationError is a ValueError
            return None
