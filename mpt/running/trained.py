"""What a run has trained so far, or what a folder holds: the weights that are evaluated or talked to.

Called by `mpt eval` and `mpt chat`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mpt.errors import MptError, StorageError
from mpt.planning.plan import Plan
from mpt.running import checkpoints
from mpt.running.plan_file import read_plan
from mpt.running.run_directory import RunDirectory, find_run

ADAPTER = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")
MARKS = ("config.json", ADAPTER)
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights by their place: a local folder, or a hub id. `base` is the adapter's own base model, None without one.

    `run` is the run that they are of, and `note` what the user should know of the choice.
    """

    place: str
    base: str | None = None
    run: RunDirectory | None = None
    note: str = ""

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights; on the hub one is taken to."""
        folder = Path(self.place)
        return not folder.is_dir() or any(folder.joinpath(name).exists() for name in TOKENIZERS)


def find_trained(name: str, runs_dir: Path, checkpoint: str | None) -> Trained:
    """Find the weights that a user names: a run by directory or name, a folder with a model, or a hub id.

    `checkpoint` is a run's: its step or folder's name, "best" or "final"; None: the final model, or the newest
    checkpoint. Raises MptError where there is nothing of that name.
    """
    folder = Path(name)
    if checkpoint is None and (within := _run_around(folder)) is not None:
        return _in_folder(folder, within)
    if not RunDirectory(folder).exists and folder.is_dir() and any(folder.joinpath(mark).exists() for mark in MARKS):
        return _outside(_in_folder(folder), checkpoint)
    looks_like_hub = name.count("/") == 1 and not folder.exists() and not name.startswith((".", "/", "~"))
    if looks_like_hub and not RunDirectory(runs_dir / name).exists:
        return _outside(Trained(name), checkpoint)
    try:
        run = find_run(name, runs_dir)
    except MptError as error:
        raise MptError(
            f"{error.problem}, and no model either",
            remedy=f"{error.remedy} A model is a folder with a config.json, or a hub id such as OWNER/NAME.",
        ) from error
    return _of_run(run, checkpoint)


def _run_around(folder: Path) -> RunDirectory | None:
    """Find the run whose final model or checkpoint a path is."""
    whole = folder.resolve()
    for path, run in ((whole, RunDirectory(whole.parent)), (whole.parent, RunDirectory(whole.parent.parent))):
        if whole.is_dir() and run.exists and path in (run.final, run.checkpoints) and whole != run.checkpoints:
            return run
    return None


def _outside(trained: Trained, checkpoint: str | None) -> Trained:
    if checkpoint is not None:
        raise MptError(
            f"{trained.place} is a model and no run, and has no checkpoints",
            remedy="Leave --checkpoint out, or give the run's directory or name.",
        )
    return trained


def _of_run(run: RunDirectory, checkpoint: str | None) -> Trained:
    if checkpoint == "final" or (checkpoint is None and run.final.is_dir()):
        if not run.final.is_dir():
            raise MptError(
                f"{run.path} has no final model yet",
                remedy="Name a checkpoint, or leave --checkpoint out for the newest.",
            )
        return _in_folder(run.final, run)
    if checkpoint is None:
        newest = checkpoints.newest_usable(run)
        if newest is None:
            raise MptError(
                f"{run.path} has neither a final model nor a checkpoint",
                remedy="Wait for its first checkpoint (training.save_steps), or see `mpt doctor`.",
            )
        return _in_folder(newest.path, run, f"the run has not finished: this is {newest.path.name}")
    if checkpoint == "best":
        best = checkpoints.best_checkpoint([path for _, path in checkpoints.list_checkpoints(run)])
        if best is None:
            raise MptError(
                f"{run.path} has no best checkpoint: nothing was evaluated when one was saved, or it was pruned",
                remedy="training.load_best_model_at_end keeps it; `mpt checkpoints list` shows what there is.",
            )
        checkpoint = best
    return _in_folder(checkpoints.named(run, checkpoint).path, run)


def _in_folder(folder: Path, run: RunDirectory | None = None, note: str = "") -> Trained:
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise MptError(
            f"{folder} holds no weights that can be loaded as a whole: no *.safetensors",
            remedy="ZeRO-3 writes its checkpoints in shards; take the final model, or one of another run.",
        )
    return Trained(str(folder), _base_of(folder), run, note)


def _base_of(folder: Path) -> str | None:
    file = folder / ADAPTER
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is damaged ({error!r})", remedy="Restore it from a copy, or take another checkpoint."
        ) from error


def newest_plan_of(run: RunDirectory) -> Plan:
    """Read the plan of a run's last attempt. Raises MptError for a run that never had one."""
    numbers = run.attempt_numbers()
    if not numbers:
        raise MptError(f"{run.path} never began an attempt", remedy="`mpt train` begins it.")
    return read_plan(run.attempt(numbers[-1]).plan)
