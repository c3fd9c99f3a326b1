"""Save a run's checkpoints: every rank writes aside, all agree that it is written, rank 0 commits and prunes.

A disk that refuses costs a checkpoint and not the run: a save is tried twice, then the training goes on with the older
checkpoint intact; the third failed save in a row ends it. No rank waits for one that failed: a failure to write is
held until its rank has taken part in every collective of the save, and then told to all. `mpt.training.trainer` calls.

Where the plan says so, rank 0 copies the weights and the optimizer's state to the host's memory, and a thread writes
and commits them while the training goes on (`mpt.training.background`); what came of it is agreed on at the next save.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mpt.errors import StorageError
from mpt.running import checkpoints
from mpt.running.lineage import current_lineage
from mpt.running.retention import KEPT_CHECKPOINTS, prune
from mpt.training.background import Background, Pending
from mpt.training.finite import bad_state
from mpt.training.saving import clear_staging, name_best_relatively, storage_errors

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

HEALTH_FILE = "health.json"
# Failed saves in a row, each tried twice, after which a run would only lose more.
ALLOWED_FAILURES = 2


class Saver:
    """What a run knows of its checkpoints while it trains. Every rank has one, and calls what is public alike."""

    def __init__(self, trainer: "PlanTrainer") -> None:
        self.trainer = trainer
        self.run = trainer.run
        self.is_writer = trainer.watch.is_writer
        self.newest: str | None = None
        self.staging: Path | None = None
        """Where the Trainer writes while a save is under way."""
        self._candidates: list[int] = []  # steps of checkpoints that may prove good
        self._failed_in_a_row = 0
        self._held: StorageError | None = None
        self._is_holding = False
        self._best: tuple[float | None, int | None] = (None, None)  # metric and step as of the newest checkpoint
        self.background = Background() if trainer.plan.value("background_saving") else None
        self._pending: Pending | None = None
        if self.is_writer:
            clear_staging(self.run.checkpoints)

    def restore(self) -> None:
        """Take over, before the first step, what the checkpoint knew that the run goes on from."""
        trainer = self.trainer
        self._best = (trainer.state.best_metric, trainer.state.best_global_step)
        if trainer.plan.resume_from is None:
            return
        proved = checkpoints.known_good(self.run)
        listed = checkpoints.list_checkpoints(self.run)
        self._candidates = [step for step, path in listed if path.name not in proved]
        kept = self.run.checkpoints / trainer.plan.resume_from / HEALTH_FILE
        if kept.exists():  # a checkpoint of an earlier mpt has none
            trainer.watch.health.restore(json.loads(kept.read_text(encoding="utf-8")))

    def save(self, write: Callable[[], None], *, is_needed: bool) -> None:
        """Save the present step unless it is saved; `write` is the Trainer's own saving, and goes to `staging`.

        Raises StorageError where the disk refuses twice and the save `is_needed`, since none comes after it, or where
        too many have failed in a row.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        if self.newest == _name(step) or (self._pending is not None and self._pending.step == step):
            return
        trainer._phase("saving")
        self._settle()
        trainer._refuse(bad_state(trainer), "not finite, and kept out of the checkpoint")
        if self.background is not None and not is_needed:
            problem = self._begin_in_background(write, step, self.background)
            if problem is None:
                trainer._phase("training")
                return
        else:
            problem = self._try(write, step)
        if problem is not None:
            self._make_room()
            problem = self._try(write, step)
        if problem is None:
            self._note_saved(step)
        else:
            self._make_room()
            self._note_failed(step, problem, is_needed=is_needed)
        trainer.state.best_model_checkpoint = self.best_checkpoint()
        trainer._phase("training")

    def finish(self) -> None:
        """Wait for what is written in the background, whatever ends the training: that has the word, and a save that
        fails now is but journalled. No other rank is waited for."""
        pending, self._pending = self._pending, None
        if pending is None or pending.future is None:
            return
        problem = pending.future.exception() or pending.future.result()
        if problem is not None:
            said = problem.problem if isinstance(problem, StorageError) else str(problem)
            with suppress(StorageError):
                self.trainer.journal.append("save_failed", step=pending.step, problem=said, in_a_row=1)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold a failure to write until the save is over, and with it what follows from that failure. A save has
        barriers after its writes, and this rank must come to them. Outside a save, failures pass.
        """
        try:
            with storage_errors(self.run.checkpoints):
                yield
        except torch.OutOfMemoryError:
            raise
        except StorageError as error:
            if not self._is_holding:
                raise
            # Without the traceback, whose frames keep the tensors that were to be written.
            self._held = self._held or StorageError(error.problem, remedy=error.remedy)
        except (OSError, RuntimeError, SafetensorError):
            if not self._is_holding or self._held is None:
                raise

    def left_early(self) -> None:
        """Say that the save under way broke off before its last collective: this rank can't hold its failure."""
        self._is_holding = False

    def promote(self) -> None:
        """Say which checkpoints have proved good: enough healthy updates were made after them."""
        health, step = self.trainer.watch.health, self.trainer.state.global_step
        enough = health.known_good_after
        if not self.is_writer or health.healthy_steps < enough:
            return
        if self._pending is not None and self._pending.future is not None and self._pending.future.done():
            self._note_committed(self._pending)
        for candidate in [saved for saved in self._candidates if saved + enough <= step]:
            self._candidates.remove(candidate)
            if (self.run.checkpoints / _name(candidate)).is_dir():
                checkpoints.promote(self.trainer.journal, candidate)

    def best_checkpoint(self) -> str | None:
        """Where the best checkpoint is now; what a checkpoint's state says may be of another place."""
        best = self.trainer.state.best_global_step
        folder = self.run.checkpoints / _name(best)
        return str(folder) if best and folder.is_dir() else None

    def _try(self, write: Callable[[], None], step: int) -> StorageError | None:
        """Write and commit once; give what a disk refused, the same on every rank."""
        staging = self.run.checkpoints / f".staging-{step}"
        self.staging, self._held, self._is_holding = staging, None, True
        try:
            with self._in_step(), self.holding():
                write()
        finally:
            self.staging, self._is_holding = None, False
        problem = self._agree(self._held)
        if problem is None:
            problem = self._agree(self._complete_and_commit(staging, step) if self.is_writer else None)
        return problem

    def _begin_in_background(self, write: Callable[[], None], step: int, background: Background) -> StorageError | None:
        """Write what is small, copy what is large, and leave the rest to the thread of rank 0; give what a disk refused
        by then, the same on every rank."""
        staging = self.run.checkpoints / f".staging-{step}"
        self.staging, self._held, self._is_holding = staging, None, True
        try:
            with background.copying() as copied, self.holding():
                write()
        finally:
            self.staging, self._is_holding = None, False
        if self._held is None and self.is_writer:
            try:
                self._complete(staging, step)
            except StorageError as error:
                self._held = error
        problem = self._agree(self._held)
        if problem is not None:
            return problem
        state, health = self.trainer.state, self.trainer.watch.health
        self._pending = Pending(step, is_healthy=health.is_healthy, best=(state.best_metric, state.best_global_step))
        if self.is_writer:
            self._pending.future = background.submit(partial(self._write_and_commit, copied, staging, step))
        return None

    def _settle(self) -> None:
        """Agree on what came of the save in the background; each rank begins its next save with this.

        Raises StorageError where too many have failed in a row.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.future is not None:
            self._note_committed(pending)
        problem = self._agree(pending.problem)
        self.trainer.state.best_model_checkpoint = self.best_checkpoint()
        if problem is not None:
            self._make_room()
            self._note_failed(pending.step, problem, is_needed=False)
            return
        self.newest = _name(pending.step)
        self._failed_in_a_row = 0
        self._best = pending.best

    def _note_committed(self, pending: Pending) -> None:
        """Take over, on rank 0, what its thread has come to; waits for it. Raises what is no matter of storage."""
        assert pending.future is not None
        pending.problem, pending.future = pending.future.result(), None
        if pending.problem is None and pending.is_healthy:
            self._candidates.append(pending.step)

    def _write_and_commit(self, copied: list[Callable[[], None]], staging: Path, step: int) -> StorageError | None:
        """Write the copies and commit; try twice. Runs in the thread, and knows nothing that the training changes."""
        problem = None
        for _ in range(2):
            try:
                with storage_errors(self.run.checkpoints):
                    for write in copied:
                        write()
            except StorageError as error:
                problem = error
            else:
                problem = self._commit(staging, step)
            if problem is None:
                self.trainer.journal.append("checkpoint_saved", step=step, name=_name(step))
                self._prune()
                return None
            with suppress(StorageError):
                self._prune()
        return problem

    def _in_step(self) -> AbstractContextManager[None]:
        if not self.trainer.is_deepspeed_enabled:
            return nullcontext()
        return deepspeed_in_step(self.trainer.model_wrapped, self)

    def _agree(self, problem: StorageError | None) -> StorageError | None:
        """Let every rank know what any of them found. Nobody passes before all have come."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return problem
        count = torch.tensor(float(problem is not None), device=self.trainer.args.device)
        dist.all_reduce(count)
        if not count.item():
            return None
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if problem is None else (problem.problem, problem.remedy))
        words, remedy = next(one for one in told if one is not None)
        return StorageError(words, remedy=remedy)

    def _complete_and_commit(self, staging: Path, step: int) -> StorageError | None:
        try:
            self._complete(staging, step)
        except StorageError as error:
            return error
        return self._commit(staging, step)

    def _complete(self, staging: Path, step: int) -> None:
        """Add to what the Trainer wrote what mpt knows of the step. Raises StorageError."""
        with storage_errors(self.run.checkpoints):
            name_best_relatively(staging / _name(step), self._best_name())
            # What later verdicts depend on: a resumed run judges as one never interrupted.
            health = json.dumps(self.trainer.watch.health.state())
            (staging / _name(step) / HEALTH_FILE).write_text(health, encoding="utf-8")

    def _commit(self, staging: Path, step: int) -> StorageError | None:
        """Make a checkpoint of what all ranks wrote; give what the disk refused.

        Raises StorageError where the journal is damaged: no other try mends that.
        """
        lineage = current_lineage(self.run)
        try:
            with storage_errors(self.run.checkpoints):
                checkpoints.commit(
                    staging / _name(step),
                    self.run.checkpoints / _name(step),
                    step=step,
                    world_size=self.trainer.args.world_size,
                    lineage=lineage,
                    health={"finite": True},  # else the attempt had ended before it was saved
                )
                staging.rmdir()
        except StorageError as error:
            return error
        return None

    def _note_saved(self, step: int) -> None:
        if self.is_writer:
            self.trainer.journal.append("checkpoint_saved", step=step, name=_name(step))
            self._prune()
        # A rank that ended now would have torchrun end the one that is still writing.
        self.trainer.accelerator.wait_for_everyone()
        self.newest = _name(step)
        self._failed_in_a_row = 0
        self._best = (self.trainer.state.best_metric, self.trainer.state.best_global_step)
        if self.trainer.watch.health.is_healthy:
            self._candidates.append(step)

    def _note_failed(self, step: int, problem: StorageError, *, is_needed: bool) -> None:
        """Go on without this checkpoint, or raise StorageError where that would be no use."""
        self._failed_in_a_row += 1
        count = self._failed_in_a_row
        if self.is_writer:
            self.trainer.journal.append("save_failed", step=step, problem=problem.problem, in_a_row=count)
        if is_needed:
            raise problem
        if count > ALLOWED_FAILURES:
            raise StorageError(f"{problem.problem} ({count} saves in a row have failed)", remedy=problem.remedy)
        state = self.trainer.state
        if state.best_global_step == step:  # there is no such checkpoint: the best that was saved is the best still
            state.best_metric, state.best_global_step = self._best

    def _make_room(self) -> None:
        """Drop what a failed try wrote, and what nobody needs; the ranks go on together."""
        if self.is_writer:
            clear_staging(self.run.checkpoints)
            with suppress(StorageError):  # the next try will say what is wrong
                self._prune()
        self.trainer.accelerator.wait_for_everyone()

    def _prune(self) -> None:
        keep = self.trainer.plan.recipe.training_keys.get("save_total_limit") or KEPT_CHECKPOINTS
        best = self._best_name()
        prune(self.run, keep, {best} if best else set())

    def _best_name(self) -> str | None:
        best = self.trainer.state.best_global_step
        return _name(best) if best else None


@contextmanager
def deepspeed_in_step(engine: Any, saver: Saver) -> Iterator[None]:
    """Let no failure to write take this rank out of DeepSpeed's `save_checkpoint` before its last collective.

    Its writes stand between barriers (0.19.8, runtime/engine.py), so that a rank that raised would leave the others
    waiting. What stays outside is the copy of an optimizer on an NVMe drive: there the attempt ends.
    """
    files, save_checkpoint = engine.checkpoint_engine, engine.save_checkpoint

    @functools.wraps(save_checkpoint)  # transformers looks at the signature
    def save_whole(folder: str, **keywords: Any) -> None:
        tag = f"global_step{engine.global_steps}"  # its own default
        try:
            save_checkpoint(folder, tag=tag, save_latest=False, **keywords)
        except Exception:
            saver.left_early()
            raise
        if saver.is_writer:
            with saver.holding():  # its own write of this file would stand before the last barrier
                Path(folder, "latest").write_text(tag, encoding="utf-8")

    def held(write: Callable[..., Any]) -> Callable[..., None]:
        def write_or_hold(*arguments: Any, **keywords: Any) -> None:
            with saver.holding():
                write(*arguments, **keywords)

        return write_or_hold

    replaced = {
        (files, "makedirs"): held(files.makedirs),
        (files, "save"): held(files.save),
        (engine, "_copy_recovery_script"): held(engine._copy_recovery_script),
        (engine, "save_checkpoint"): save_whole,
    }
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name in replaced:
            delattr(owner, name)


def _name(step: int | None) -> str:
    return f"{checkpoints.PREFIX}{step}"
