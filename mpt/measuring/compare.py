"""Before a run starts, run its first steps in its own precision and in a reference, and decide whether it may start.

Each of the two is a real attempt, by the supervisor and the worker of every run, in a scratch run directory:
`compare/candidate` and `compare/reference` below the run's. What remains is small: plans, logs, audits, journals,
metrics, and `compare/result.json`. This module imports no torch; gradients are compared by a child process.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode, MptError, StorageError
from mpt.measuring.comparison import Comparison, Side, judge, remedy_for, side_of, titled
from mpt.measuring.comparison_text import write_out
from mpt.measuring.gradients import compare_gradients, delete_gradients
from mpt.measuring.reference import trainable_count
from mpt.planning.layers import mixed_layers
from mpt.planning.plan import Plan
from mpt.recipe.schema import CompareBoundsSection, CompareSection, RestartSection
from mpt.running import checkpoints
from mpt.running.attempt import View
from mpt.running.journal import Journal, spell_non_finite
from mpt.running.measured import Measure, ask_to_measure
from mpt.running.metrics import read_rows
from mpt.running.recovery import Outcome, Stop, interrupted
from mpt.running.run_directory import RunDirectory, write_json, writing
from mpt.running.signals import StopWish
from mpt.running.supervisor import supervise
from mpt.terms import Precision

# What a measurement leaves out: it must neither cost nor publish anything, and none of it changes a step.
SILENT = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
}
# What of a recipe says nothing about a step's numbers.
NOT_COMPARED = ("name", "description", "compare", "restart", "recovery", "sample")
ROLES = ("candidate", "reference")


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands between a run whose lock is held and its first attempt: the plan and the one to compare it with."""

    plan: Plan
    reference: Plan
    run: RunDirectory
    view: View
    wish: StopWish
    environment: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.run.path / "compare"

    @property
    def section(self) -> CompareSection:
        section = self.plan.recipe.compare
        assert section is not None, "a recipe without `compare` has no reference"
        return section


def pass_gate(gate: Gate) -> Stop | None:
    """Compare, report and judge; None: the run may start. A Stop is journalled as the end of this start."""
    try:
        stop = _pass(gate)
    except MptError as error:
        stop = Stop(Outcome.FAILED, error.exit_code, error.problem, error.remedy)
    finally:
        delete_gradients(_scratch(gate))
    if stop is not None:
        with suppress(StorageError):
            _journal(gate).append("run_finished", outcome=stop.outcome, exit_code=stop.exit_code, reason=stop.reason)
    return stop


def read_result(run: RunDirectory) -> dict[str, Any] | None:
    """Read what the newest comparison of a run came to; None where there was none."""
    path = run.path / "compare" / "result.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def identify(plan: Plan, reference: Plan, steps: int) -> str:
    """Hash everything that the numbers of a comparison follow from."""
    recipe = plan.recipe.model_dump(mode="json", exclude_unset=True)
    told = [
        {key: value for key, value in recipe.items() if key not in NOT_COMPARED},
        *({key: decision.value for key, decision in side.values.items()} for side in (plan, reference)),
        dict(plan.training_arguments),
        dict(plan.deepspeed or {}),
        plan.machine.label,
        steps,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def is_settled(result: Mapping[str, Any] | None, identity: str, require: CompareBoundsSection | None) -> bool:
    """Whether an earlier comparison holds for this start: of the same values, let through, within today's bounds."""
    if result is None or result.get("of") != identity or result.get("passed") is False:
        return False
    try:
        return not judge(Comparison.from_json(result), require)
    except (KeyError, TypeError, ValueError):
        return False  # of another version of mpt


def differing(plan: Plan, reference: Plan) -> dict[str, tuple[Any, Any]]:
    """List the values that differ between two plans: (the plan's, the reference's) by key; none: they are one run."""
    pairs = {key: (plan.value(key), reference.value(key)) for key in plan.values}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _pass(gate: Gate) -> Stop | None:
    section = gate.section
    differs = differing(gate.plan, gate.reference)
    if not differs:
        gate.view.note(f"nothing to compare: the run is {gate.plan.value('precision')} itself")
        return None
    identity = identify(gate.plan, gate.reference, section.steps)
    if is_settled(read_result(gate.run), identity, section.require):
        gate.view.note(f"compared with {gate.reference.value('precision')} before: {gate.folder / 'result.json'}")
        return None
    _begin(gate)
    sides: list[Side] = []
    for role, plan in zip(ROLES, (gate.plan, gate.reference), strict=True):
        measured = _measure(gate, role, plan)
        if isinstance(measured, Stop):
            return measured
        sides.append(measured)
    gradient = compare_gradients(_scratch(gate), sides, gate.wish, gate.environment)
    if gradient is None:
        return _interrupted(gate)
    comparison = Comparison(section.steps, sides[0], sides[1], gradient, _beside_precision(differs))
    breaches = judge(comparison, section.require)
    required = None if section.require is None else section.require.model_dump(exclude_none=True)
    verdict = {"passed": not breaches if section.require is not None else None, "breaches": list(breaches)}
    result = {"of": identity, "required": required, **verdict, **comparison.to_json()}
    write_json(gate.folder / "result.json", spell_non_finite(result))
    keys = ("steps", "max_loss_gap", "final_loss_gap", "gradient_cosine", "step_time_ratio", "passed", "breaches")
    told = {key: result[key] for key in keys}
    _journal(gate).append("compared", candidate=sides[0].title, reference=sides[1].title, **told)
    for line in write_out(comparison, section.require):
        gate.view.note(line)
    if not breaches:
        return None
    return Stop(
        Outcome.FAILED,
        ExitCode.DIVERGED,
        f"the run does not start: {'; '.join(breaches)}",
        f"{remedy_for(comparison)} The numbers are in {gate.folder / 'result.json'}.",
    )


def _begin(gate: Gate) -> None:
    """Make room for a new comparison, and see that there is enough."""
    needed = 2 * 4 * trainable_count(gate.plan)
    with writing(gate.folder):
        shutil.rmtree(gate.folder, ignore_errors=True)
        gate.folder.mkdir()
        free = shutil.disk_usage(gate.folder).free
    if needed > free:
        raise StorageError(
            f"the comparison keeps two gradients in fp32 for a while, {needed / 2**30:.1f} GiB, and {gate.folder} has "
            f"{free / 2**30:.1f} GiB free",
            remedy="Free space there, choose another --runs-dir, or leave the comparison out.",
        )
    if not gate.run.attempt_numbers():
        # Of an earlier comparison, perhaps of other data: nothing was trained on it.
        shutil.rmtree(gate.run.tokenizer, ignore_errors=True)


def _measure(gate: Gate, role: str, plan: Plan) -> Side | Stop:
    """Carry one attempt out in a scratch directory; a Stop where a signal or a failure ended it, not its numbers."""
    precision = str(plan.value("precision"))
    mixed = mixed_layers(plan.value("layers"), Precision(precision))
    layers = [{"name": name, "precision": other} for name, other in mixed.items()]
    steps = min(gate.section.steps, plan.value("max_steps") or gate.section.steps)
    scratch = RunDirectory(gate.folder / role)
    with writing(scratch.checkpoints):
        scratch.checkpoints.mkdir(parents=True)
        if gate.run.tokenizer.is_dir():
            shutil.copytree(gate.run.tokenizer, scratch.tokenizer)
    ask_to_measure(scratch.attempt(1), Measure(steps, keeps_gradients=True))
    gate.view.note(f"comparing: {steps} steps in {titled(precision, layers)}, the {role}")
    gate.wish.is_urgent = True  # nothing of it is worth saving, so that the first signal may end it at once
    try:
        view = PartView(gate.view, role, steps)
        stop = supervise(_to_measure(plan), scratch, view, gate.wish, gate.environment, start_from=None)
    finally:
        gate.wish.is_urgent = False
        _keep_little(gate.run, scratch)
    if gate.wish.signal is not None:
        return _interrupted(gate)
    if stop.outcome is Outcome.FAILED:
        remedy = f"{stop.remedy} Its log is {scratch.attempt(1).log}."
        return replace(stop, reason=f"the comparison's {role}, in {precision}, failed: {stop.reason}", remedy=remedy)
    diverged = stop.reason if stop.outcome is Outcome.DIVERGED else None
    return side_of(precision, read_rows(scratch), diverged, layers)


def _to_measure(plan: Plan) -> Plan:
    """Take from a plan what is not a step of training. The learning rate goes as in the whole run."""
    alone = {"compare": None, "sample": None, "restart": RestartSection(max_restarts=0)}
    recipe = plan.recipe.model_copy(update=alone)
    return replace(plan, recipe=recipe, training_arguments={**plan.training_arguments, **SILENT})


def _keep_little(run: RunDirectory, scratch: RunDirectory) -> None:
    """Hand the tokenizer that the first attempt trained to the run, and delete what nobody reads any more."""
    with suppress(OSError):
        if not run.tokenizer.exists() and scratch.tokenizer.is_dir():
            scratch.tokenizer.rename(run.tokenizer)
    for folder in (scratch.tokenizer, scratch.checkpoints, scratch.final):
        shutil.rmtree(folder, ignore_errors=True)


def _beside_precision(differs: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Keep what a reader would not expect of another precision: how the work is done, not in which formats."""
    telling = ("attention", "compile", "micro_batch_size", "offload", "gradient_checkpointing")
    return {key: pair for key, pair in differs.items() if key in telling}


def _scratch(gate: Gate) -> list[RunDirectory]:
    return [RunDirectory(gate.folder / role) for role in ROLES]


def _interrupted(gate: Gate) -> Stop:
    has_checkpoint = bool(checkpoints.list_checkpoints(gate.run))
    assert gate.wish.signal is not None
    return interrupted(
        gate.wish.signal, "while it was compared, as asked", loses_steps=False, has_checkpoint=has_checkpoint
    )


def _journal(gate: Gate) -> Journal:
    return Journal(gate.run.journal, max(gate.run.attempt_numbers(), default=0))


class PartView:
    """Shows one attempt of a comparison in the view of the run: what it has to tell of itself, and no more."""

    def __init__(self, view: View, role: str, steps: int) -> None:
        self._view = view
        self._role = role
        self._steps = steps

    def attempt(self, number: int, resume_from: str | None) -> None:
        self._view.attempt(1, None)

    def event(self, event: Mapping[str, Any]) -> None:
        """Hand on where the attempt is, and what went wrong; the run's own first attempt tells the rest."""
        if event["kind"] == "training_started":
            most = event.get("max_steps")
            self._view.event({**event, "max_steps": min(self._steps, most) if most else self._steps})
        elif event["kind"] in ("phase", "step_skipped", "health") or event.get("passed") is False:
            self._view.event(event)

    def row(self, row: Mapping[str, Any]) -> None:
        # The run counts its skipped steps by attempt; these are none of its own.
        self._view.row({**row, "attempt": self._role})

    def note(self, text: str) -> None:
        """Leave out what the supervisor says of saving: here nothing is saved."""
