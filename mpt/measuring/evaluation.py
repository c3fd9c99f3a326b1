"""Evaluate trained weights: data, precision and metrics are a recipe's, and the worker is that of every run.

It is an attempt in a scratch directory that is asked to evaluate, not to train. This module imports no torch.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode, MptError
from mpt.planning.plan import Plan
from mpt.recipe.schema import Recipe
from mpt.running.attempt import View
from mpt.running.measured import Measure, ask_to_measure, evaluation_file
from mpt.running.recovery import Outcome
from mpt.running.run_directory import RunDirectory, writing
from mpt.running.signals import StopWish
from mpt.running.supervisor import supervise
from mpt.running.trained import Trained
from mpt.terms import Task

# The loss of these is the mean negative log likelihood of tokens.
WITH_PERPLEXITY = (Task.CAUSAL_LM, Task.SFT, Task.MASKED_LM)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What came of it. `metrics` are the task's own, by name; `perplexity` None: the task has none, or it is beyond
    what a float holds."""

    model: str
    data: str
    precision: str
    loss: float | None
    perplexity: float | None
    metrics: Mapping[str, float]
    samples: int | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "model": self.model,
            "data": self.data,
            "precision": self.precision,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "metrics": dict(self.metrics),
            "samples": self.samples,
            "seconds": self.seconds,
        }


def check_held_out(recipe: Recipe) -> None:
    """Raise MptError where a recipe has nothing to evaluate on."""
    section = recipe.data
    if section.eval_source is None and section.eval_split is None and section.eval_fraction == 0:
        raise MptError(
            "the recipe holds nothing out to evaluate on: data.eval_fraction is 0",
            remedy="Name what to evaluate on: --data FILE, or data.eval_source=FILE behind the recipe.",
        )


def evaluate(
    plan: Plan, trained: Trained, view: View, wish: StopWish, environment: Mapping[str, str]
) -> Evaluated | None:
    """Evaluate in a scratch directory; None where a signal came before the end. Raises MptError where it fails, and
    leaves the directory with the log then."""
    scratch = RunDirectory(Path(tempfile.mkdtemp(prefix="mpt-eval-")))
    with writing(scratch.path):
        scratch.checkpoints.mkdir()
    ask_to_measure(
        scratch.attempt(1), Measure(0, evaluates=True, adapter=trained.place if trained.is_adapter else None)
    )
    stop = supervise(plan, scratch, view, wish, environment, start_from=None)
    file = evaluation_file(scratch.attempt(1))
    if wish.signal is None and not (stop.outcome is Outcome.FINISHED and file.exists()):
        raise MptError(
            f"the evaluation failed: {stop.reason}",
            remedy=f"{stop.remedy or 'See the log.'} Its log is {scratch.attempt(1).log}.",
            exit_code=stop.exit_code if stop.exit_code not in (ExitCode.NO_PROGRESS, ExitCode.DONE) else ExitCode.BUG,
        )
    found = None if wish.signal is not None else json.loads(file.read_text(encoding="utf-8"))
    shutil.rmtree(scratch.path, ignore_errors=True)
    return None if found is None else _evaluated(plan, trained, found)


def _evaluated(plan: Plan, trained: Trained, found: Mapping[str, Any]) -> Evaluated:
    loss = found["loss"] if isinstance(found["loss"], float) else None
    has_perplexity = plan.value("task") in WITH_PERPLEXITY and loss is not None
    return Evaluated(
        model=trained.place,
        data=_spell_data(plan.recipe),
        precision=plan.value("precision"),
        loss=loss,
        perplexity=math.exp(loss) if has_perplexity and loss is not None and loss < 700 else None,
        metrics=found["metrics"],
        samples=found["samples"],
        seconds=found["seconds"],
    )


def _spell_data(recipe: Recipe) -> str:
    section = recipe.data
    source = section.eval_source or section.source
    entries = [source] if isinstance(source, str) else source
    named = ", ".join(entry if isinstance(entry, str) else entry.source for entry in entries)
    if section.eval_source is not None:
        return named
    if section.eval_split is not None:
        return f"{named}, split {section.eval_split}"
    return f"held out of {named} ({section.eval_fraction:.0%})"
