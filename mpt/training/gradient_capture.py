"""The worker's side of a measured attempt: write the first step's gradients, and end after the steps asked for.

`mpt.training.trainer` calls it before its first optimizer step and after each one; without a wish
(`mpt.running.measured`) both calls do nothing.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mpt.running.measured import asked_measure, gradients_file
from mpt.running.run_directory import AttemptDirectory
from mpt.training.outcome import Stopped
from mpt.training.saving import storage_errors
from mpt.training.tensor_file import whole_shape, write_tensors

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

Named = list[tuple[str, torch.Tensor]]


class Measured(Stopped):
    """The steps to measure are made; nothing is saved. Every rank raises it at the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(step, "nothing: it was a measurement")


class Measurement:
    """What one attempt measures; nothing where nobody asked."""

    def __init__(self, attempt: AttemptDirectory, *, is_writer: bool) -> None:
        self._asked = asked_measure(attempt)
        self._file = gradients_file(attempt)
        self._is_writer = is_writer
        self._is_captured = self._asked is None or not self._asked.keeps_gradients

    def before_first_step(self, trainer: "PlanTrainer", grad_norm: float | None = None) -> None:
        """Write the gradients of the first step. Every rank calls this: ZeRO's are put together from all of them.

        `grad_norm` is the norm before clipping, where clipping and unscaling are done by now; None under DeepSpeed,
        which does both later. Raises StorageError where the disk refuses.
        """
        if self._is_captured:
            return
        self._is_captured = True
        named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        if trainer.is_deepspeed_enabled:
            engine = trainer.model_wrapped
            factor = 1 / float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
        else:
            factor = _unclip(grad_norm, trainer.args.max_grad_norm)
        gradients = _gradients(named, factor, by_deepspeed=trainer.is_deepspeed_enabled)
        if not self._is_writer:
            for _ in gradients:
                pass
            return
        with storage_errors(self._file):
            shapes = [(name, whole_shape(weight)) for name, weight in named]
            write_tensors(self._file, shapes, gradients, {"dropout": str(_dropout(trainer))})

    def after_step(self, trainer: "PlanTrainer") -> None:
        """End after the last step to measure, or where a stop was agreed on; raises Measured."""
        if self._asked is None:
            return
        step = trainer.state.global_step
        if step >= min(self._asked.steps, trainer.state.max_steps) or trainer.watch.stop_agreed:
            raise Measured(step)


def _gradients(named: Named, factor: float, *, by_deepspeed: bool) -> Iterator[torch.Tensor]:
    """Give each gradient times `factor`, as fp32 on the CPU; zeros where a parameter took no part."""
    for _, weight in named:
        gradient = weight.grad
        if by_deepspeed:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(weight)
        if gradient is None:
            yield torch.zeros(whole_shape(weight))
        else:
            yield gradient.detach().cpu().float() * factor


def _unclip(grad_norm: float | None, max_grad_norm: float) -> float:
    """Find the factor that undoes clipping: torch multiplies every gradient by max_norm / (norm + 1e-6) where that is
    below 1 (torch.nn.utils.clip_grad_norm_)."""
    if grad_norm is None or not max_grad_norm > 0:
        return 1.0
    return max(1.0, (grad_norm + 1e-6) / max_grad_norm)


def _dropout(trainer: "PlanTrainer") -> float:
    """Find the highest dropout rate that is trained with, by the keys of the configurations."""
    section = trainer.plan.recipe.lora
    rates = [0.0 if section is None else float(section.dropout)]
    for key, value in trainer.model.config.to_dict().items():
        if "drop" in key and isinstance(value, (int, float)):
            rates.append(float(value))
    return max(rates)
