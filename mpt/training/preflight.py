"""Look at prepared data before the model is built, and stop what would be spoilt by it. Called by the session.

What is found is journalled once as `preflight`, with the facts that it follows from: a later attempt on the same data
takes these, and only judges them anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpt.planning.checks import DataFacts, check_findings, judge
from mpt.planning.plan import Plan
from mpt.recipe.rules import groups_by_length
from mpt.running.journal import Journal, read_events
from mpt.training.data import Documents, Samples
from mpt.training.data_facts import gather

# What the facts follow from, beside the data itself.
VALUES = ("task", "sequence_length", "packing", "padding_free", "pad_to_multiple_of", "micro_batch_size")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run. `fingerprint` is what it is known by, None on ranks that did not record it."""

    tokenizer: Any
    documents: Documents
    samples: Samples
    had_template: bool
    fingerprint: Mapping[str, Any] | None


def learn(plan: Plan, prepared: Prepared) -> DataFacts:
    """Gather what is judged."""
    return gather(plan, prepared.documents, prepared.samples, prepared.tokenizer, had_template=prepared.had_template)


def look(plan: Plan, prepared: Prepared, journal: Journal) -> None:
    """Judge plan and data, and journal what is new. Raises MptError for findings that stop a run."""
    of = {"data": dict(prepared.fingerprint or {}), "is_grouped": groups_by_length(plan.recipe)}
    of |= {key: plan.value(key) for key in VALUES}
    told = next((event for event in reversed(read_events(journal.path)) if event["kind"] == "preflight"), None)
    knows = told is not None and told["of"] == of
    facts = DataFacts.from_json(told["facts"]) if told is not None and knows else learn(plan, prepared)
    findings = judge(plan, facts)
    written = [finding.to_json() for finding in findings]
    if told is None or not knows or told["findings"] != written:
        journal.append("preflight", of=of, facts=facts.to_json(), findings=written)
    check_findings(findings)
