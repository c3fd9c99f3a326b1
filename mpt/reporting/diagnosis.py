"""A run explained: its story, what it says about the recipe, and how to go on; as text and as JSON. Pure.

`mpt doctor` prints it. `mpt.reporting.story` puts together what happened, `mpt.reporting.advice` what to change.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpt.planning.checks import Finding as Found
from mpt.reporting.advice import find
from mpt.reporting.evidence import Evidence
from mpt.reporting.finding import Finding, times, to_lines
from mpt.reporting.findings_text import findings_of, told
from mpt.reporting.live import number, spell_loss_scale
from mpt.reporting.story import AttemptTold, Changed, CheckpointsTold, Scaling, Seen, Story, WentBack, tell
from mpt.running.journal import spell_non_finite

RUNS = Path("runs")  # where `mpt train` keeps runs unless told
ACTIONS = {
    "skip": "update left out",
    "clip": "gradient clipped",
    "roll_back": "attempt ended",
    "apply": "noted",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a run is as it is. `settings` are planned values of the newest attempt; `causes` are the incidents' ones.

    `owner` says who is at work on it, None: nobody. `go_on` is the command that goes on or begins anew, None where
    nothing is left to do or somebody is at it; `goes_on` says what it does.
    """

    run: str
    owner: str | None
    settings: dict[str, Any]
    story: Story
    causes: dict[str, str]
    findings: tuple[Finding, ...]
    go_on: str | None
    goes_on: str
    preflight: tuple[Found, ...] = ()
    """What was found before it began."""

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values, the story's parts at the top level; non-finite numbers are texts."""
        data = asdict(self)
        story = data.pop("story")
        before = [found.to_json() for found in self.preflight]
        return dict(spell_non_finite(data | story | {"preflight": before}))


def diagnose(evidence: Evidence) -> Diagnosis:
    """Explain a run."""
    story = tell(evidence)
    findings = find(evidence, story)
    keys = ("precision", "learning_rate", "micro_batch_size", "gradient_accumulation_steps", "world_size")
    plan = evidence.newest_plan
    go_on, goes_on = _how_to_go_on(evidence, story, findings)
    return Diagnosis(
        run=str(evidence.path),
        owner=evidence.owner,
        settings={} if plan is None else {key: plan.value(key) for key in keys},
        story=story,
        causes={
            name: "its autopsy.json can't be read" if found is None else str(found.get("cause", "no cause was found"))
            for name, found in evidence.autopsies.items()
        },
        findings=findings,
        go_on=go_on,
        goes_on=goes_on,
        preflight=findings_of(evidence.events),
    )


def _how_to_go_on(evidence: Evidence, story: Story, findings: Iterable[Finding]) -> tuple[str | None, str]:
    if story.outcome in ("running", "finished"):
        return None, ""
    path = evidence.path
    words = ["mpt", "train", str(path / "recipe.yaml"), "--name", path.resolve().name]
    if path.parent != RUNS:
        words += ["--runs-dir", str(path.parent)]
    newest = story.checkpoints.newest
    if story.outcome == "diverged" or (story.checkpoints.damaged and newest is None):
        # Repairs are absolute: on the same run they would win over the recipe's new rate.
        advised = {key: value for finding in findings for key, value in finding.recipe.items()}
        changes = [line.replace(": ", "=", 1) for line in to_lines(advised)]
        how = " with what is advised above" if changes else ""
        return shlex.join([*words, *changes, "--resume", "never"]), f"begins anew{how}, and keeps this run beside it"
    where = f"goes on from {newest}" if newest is not None else "begins again: nothing was saved"
    return shlex.join(words), where


def to_text(diagnosis: Diagnosis) -> str:
    """Write a diagnosis for a person: sections with something in them, and the advice last."""
    story = diagnosis.story
    sections = [
        (None, _headline(diagnosis)),
        ("before it began", told(diagnosis.preflight)),
        ("attempts", _aligned([_attempt_row(attempt) for attempt in story.attempts])),
        ("numbers", [*map(_seen_line, story.numbers), *_scaling_line(story.scaling)]),
        ("what was changed", _change_lines(story)),
        ("checkpoints", _checkpoint_lines(story.checkpoints)),
        ("faults", [_recovered_line(one.from_attempt, one.step, one.seconds) for one in story.recovered]),
        ("incidents", [f"{name}: {cause}" for name, cause in diagnosis.causes.items()]),
        ("what to change", [line for finding in diagnosis.findings for line in _finding_lines(finding)]),
        ("how to go on", [] if diagnosis.go_on is None else [diagnosis.go_on, f"  {diagnosis.goes_on}"]),
    ]
    written = []
    for title, lines in sections:
        if lines:
            written.append("\n".join(lines if title is None else [title, *(f"  {line}" for line in lines)]))
    return _printable("\n\n".join(written))


def _headline(diagnosis: Diagnosis) -> list[str]:
    story = diagnosis.story
    of = f" of {story.max_steps}" if story.max_steps else ""
    parts = [f"{story.outcome}, {story.step}{of} steps"]
    for name, value in (("loss", story.loss), ("evaluation loss", story.eval_loss)):
        if isinstance(value, (int, float, str)):
            parts.append(f"{name} {number(value, '.4f')}")
    again = story.steps_made - story.step
    if again > 0 and story.attempts:
        parts.append(f"{again} steps made again")
    lines = [f"{diagnosis.run}: {', '.join(parts)}"]
    if diagnosis.owner is not None:
        lines.append(f"at work on it now: {diagnosis.owner}")
    if story.reason and story.outcome not in ("finished", "running"):
        code = "" if story.exit_code is None else f"exit code {story.exit_code}: "
        lines.append(f"{code}{story.reason}")
    if diagnosis.settings:
        micro, steps, world = (
            diagnosis.settings[key] for key in ("micro_batch_size", "gradient_accumulation_steps", "world_size")
        )
        lines.append(
            f"{diagnosis.settings['precision']}, learning rate {diagnosis.settings['learning_rate']:g}, batch "
            f"{micro} micro x {steps} accumulated x {world} process{'es' if world > 1 else ''}"
        )
    if not diagnosis.findings and story.outcome in ("finished", "running"):
        lines.append(_all_well(story))
    return lines


def _all_well(story: Story) -> str:
    """Say in one line that nothing is wrong, with the numbers that say it."""
    calibrated = "" if story.scaling is None else f", {story.scaling.skipped} of {story.scaling.steps} steps skipped"
    bad = sum(seen.count for seen in story.numbers if seen.code != "N0")
    events = f"{_count(bad, 'event')} of the numbers, answered" if bad else "no bad number"
    return f"nothing is wrong: {_count(len(story.attempts), 'attempt')}, {events}{calibrated}, no damaged checkpoint"


def _attempt_row(attempt: AttemptTold) -> tuple[str, ...]:
    made = "no step" if not attempt.steps else f"steps {attempt.first_step}-{attempt.last_step}"
    took = "" if attempt.seconds is None else spell_seconds(attempt.seconds)
    return (str(attempt.number), f"from {attempt.resume_from or 'the beginning'}", made, took, attempt.told)


def _seen_line(seen: Seen) -> str:
    steps = (
        f"step {seen.first_step}" if seen.first_step == seen.last_step else f"steps {seen.first_step}-{seen.last_step}"
    )
    attempts = ", ".join(map(str, seen.attempts))
    done = ", ".join(f"{ACTIONS.get(action, action)} {times(count)}" for action, count in seen.actions.items())
    where = f"{steps}, attempt{'s' * (len(seen.attempts) > 1)} {attempts}"
    return f"{seen.code}  {seen.meaning}: {times(seen.count)} ({where}); {done}"


def _scaling_line(scaling: Scaling | None) -> Iterable[str]:
    if scaling is not None:
        low, high, last = map(spell_loss_scale, (scaling.lowest, scaling.highest, scaling.last))
        share = f"{scaling.skipped} of {scaling.steps} steps skipped ({scaling.share:.1%})"
        yield f"loss scale {low} to {high}, {last} at the end; {share}"


def _change_lines(story: Story) -> list[str]:
    """Write the ways back and the changes in the order in which they were made."""
    told = [(back.after_attempt, 0, _went_back_line(back)) for back in story.went_back]
    told += [(change.after_attempt, 1, _change_line(change)) for change in story.changes]
    return [f"after attempt {attempt}: {line}" for attempt, _, line in sorted(told, key=lambda one: one[:2])]


def _change_line(change: Changed) -> str:
    listed = ", ".join(f"{key} {was} -> {now}" for key, was, now in change.changes) or "nothing"
    return f"{listed} ({'by the user' if change.kind == 'accepted' else change.reason})"


def _went_back_line(back: WentBack) -> str:
    where = f"checkpoint-{back.to_step}" if back.to_step else "the beginning"
    given_up = ", ".join(back.names)
    return f"back to {where}; {given_up} given up, to quarantine-{back.lineage} ({back.reason})"


def _checkpoint_lines(kept: CheckpointsTold) -> list[str]:
    lines = []
    if kept.newest is not None:
        good = "none yet" if kept.newest_good is None else kept.newest_good
        lines.append(f"newest {kept.newest}, newest known to be good: {good}; {len(kept.usable)} in all")
    if kept.quarantined:
        lines.append(f"given up: {', '.join(kept.quarantined)}")
    lines += [f"damaged: {name}: {problem}" for name, problem in kept.damaged]
    return lines


def _recovered_line(attempt: int, step: int, seconds: float) -> str:
    return f"attempt {attempt} broke; {spell_seconds(seconds)} later step {step} was made, the first after it"


def _finding_lines(finding: Finding) -> list[str]:
    lines = [finding.problem, *(f"  {line}" for line in finding.evidence), f"  -> {finding.remedy}"]
    return [*lines, *(f"     {line}" for line in to_lines(finding.recipe))]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]) for row in rows
    ]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _printable(text: str) -> str:
    """Leave out what would steer a terminal: an error's words may hold anything."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def spell_seconds(seconds: float) -> str:
    """Spell a duration with two figures that tell.

    >>> [spell_seconds(seconds) for seconds in (0.42, 59, 61, 3725, 200000)]
    ['0.4 s', '59 s', '1 min 1 s', '1 h 2 min', '2 d 7 h']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"
