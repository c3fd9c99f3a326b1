"""What a preflight finds: how bad it is, how one knows, and what to write into the recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from mpt.terms import Check


class Severity(StrEnum):
    """What a finding does to a run: an error stops it before the model is built."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that would quietly spoil or slow a run. `recipe`: dotted keys with the values to write.

    `is_accepted`: the recipe's `preflight.ignore` names it, so it stops nothing and is not told again.
    """

    code: Check
    severity: Severity
    problem: str
    remedy: str
    evidence: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    is_accepted: bool = False

    @property
    def stops(self) -> bool:
        """Whether a run does not start with it."""
        return self.severity is Severity.ERROR and not self.is_accepted

    def to_json(self) -> dict[str, Any]:
        """Give the finding as JSON values; `from_json` reads them back."""
        return {
            "code": self.code.value,
            "severity": self.severity.value,
            "problem": self.problem,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
            "recipe": dict(self.recipe),
            "accepted": self.is_accepted,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Finding":
        """Read what `to_json` wrote."""
        return cls(
            Check(data["code"]),
            Severity(data["severity"]),
            data["problem"],
            data["remedy"],
            tuple(data["evidence"]),
            data["recipe"],
            data["accepted"],
        )


def in_order(findings: Sequence[Finding], ignored: Sequence[Check]) -> tuple[Finding, ...]:
    """Put the worst first, and mark those that the recipe accepts."""
    marked = [replace(finding, is_accepted=finding.code in ignored) for finding in findings]
    return tuple(sorted(marked, key=lambda finding: (finding.is_accepted, list(Severity).index(finding.severity))))
