"""A value that travels with the reason for it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Origin(StrEnum):
    """Who decided: the recipe, arithmetic on what the recipe says, or mpt."""

    ASKED = "asked"
    DERIVED = "derived"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Rejected:
    """An option that was considered and not taken."""

    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Decision(Generic[T]):
    """A decided value, where it came from, why, and what else was possible."""

    value: T
    origin: Origin
    reason: str
    rejected: tuple[Rejected, ...] = ()
