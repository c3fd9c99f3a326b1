"""What a run was planned as, what each restart changed of that, and what came of it: from its plans on the disk.

`mpt report` prints it. Where `mpt doctor` judges, this lists: the difference between the plans of two attempts is what
was changed, whoever changed it. Pure, but for the reading in `gather_report`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpt.planning.checks import Finding
from mpt.planning.plan import Plan
from mpt.planning.repair import Change, changes
from mpt.reporting.findings_text import findings_of, told
from mpt.reporting.live import spell_metrics
from mpt.reporting.samples import Sample, gather_samples, one_line
from mpt.reporting.summary import summarise
from mpt.running.journal import read_events, spell_non_finite
from mpt.running.metrics import evaluations, every_row
from mpt.running.plan_file import read_plan
from mpt.running.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """An attempt: where it began, which steps it made (None: none), what its plan has otherwise than the one before,
    why, and how it ended (None: it has not, or nobody was there to say)."""

    number: int
    resume_from: str | None
    first_step: int | None
    last_step: int | None
    changes: tuple[Change, ...]
    reason: str | None
    ended: str | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run's summary, as `mpt train --json` has it, its attempts, oldest first, what its preflight found, what its
    evaluations came to, and what its model wrote, both by step."""

    summary: Mapping[str, Any]
    attempts: tuple[AttemptReport, ...]
    preflight: tuple[Finding, ...]
    evaluations: Mapping[int, Mapping[str, Any]]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values; non-finite numbers are texts."""
        listed = [asdict(attempt) for attempt in self.attempts]
        found = [finding.to_json() for finding in self.preflight]
        evaluated = [{"step": step, **came} for step, came in self.evaluations.items()]
        written = [asdict(sample) for sample in self.samples]
        more = {"preflight": found, "evaluations": evaluated, "samples": written}
        return dict(spell_non_finite({**self.summary, "attempts": listed, **more}))


def gather_report(run: RunDirectory) -> RunReport:
    """Read a run's directory. Raises StorageError where its journal or a plan is damaged."""
    events = read_events(run.journal)
    made: dict[int, list[int]] = {}
    for row in every_row(run):
        made.setdefault(int(row["attempt"]), []).append(int(row["step"]))
    attempts: list[AttemptReport] = []
    before: Plan | None = None
    for number in run.attempt_numbers():
        plan = read_plan(run.attempt(number).plan)
        steps = made.get(number, [])
        attempts.append(
            AttemptReport(
                number,
                plan.resume_from,
                min(steps, default=None),
                max(steps, default=None),
                () if before is None else tuple(changes(before, plan)),
                _reason(events, number),
                next((e["reason"] for e in events if e["attempt"] == number and e["kind"] == "attempt_ended"), None),
            )
        )
        before = plan
    return RunReport(summarise(run), tuple(attempts), findings_of(events), evaluations(run), gather_samples(events))


def to_text(report: RunReport) -> str:
    """Write a report for a terminal."""
    summary = report.summary
    named = (("train", summary["train_loss"]), ("evaluation", summary["eval_loss"]))
    losses = [f"{what} loss {loss:.4f}" for what, loss in named if isinstance(loss, float)]
    metrics = [spell_metrics({name: value}).strip() for name, value in summary["metrics"].items()]
    early = " (stopped early)" if summary["stopped_early"] else ""
    came = ", ".join([str(summary["outcome"]), f"{summary['steps']} steps{early}", *losses, *metrics])
    lines = [f"{summary['run_dir']}: {came}"]
    for attempt in report.attempts:
        lines += _told(attempt)
    before = told(report.preflight)
    if before:
        lines += ["before it began", *(f"  {line}" for line in before)]
    if report.evaluations:
        lines.append("evaluations")
        lines += [f"  step {step:<6} {_spell(came)}" for step, came in report.evaluations.items()]
    for prompt in dict.fromkeys(sample.prompt for sample in report.samples):
        lines.append(f"samples of {one_line(prompt)!r}")
        same = [sample for sample in report.samples if sample.prompt == prompt]
        lines += [f"  step {_say(sample.step):<6} {one_line(sample.text) or '(nothing)'}" for sample in same]
    return "\n".join(lines)


def _spell(came: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in came.items()
    )


def _told(attempt: AttemptReport) -> Sequence[str]:
    start = attempt.resume_from or "the beginning"
    steps = "no step" if attempt.first_step is None else f"steps {attempt.first_step} to {attempt.last_step}"
    lines = [f"attempt {attempt.number}: from {start}, {steps}"]
    if attempt.reason is not None:
        lines.append(f"  because  {attempt.reason}")
    lines += [f"  changed  {change.key}: {_say(change.was)} -> {_say(change.now)}" for change in attempt.changes]
    if attempt.ended is not None:
        lines.append(f"  ended    {attempt.ended}")
    return lines


def _say(value: Any) -> str:
    return "(none)" if value is None else str(value)


def _reason(events: Sequence[Mapping[str, Any]], number: int) -> str | None:
    """Find why the plan was changed for an attempt: recovery's reason, or the user who said so."""
    for event in events:
        if event["kind"] == "plan_changed" and event["attempt"] == number - 1:
            return str(event["reason"])
        if event["kind"] == "changes_accepted" and event["attempt"] == number - 1:
            return "--accept-changes"
    return None
