"""What a run's story says about its recipe: every rule applied, in the order of print. Pure."""

from collections.abc import Callable, Iterable

from mpt.reporting import fault_findings as faults
from mpt.reporting import number_findings as numbers
from mpt.reporting.evidence import Evidence
from mpt.reporting.finding import Finding
from mpt.reporting.story import Story

Rule = Callable[[Evidence, Story], Iterable[Finding]]
RULES: tuple[Rule, ...] = (
    numbers.settled,
    numbers.diverged,
    numbers.overflows,
    numbers.spikes,
    numbers.loss_spikes,
    numbers.left_out,
    numbers.transient,
    numbers.excluded,
    faults.refused,
    faults.hangs,
    faults.deaths,
    faults.damaged,
)


def find(evidence: Evidence, story: Story) -> tuple[Finding, ...]:
    """Apply every rule. A run that failed is never without a finding: its own words are one."""
    found = [finding for rule in RULES for finding in rule(evidence, story)]
    if not found and story.outcome in ("failed", "diverged"):
        remedy = story.attempts[-1].remedy if story.attempts else ""
        found.append(Finding(story.reason, remedy or f"The logs are in {evidence.path / 'attempts'}."))
    return tuple(found)
