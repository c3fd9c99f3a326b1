"""What hangs, deaths, full disks and damaged checkpoints say about a run's recipe, and about the machine. Pure.

Each function finds something or nothing; `mpt.reporting.advice` has them in order.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpt.errors import ExitCode
from mpt.planning.plan import Plan
from mpt.reporting.checkpoint_list import spell_size
from mpt.reporting.evidence import Evidence
from mpt.reporting.finding import Finding, times
from mpt.reporting.story import AttemptTold, Story
from mpt.running.hang import LOADING


def hangs(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """A rank that fell silent, one finding for each phase: which file to read, and the limit if it was only slow."""
    by_phase: dict[str, list[Mapping[str, Any]]] = {}
    for event in evidence.events:
        if event["kind"] == "hang":
            by_phase.setdefault(event["phase"], []).append(event)
    for phase, hangs in by_phase.items():
        files, missing = [], []
        for event in hangs:
            for rank, said in event["stacks"].items():
                if str(said).startswith("stacks-"):
                    files.append(str(evidence.path / "attempts" / f"{event['attempt']:03d}" / said))
                else:
                    missing.append(f"rank {rank} of attempt {event['attempt']} left no stacks: {said}")
        key = _timeout_key(phase, hangs[-1], story.attempts)
        read = f"Read {files[-1]}: it says where each thread stood. " if files else ""
        yield Finding(
            f"{times(len(hangs))} a rank hung while {phase}",
            f"{read}If it was only slow, allow it more time.",
            tuple(_hang_in_words(event) for event in hangs) + tuple(missing) + tuple(files[:-1]),
            {key: round(2 * max(float(event["limit_s"]) for event in hangs))},
        )


def _timeout_key(phase: str, hang: Mapping[str, Any], attempts: Sequence[AttemptTold]) -> str:
    """Name the limit that was broken, as `mpt.running.hang.limit_for` chooses it."""
    if phase in LOADING or phase == "starting":
        return "restart.loading_timeout"
    if phase != "training":
        return "restart.phase_timeout"
    made = next((attempt.steps for attempt in attempts if attempt.number == hang["attempt"]), 0)
    return "restart.step_timeout" if made else "restart.first_step_timeout"


def _hang_in_words(event: Mapping[str, Any]) -> str:
    ranks = ", ".join(map(str, event.get("ranks", ())))
    at = f" at step {event['step']}" if event.get("step") else ""
    return (
        f"attempt {event['attempt']}: rank {ranks} was silent for {event['silent_s']:.0f} s{at}, and the limit was "
        f"{event['limit_s']:.0f} s"
    )


def deaths(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """Workers that died without a last word, or of an error that another try may pass."""
    died = [
        attempt
        for attempt in story.attempts
        if attempt.ending == "died"
        or (attempt.ending == "failed" and attempt.exit_code in (None, ExitCode.BUG, ExitCode.NO_PROGRESS))
    ]
    if not died:
        return
    told = tuple(f"attempt {attempt.number}: {attempt.told}" for attempt in died)
    log = evidence.path / "attempts" / f"{died[-1].number:03d}" / "worker.log"
    is_last = died[-1] is story.attempts[-1]
    tail = tuple(f"| {line}" for line in evidence.log_tail) if is_last else ()
    recipe: dict[str, Any] = {}
    if any("SIGKILL" in attempt.told for attempt in died):
        remedy = "Nobody killed it? Then the kernel did, for want of host memory: `dmesg` says so."
        if evidence.newest_plan is not None and evidence.newest_plan.recipe.training_keys.get("dataloader_num_workers"):
            recipe["training.dataloader_num_workers"] = 0
    else:
        remedy = f"The log says why: {log}."
    if story.exit_code == ExitCode.NO_PROGRESS:
        recipe |= _nearer_saves(evidence, died)
    yield Finding(
        f"{times(len(died))} the worker died before its work was done"
        + ("" if story.outcome in ("failed", "interrupted") else ", and the run went on from a checkpoint"),
        remedy,
        told + tail,
        recipe,
    )


def _nearer_saves(evidence: Evidence, died: Sequence[AttemptTold]) -> dict[str, Any]:
    """Where attempts make steps and die before they save, a nearer checkpoint lets the run come on all the same."""
    plan = evidence.newest_plan
    fruitless = [attempt for attempt in died if attempt.steps and not attempt.saved]
    if plan is None or not fruitless:
        return {}
    every = max(1, min(attempt.steps for attempt in fruitless) // 2)
    return {"training.save_strategy": "steps", "training.save_steps": every}


def refused(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """An end that another try would repeat: the worker's own words, with what mpt knows besides."""
    if story.outcome != "failed" or story.exit_code is None:
        return
    attempt = story.attempts[-1] if story.attempts else None
    remedy = "" if attempt is None else attempt.remedy
    code = story.exit_code
    if code == ExitCode.STORAGE:
        yield Finding(f"storage: {story.reason}", f"{remedy} {_to_free(evidence, story)}".strip(), (), _fewer(evidence))
    elif code == ExitCode.OUT_OF_MEMORY:
        yield Finding(
            f"memory: {story.reason}", "Let the run need less memory.", (), _less_memory(evidence.newest_plan)
        )
    elif code == ExitCode.DIVERGED:  # failed with 81: a comparison broke its bound
        yield Finding(
            story.reason,
            "Take the precision that it was compared with, or a wider bound under compare.require.",
            _breaches(evidence),
        )
    elif code in (ExitCode.USAGE, ExitCode.UNSUPPORTED):
        yield Finding(story.reason, remedy or "Mend what it names, and start the same command again.")


def _breaches(evidence: Evidence) -> tuple[str, ...]:
    compared = [event for event in evidence.events if event["kind"] == "compared"]
    if not compared:
        return ()
    told = compared[-1]
    return (f"{told.get('candidate')} against {told.get('reference')}, {told.get('steps')} steps",)


def _to_free(evidence: Evidence, story: Story) -> str:
    """Say what could go, and how much that is."""
    kept = story.checkpoints
    parts = []
    if kept.quarantined:
        size = spell_size(kept.bytes_quarantined)
        parts.append(f"{size} of checkpoints that were given up lie in {evidence.path / 'checkpoints'}/quarantine-*")
    if len(kept.usable) > 1:
        size = spell_size(kept.bytes_usable)
        parts.append(
            f"{len(kept.usable)} checkpoints take {size}; `mpt checkpoints prune {evidence.path} --keep 1` frees"
        )
    return f"To free: {'; '.join(parts)}." if parts else "This run has nothing to spare: free space elsewhere."


def _fewer(evidence: Evidence) -> dict[str, Any]:
    plan = evidence.newest_plan
    asked = None if plan is None else plan.recipe.training_keys.get("save_total_limit")
    return {} if asked == 1 else {"training.save_total_limit": 1}


def _less_memory(plan: Plan | None) -> dict[str, Any]:
    """The cheapest change first that the plan has not made yet."""
    if plan is None:
        return {}
    if plan.value("micro_batch_size") > 1 and not plan.recipe.restart.halve_micro_batch:
        return {"restart.halve_micro_batch": True}
    if not plan.value("gradient_checkpointing"):
        return {"gradient_checkpointing": True}
    if plan.value("world_size") > 1 and plan.value("distributed.strategy") != "zero3":
        return {"distributed.strategy": "zero3"}
    return {"data.sequence_length": max(1, plan.value("sequence_length") // 2)}


def damaged(evidence: Evidence, story: Story) -> Iterable[Finding]:
    kept = story.checkpoints
    if kept.damaged and not kept.usable:
        yield Finding(
            "checkpoints exist and none can be used (exit code 84)",
            "Restore one from a copy, or begin anew with --resume never, which keeps this run beside the new one.",
            tuple(f"{name}: {problem}" for name, problem in kept.damaged),
        )
    elif kept.damaged or kept.unused:
        told = (*kept.damaged, *(entry for entry in kept.unused if entry not in kept.damaged))
        yield Finding(
            "a checkpoint is damaged",
            f"The run goes on from an older one by itself. `mpt checkpoints verify {evidence.path}` reads every byte; "
            "look at the disk.",
            tuple(f"{name}: {problem}" for name, problem in told),
        )
