"""Make the step of an incident again, to see whether it comes out the same: after a change of torch, or
under a debugger.

It is a real attempt, by the supervisor and the worker of every run, in a scratch run directory below the incident: the
plan is that of the attempt which ended with it, its first step is the incident's. This module imports no torch.
"""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode, MptError, StorageError
from mpt.measuring.compare import SILENT
from mpt.planning.plan import Plan
from mpt.recipe.schema import RecoverySection, RestartSection
from mpt.running.attempt import View
from mpt.running.lock import locked
from mpt.running.measured import Measure, ask_to_measure
from mpt.running.metrics import read_rows
from mpt.running.plan_file import read_plan
from mpt.running.recovery import Outcome
from mpt.running.run_directory import RunDirectory, writing
from mpt.running.signals import StopWish
from mpt.running.supervisor import supervise

WEIGHTS = "weights.safetensors"
NOT_FINITE = ("N1", "N2", "N3", "N4")
# The first bad step ends the attempt: there is only one.
AT_ONCE = {"max_bad_in_a_row": 1, "max_overflows_in_a_row": 1}


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it. `was` and `now` are autopsies as JSON; `now` None: every number was finite this time."""

    incident: str
    was: Mapping[str, Any]
    now: Mapping[str, Any] | None
    loss: Any

    @property
    def reproduced(self) -> bool:
        """Whether the step went as it had gone: bad in the same way, or, where it was finite, to the same loss."""
        if self.now is None:
            return self.was["code"] not in NOT_FINITE and bool(self.was["loss"] == self.loss)
        # Weights that were not finite are found by what they make of the loss.
        return self.was["code"] == "N4" or bool(self.was["code"] == self.now["code"])

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "incident": self.incident,
            "reproduced": self.reproduced,
            "loss": self.loss,
            "was": self.was,
            "now": self.now,
        }


def find_incident(run: RunDirectory, name: str | None) -> Path:
    """Find an incident by its number, however written, None: the newest. Raises MptError with those that there are."""
    there = sorted(path for path in run.incidents.glob("[0-9]*") if (path / "autopsy.json").exists())
    if not there:
        raise MptError(f"{run.path} has no incident", remedy="`mpt doctor` tells what happened in the run.")
    if name is None:
        return there[-1]
    found = [path for path in there if name.isdecimal() and int(path.name) == int(name)]
    if not found:
        raise MptError(
            f"{run.path} has no incident {name}", remedy=f"There are {', '.join(path.name for path in there)}."
        )
    return found[0]


def replay(
    run: RunDirectory, incident: Path, view: View, wish: StopWish, environment: Mapping[str, str]
) -> Replayed | None:
    """Make the incident's step again; None where a signal came before its end.

    Nobody may be training in the run meanwhile: it would have to share its devices. Raises RunLockedError then, and
    MptError where the incident can't be replayed or the attempt fails.
    """
    was = _read_autopsy(incident / "autopsy.json")
    if not (incident / WEIGHTS).exists():
        raise StorageError(
            f"{incident} holds no weights: there was no room for them, or two later incidents have theirs",
            remedy="Replay a newer incident, or go on from a checkpoint before it to come there again.",
        )
    plan = read_plan(run.attempt(was["attempt"]).plan)
    scratch = RunDirectory(incident / "replay")
    with locked(run.lock):
        _make(run, scratch, incident)
        stop = supervise(_to_replay(plan, was), scratch, view, wish, environment, start_from=None)
        if wish.signal is not None:
            _delete(scratch)
            return None
        if stop.outcome is Outcome.FAILED:
            raise MptError(
                f"the replay failed: {stop.reason}",
                remedy=f"{stop.remedy} Its log is {scratch.attempt(1).log}.",
                exit_code=stop.exit_code if stop.exit_code != ExitCode.NO_PROGRESS else ExitCode.BUG,
            )
        found = scratch.incidents / "0001" / "autopsy.json"
        now = json.loads(found.read_text(encoding="utf-8")) if found.exists() else None
        rows = read_rows(scratch)
        _delete(scratch)
    loss = now["loss"] if now is not None else (rows[1]["loss"] if 1 in rows else None)
    return Replayed(incident.name, was, now, loss)


def _read_autopsy(path: Path) -> dict[str, Any]:
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        return {**was, "attempt": int(was["attempt"]), "micro_batches": int(was["micro_batches"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged ({error!r})", remedy="Replay another incident.") from error


def _make(run: RunDirectory, scratch: RunDirectory, incident: Path) -> None:
    _delete(scratch)
    with writing(scratch.path):
        scratch.checkpoints.mkdir(parents=True)
        if run.tokenizer.is_dir():
            shutil.copytree(run.tokenizer, scratch.tokenizer)
        if run.from_data.exists():
            shutil.copy(run.from_data, scratch.from_data)
    ask_to_measure(scratch.attempt(1), Measure(1, incident=str(incident.resolve())))


def _to_replay(plan: Plan, was: Mapping[str, Any]) -> Plan:
    """Take from a plan what is not its step, and let the loss scale begin where it was then."""
    health = plan.recipe.health.model_copy(update=AT_ONCE)
    alone = {
        "compare": None,
        "sample": None,
        "health": health,
        "restart": RestartSection(max_restarts=0),
        "recovery": RecoverySection(rungs=[]),
    }
    values = dict(plan.values)
    scale = values.get("loss_scale")
    if scale is not None and scale.value is not None and was.get("loss_scale") and scale.value.get("static") is None:
        values["loss_scale"] = replace(scale, value={**scale.value, "initial": was["loss_scale"]})
    passes = was["micro_batches"]  # an epoch's last step may have fewer than planned
    values["gradient_accumulation_steps"] = replace(values["gradient_accumulation_steps"], value=passes)
    return replace(
        plan,
        recipe=plan.recipe.model_copy(update=alone),
        values=values,
        training_arguments={**plan.training_arguments, **SILENT, "gradient_accumulation_steps": passes},
        deepspeed=None if plan.deepspeed is None else _to_replay_deepspeed(plan.deepspeed, was, passes),
        resume_from=None,
        repairs=(),
    )


def _to_replay_deepspeed(config: Mapping[str, Any], was: Mapping[str, Any], passes: int) -> dict[str, Any]:
    """Say the same in DeepSpeed's words: the batch, and the scale as a power of two."""
    changed = json.loads(json.dumps(dict(config)))
    micro, before = changed["train_micro_batch_size_per_gpu"], changed["gradient_accumulation_steps"]
    world = changed["train_batch_size"] // (micro * before)
    changed |= {"gradient_accumulation_steps": passes, "train_batch_size": micro * passes * world}
    if was.get("loss_scale") and changed.get("fp16", {}).get("enabled") and not changed["fp16"].get("loss_scale"):
        changed["fp16"]["initial_scale_power"] = round(math.log2(was["loss_scale"]))
    return dict(changed)


def _delete(scratch: RunDirectory) -> None:
    with suppress(OSError):
        shutil.rmtree(scratch.path)
