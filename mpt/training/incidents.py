"""What is kept of a step whose numbers went bad for good: the batch of the rank where they did, and the autopsy.

`incidents/0001/`: autopsy.json, and batch.safetensors with that rank's micro batch. Every rank takes part, and rank 0
writes; the batch is small, and the weights are those of no checkpoint, so they are not kept.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mpt.running.run_directory import write_json
from mpt.training.autopsy import EXCERPT, Autopsy, examine
from mpt.training.outcome import Diverged
from mpt.training.saving import storage_errors

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer


@dataclass(slots=True)
class Evidence:
    """The micro batches of the present step, by reference, and torch's random state before the first of them."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    items: Any = None
    random_state: torch.Tensor | None = None

    def begin(self) -> None:
        """Forget the last step."""
        self.batches, self.items = [], None
        self.random_state = torch.get_rng_state()

    def add_batch(self, inputs: dict[str, Any], items: Any) -> None:
        """Keep hold of a micro batch, and of the number of labels that the step's loss is divided by."""
        self.batches.append(dict(inputs))
        self.items = items


def hold_inquest(trainer: "PlanTrainer", diverged: Diverged, evidence: Evidence) -> None:
    """Compute the step again, say in the journal what it showed, and keep batch and findings. Every rank calls it."""
    mine = examine(trainer, evidence.batches, evidence.items, evidence.random_state)
    batch = evidence.batches[mine.micro_batch or 0] if evidence.batches else {}
    told = {"autopsy": mine, "batch": _on_cpu(batch), "samples": _excerpts(trainer, batch)}
    everyones: list[Any] = [told]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, told)
    if not trainer.watch.is_writer:
        return
    culprit = next((one for one in everyones if one["autopsy"].reproduced), everyones[0])
    found: Autopsy = culprit["autopsy"]
    number = 1 + max((int(path.name) for path in trainer.run.incidents.glob("[0-9]*")), default=0)
    folder = trainer.run.incidents / f"{number:04d}"
    event = {"code": diverged.code, "step": diverged.step, "attempt": trainer.watch.attempt}
    with storage_errors(folder):
        folder.mkdir(parents=True)
        if culprit["batch"]:
            save_file(culprit["batch"], folder / "batch.safetensors")
    write_json(folder / "autopsy.json", event | {"samples": culprit["samples"]} | found.to_json())
    trainer.journal.append("autopsy", incident=folder.name, step=diverged.step, cause=found.cause, rank=found.rank)


def _excerpts(trainer: "PlanTrainer", batch: dict[str, Any]) -> list[str]:
    """Give the beginning of each sample's text."""
    tokens = batch.get("input_ids")
    if tokens is None or trainer.processing_class is None:
        return []
    texts = trainer.processing_class.batch_decode(tokens[:, :EXCERPT], skip_special_tokens=True)
    return [json.loads(json.dumps(text[:EXCERPT])) for text in texts]


def _on_cpu(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    kept = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {key: value.detach().cpu().clone().contiguous() for key, value in kept.items()}
