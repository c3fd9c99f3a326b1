"""The trackers' callbacks, as transformers made them, kept in their place: the run is worth more than its reports.

A tracker that can't begin ends the attempt in words. One that fails later is left out, with a notice. transformers ends
trackers with the training loop; here they stay open for the evaluation after it, which would begin another run in
MLflow, and are closed on every way out. Called by the session.
"""

import sys
from collections.abc import Callable
from typing import Any

from transformers.integrations import integration_utils

from mpt.errors import MptError
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
from mpt.running.trackers import keep_tracker_run

KINDS = {kind: name for name, kind in integration_utils.INTEGRATION_TO_CALLBACK.items()}
REPORTS = ("on_log", "on_save", "on_evaluate", "on_predict", "on_step_end", "on_epoch_end")


class Trackers:
    """The tracker callbacks of a Trainer. `close` ends them."""

    def __init__(self, trainer: Any, journal: Journal) -> None:
        self._trainer = trainer
        self._journal = journal
        self._failed: set[str] = set()
        self._ends: list[tuple[str, Callable[..., Any]]] = []
        for callback in trainer.callback_handler.callbacks:
            name = KINDS.get(type(callback))
            if name is not None:
                self._ends.append((name, callback.on_train_end))
                callback.on_train_end = _not_yet
                callback.on_train_begin = _in_words(name, callback.on_train_begin)
                for report in REPORTS:
                    setattr(callback, report, self._guarded(name, getattr(callback, report)))

    def close(self) -> None:
        """Let each tracker finish its run: flush, upload, close."""
        trainer = self._trainer
        while self._ends:
            name, end = self._ends.pop(0)
            self._guarded(name, end)(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
            )

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if name in self._failed:
                return
            try:
                call(*arguments, **keywords)
            except Exception as error:  # noqa: BLE001 - whatever a tracker's network does, the training goes on
                self._failed.add(name)
                said = " ".join(str(error).split())[:300] or type(error).__name__
                self._journal.append("notice", text=f"{name} fails and is left out from here on: {said}")

        return guarded


def _in_words(name: str, begin: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what keeps a tracker from beginning into an MptError: its settings are the user's, and none is retried."""

    def began(*arguments: Any, **keywords: Any) -> Any:
        try:
            begin(*arguments, **keywords)
        except Exception as error:
            said = " ".join(str(error).split())[:400] or type(error).__name__
            raise MptError(
                f"training.report_to: {name} can't begin: {said}",
                remedy=f"Mend its settings (environment, login, network), or leave {name} out of training.report_to.",
            ) from error

    return began


def keep_tracker_runs(run: RunDirectory, trackers: list[str]) -> None:
    """Note down the runs that servers have numbered; called when the training has begun, on rank 0."""
    mlflow = sys.modules.get("mlflow")
    if "mlflow" in trackers and mlflow is not None and mlflow.active_run() is not None:
        keep_tracker_run(run, "mlflow", mlflow.active_run().info.run_id)


def _not_yet(*arguments: Any, **keywords: Any) -> None:
    return None
