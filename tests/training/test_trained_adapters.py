"""`mpt eval` on adapters: the base with what was trained on it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.hardware.detect import detect_machine
from mpt.measuring.evaluation import evaluate
from mpt.measuring.trained_plan import plan_trained, with_weights
from mpt.running.run_directory import RunDirectory
from mpt.running.signals import StopWish
from mpt.running.trained import Trained, find_trained, newest_plan_of
from tests.training.tiny_runs import Run, save_base

pytestmark = pytest.mark.slow


class Silent:
    """A view that shows nothing."""

    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Any) -> None: ...

    def row(self, row: Any) -> None: ...

    def note(self, text: str) -> None: ...


def loss_of(trained: Trained, run: RunDirectory) -> float | None:
    of_run = newest_plan_of(run)
    recipe = with_weights(of_run.recipe, trained, of_run=of_run, data=None, overrides=[])
    plan = plan_trained(recipe, detect_machine(os.environ), None, "evaluation")
    found = evaluate(plan, trained, Silent(), StopWish(), os.environ)
    assert found is not None
    return found.loss


def test_adapters_are_evaluated_on_their_base_as_the_run_evaluated_them(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = new_run(model=save_base(tmp_path / "base"), tokenizer=None, lora={"rank": 4})
    run.directory.journal.touch()
    assert run.train() == 0, run.log()
    trained = find_trained(str(run.path), tmp_path, None)
    assert trained.is_adapter and trained.place == str(run.directory.final)
    assert loss_of(trained, run.directory) == pytest.approx(run.last_word()["eval_loss"], abs=1e-6)
