"""What is kept of a step whose numbers went bad for good, so that it can be made again: `incidents/0001/`.

autopsy.json says what was found; `step-rank0.safetensors` is what that rank computed on: its micro batches, and the
random state before the first; `weights.safetensors` are the trained weights as the attempt ended with them (those from
before the bad update, where it was left out), in fp32, which holds every narrower number exactly. They are as large as
a third of a checkpoint: the newest two incidents keep theirs. `mpt replay` makes the step again (training/replay.py).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mpt.errors import StorageError
from mpt.running.journal import spell_non_finite
from mpt.running.run_directory import make_durable, write_json
from mpt.training.autopsy import EXCERPT, Autopsy, examine
from mpt.training.outcome import Diverged
from mpt.training.random_state import RandomState, random_state
from mpt.training.saving import storage_errors
from mpt.training.tensor_file import whole, whole_shape, write_tensors

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

KEPT_WEIGHTS = 2
ITEMS, RANDOM_STATE = "items", "random_state_"  # of the CPU, and of the device


@dataclass(slots=True)
class Evidence:
    """The micro batches of the present step, by reference, and torch's random state before the first of them.

    `sample_ids` are the numbers of their samples in the data set; None for a micro batch of streamed data.
    """

    batches: list[dict[str, Any]] = field(default_factory=list)
    sample_ids: list[torch.Tensor | None] = field(default_factory=list)
    items: Any = None
    random_state: RandomState = field(default_factory=dict)

    def begin(self, sample_ids: list[torch.Tensor | None]) -> None:
        """Forget the last step; the micro batches of this one hold these samples."""
        self.batches, self.items, self.sample_ids = [], None, sample_ids

    def add_batch(self, inputs: dict[str, Any], items: Any) -> None:
        """Keep hold of a micro batch, and of the number of labels that the step's loss is divided by."""
        if not self.batches:
            self.random_state = random_state(inputs["input_ids"].device)
        self.batches.append(dict(inputs))
        self.items = items

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Give what the step was computed on as tensors on the CPU; a micro batch's carry its number before a slash."""
        kept = {
            f"{number}/{key}": value
            for number, batch in enumerate(self.batches)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        kept |= {f"{RANDOM_STATE}{kind}": state for kind, state in self.random_state.items()}
        if self.items is not None:
            kept[ITEMS] = torch.as_tensor(self.items)
        return {key: value.detach().cpu().clone().contiguous() for key, value in kept.items()}


def hold_inquest(trainer: "PlanTrainer", diverged: Diverged, evidence: Evidence) -> None:
    """Compute the step again, say in the journal what it showed, and keep what makes it again. Every rank calls it.

    A disk that refuses costs the incident's files, never the verdict on the run.
    """
    if not evidence.batches:  # before the first step
        return
    trainer.watch.heartbeat.phase("saving")
    mine = examine(trainer, evidence.batches, evidence.items, evidence.random_state, diverged.code)
    number = mine.micro_batch or 0
    ids = evidence.sample_ids[number]
    told = {
        "autopsy": mine,
        "samples": _excerpts(trainer, evidence.batches[number]),
        "sample_ids": None if ids is None else ids.tolist(),
        "step": evidence.to_tensors(),
    }
    everyones: list[Any] = [told]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, told)
    weights = _trained_weights(trainer)
    if not trainer.watch.is_writer:
        for _ in weights:  # ZeRO's are put together from every rank's
            pass
        return
    try:
        _keep(trainer, diverged, everyones, weights)
    except StorageError as error:
        trainer.journal.append("notice", text=f"the incident is not kept: {error.problem}")
    finally:
        for _ in weights:
            pass


def _keep(
    trainer: "PlanTrainer", diverged: Diverged, everyones: list[dict[str, Any]], weights: Iterator[torch.Tensor]
) -> None:
    widest = max(everyones, key=lambda one: one["autopsy"].largest_output or 0.0)
    culprit = next((one for one in everyones if one["autopsy"].reproduced), widest)
    found: Autopsy = culprit["autopsy"]
    step, run = trainer.watch.step, trainer.run
    event = {
        "code": diverged.code,
        "step": diverged.step,
        "attempt": trainer.watch.attempt,
        "micro_batches": len(trainer.evidence.batches),
        "loss": None if step is None else step.loss,
        "grad_norm": None if step is None else step.grad_norm,
        "loss_scale": None if step is None else step.loss_scale,
    }
    seen = {key: culprit[key] for key in ("sample_ids", "samples")}
    folder = run.incidents / f"{1 + max((int(path.name) for path in run.incidents.glob('[0-9]*')), default=0):04d}"
    with storage_errors(folder):
        folder.mkdir(parents=True)
        for rank, one in enumerate(everyones):
            save_file(one["step"], folder / step_file(rank))
    write_json(folder / "autopsy.json", spell_non_finite(event | seen | found.to_json()))
    trainer.journal.append("autopsy", incident=folder.name, step=diverged.step, cause=found.cause, rank=found.rank)
    _keep_weights(trainer, folder, weights)


def _keep_weights(trainer: "PlanTrainer", folder: Path, weights: Iterator[torch.Tensor]) -> None:
    """Write the trained weights where there is room for them, and drop those of older incidents."""
    for older in sorted(trainer.run.incidents.glob("[0-9]*"))[:-KEPT_WEIGHTS]:
        weights_file(older).unlink(missing_ok=True)
    named = _trained(trainer)
    needed = sum(4 * shape.numel() for _, shape in named)
    free = shutil.disk_usage(folder).free
    if needed > free / 2:
        text = f"incidents/{folder.name} keeps no weights: they are {needed / 2**30:.1f} GiB of {free / 2**30:.1f} free"
        trainer.journal.append("notice", text=text)
        return
    try:
        with storage_errors(folder):
            write_tensors(weights_file(folder), named, weights)
            make_durable(folder)
    except StorageError:
        weights_file(folder).unlink(missing_ok=True)
        raise


def step_file(rank: int) -> str:
    """Name the file of what a rank computed on."""
    return f"step-rank{rank}.safetensors"


def weights_file(incident: Path) -> Path:
    """Name the file of an incident's weights."""
    return incident / "weights.safetensors"


def _trained(trainer: "PlanTrainer") -> list[tuple[str, torch.Size]]:
    """List the trained weights, each with its whole shape."""
    named = trainer.model.named_parameters()
    return [(name, whole_shape(weight)) for name, weight in named if weight.requires_grad]


def _trained_weights(trainer: "PlanTrainer") -> Iterator[torch.Tensor]:
    """Give each trained weight as fp32 on the CPU, one at a time. Every rank exhausts it: ZeRO-3's are divided."""
    for _, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            with whole(weight):
                yield weight.detach().cpu().float()


def _excerpts(trainer: "PlanTrainer", batch: dict[str, Any]) -> list[str]:
    """Give the beginning of each sample's text."""
    tokens = batch.get("input_ids")
    if tokens is None or trainer.processing_class is None:
        return []
    texts = trainer.processing_class.batch_decode(tokens[:, :EXCERPT], skip_special_tokens=True)
    return [json.loads(json.dumps(text[:EXCERPT])) for text in texts]
