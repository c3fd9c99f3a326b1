"""The findings of a preflight in words: for `mpt check`, for the start of a run, for what is told of a run later."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mpt.planning.checks import MEANINGS, Finding, Severity
from mpt.planning.checks.data_facts import DataFacts
from mpt.reporting.finding import to_lines


def findings_of(events: Iterable[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """Read what a run's last preflight found from its journal; nothing where there was none."""
    last: Mapping[str, Any] = {}
    for event in events:
        last = event if event["kind"] == "preflight" else last
    return read_findings(last.get("findings", ()))


def read_findings(written: Iterable[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """Read the findings of an event; those that only another mpt knows are left out."""
    found = []
    for data in written:
        with suppress(KeyError, ValueError, TypeError):
            found.append(Finding.from_json(data))
    return tuple(found)


def told(findings: Sequence[Finding]) -> list[str]:
    """Say the findings that are not accepted, each with its evidence and the lines to write."""
    return [line for finding in findings if not finding.is_accepted for line in finding_lines(finding)]


def finding_lines(finding: Finding) -> list[str]:
    """Say one finding."""
    word = "accepted" if finding.is_accepted else finding.severity.value
    lines = [f"{word}: {finding.problem} [{finding.code}]"]
    if finding.is_accepted:
        return lines
    lines += [f"    {line}" for line in finding.evidence]
    return [*lines, f"  -> {finding.remedy}", *(f"     {line}" for line in to_lines(finding.recipe))]


def checked_text(
    name: str | None,
    machine: str | None,
    findings: Sequence[Finding],
    facts: DataFacts | None,
    notices: Sequence[str] = (),
) -> str:
    """Say everything that `mpt check` found; `notices` are what a run would say of its data at the start."""
    head = [f"{name} on {machine}"] if name is not None else []
    if facts is not None:
        head += _data_lines(facts)
    head += notices
    counts = [(severity, sum(f.severity is severity and not f.is_accepted for f in findings)) for severity in Severity]
    listed = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts if count)
    body = [line for finding in findings for line in finding_lines(finding)]
    return "\n".join([*head, *([""] if head else []), *body, *([""] if body else []), listed or "nothing was found"])


def _data_lines(facts: DataFacts) -> list[str]:
    lines = [f"{facts.samples} samples, {facts.tokens} tokens"] if facts.samples else []
    return lines + [f"looked at in part: {limit}" for limit in facts.limits]


def findings_reference() -> str:
    """List the codes in Markdown, for the README."""
    rows = [f"| `{code}` | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join(["| code | what is found |", "|---|---|", *rows]) + "\n"
