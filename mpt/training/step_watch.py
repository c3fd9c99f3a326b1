"""What a step amounts to over all ranks: loss, tokens, gradient norm, whether to stop. One collective and one host
synchronisation a step, made after the last backward pass and before the optimizer step.

Bad numbers stop here, before they reach the weights: a NaN gradient makes every parameter NaN in one AdamW step.
"""

import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal
from mpt.training.outcome import Diverged, StopRequest
from mpt.training.skip_rate import REMEDY, SkipRate

# Skipped steps in a row after which a fixed loss scale is judged too high for good. A dynamic one has by then been
# halved from 2^16 to below 1, or to the floor that it was given, and is judged by that.
MAX_SKIPS_AT_STATIC_SCALE = 20


@dataclass(slots=True)
class Step:
    """One optimizer step as it went; `loss` is the mean over the global batch, `tokens` counts no padding."""

    number: int
    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float | None = None
    loss_scale: float | None = None
    is_at_floor: bool | None = None
    """Whether an overflow could not lower the loss scale any more; None where it has no floor."""
    skipped: bool = False


class StepWatch:
    """Collects a step's micro batches, agrees on them with the other ranks, and writes the metrics row (rank 0)."""

    def __init__(
        self,
        journal: Journal,
        metrics: Path,
        *,
        attempt: int,
        rank: int,
        stop: StopRequest,
        device: torch.device,
        heartbeat: Heartbeat,
    ) -> None:
        self.journal = journal
        self.attempt = attempt
        self.is_writer = rank == 0
        self.stop = stop
        self.device = device
        self.heartbeat = heartbeat
        self.stop_agreed = False
        self.step: Step | None = None
        self._metrics = _open_metrics(metrics) if self.is_writer else -1
        self._losses: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor | int] = []
        self._number = 0
        self._learning_rate = 0.0
        self._skips = 0
        self._skip_rate = SkipRate()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def begin(self, number: int, learning_rate: float) -> None:
        """Start step `number` (from 1), before its data is fetched; `learning_rate` is the one it will use."""
        self.heartbeat.step(number)
        self._losses, self._tokens = [], []
        self._number, self._learning_rate = number, learning_rate
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def add_batch(self, inputs: dict[str, Any]) -> None:
        """Count a micro batch's tokens, padding excluded."""
        self.heartbeat.beat()
        mask = inputs.get("attention_mask")
        self._tokens.append(mask.sum() if mask is not None else inputs["input_ids"].numel())

    def add_loss(self, loss: torch.Tensor) -> None:
        """Note a micro batch's share of the step's loss."""
        self._losses.append(loss.detach())

    def agree(
        self,
        grad_norm: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        is_at_floor: torch.Tensor | None = None,
    ) -> Step:
        """Sum over ranks, and judge. `grad_norm`, `loss_scale` and `is_at_floor` are the same on every rank already.

        Raises Diverged for a non-finite loss, and for a non-finite gradient norm without a loss scale to blame it on.
        """
        asked_by = self.stop.by()
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        loss = torch.stack(self._losses).to(kind).sum()
        tokens = sum(self._tokens[1:], self._tokens[0])
        counted = torch.as_tensor(tokens, dtype=kind, device=self.device)
        wish = torch.as_tensor(float(asked_by is not None), dtype=kind, device=self.device)
        shared = torch.stack([loss, counted, wish])
        world = 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            world = dist.get_world_size()
            dist.all_reduce(shared)
        nothing = torch.full((), math.nan, dtype=kind, device=self.device)
        known = (grad_norm, loss_scale, is_at_floor)
        local = [nothing if value is None else value.detach().to(kind) for value in known]
        total_loss, all_tokens, wishes, norm, scale, floored = torch.cat([shared, torch.stack(local)]).tolist()
        step = Step(self._number, total_loss / world, round(all_tokens), self._learning_rate)
        step.loss_scale = None if loss_scale is None else scale
        step.is_at_floor = None if is_at_floor is None else bool(floored)
        self.step = step
        if wishes and not self.stop_agreed:
            self.stop_agreed = True
            if self.is_writer:
                self.journal.append("stop_requested", step=step.number, by=asked_by or "another rank")
        if not math.isfinite(step.loss):
            self.fail("loss", step.loss)
        if grad_norm is not None:
            self.judge_norm(norm, can_skip=loss_scale is not None)
        return step

    def judge_norm(self, norm: float, *, can_skip: bool, applied: bool | None = None) -> None:
        """Note the gradient norm. A non-finite one is a skipped step under a loss scale, else Diverged is raised."""
        assert self.step is not None
        self.step.grad_norm = norm
        if math.isfinite(norm) and applied is not False:
            self._skips = 0
            return
        if not can_skip:
            self.fail("grad_norm", norm)
        self.step.skipped = True
        self._skips += 1
        if self.is_writer:
            self.journal.append(
                "step_skipped",
                step=self.step.number,
                reason="overflow: a gradient is not finite at this loss scale",
                loss_scale=self.step.loss_scale,
            )

    def judge_scale(self, *, is_static: bool) -> None:
        """Raise Diverged where overflow goes on though the loss scale can give no more room."""
        assert self.step is not None
        scale = self.step.loss_scale
        if not self.step.skipped or scale is None:
            return
        if is_static:
            is_hopeless = self._skips >= MAX_SKIPS_AT_STATIC_SCALE
        elif self.step.is_at_floor is not None:
            is_hopeless = self.step.is_at_floor  # DeepSpeed's "Current loss scale already at minimum"
        else:
            is_hopeless = scale < 1
        if is_hopeless:
            self.fail("loss_scale", scale)

    def fail(self, what: str, value: float) -> None:
        """Journal what is not finite and end the run."""
        if self.is_writer:
            self.journal.append("non_finite", step=self._number, what=what, value=value)
        raise Diverged(self._number, what, value)

    def write_step(self) -> None:
        """Write the metrics row of the step that has just ended."""
        assert self.step is not None
        seconds = time.perf_counter() - self._began
        step = self.step
        self.write_row(
            step=step.number,
            attempt=self.attempt,
            loss=step.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            loss_scale=step.loss_scale,
            skipped=step.skipped,
            tokens=step.tokens,
            tokens_per_second=step.tokens / seconds,
            step_time_s=seconds,
            cpu_time_s=time.process_time() - self._cpu_began,
            memory_gib=memory_high_water_gib(self.device),
        )
        if step.loss_scale is not None:
            self._watch_skips(step)

    def _watch_skips(self, step: Step) -> None:
        """Journal an alarm where too many of the last steps were skipped."""
        alarm = self._skip_rate.note(skipped=step.skipped)
        if alarm is not None and self.is_writer:
            self.journal.append(
                "alarm", step=step.number, what="skip_rate", share=alarm.share, window=alarm.window, remedy=REMEDY
            )

    def write_row(self, **row: Any) -> None:
        """Append one line in one write; rank 0 only."""
        if self.is_writer:
            plain = {key: _spelt(value) for key, value in row.items()}
            os.write(self._metrics, (json.dumps(plain, allow_nan=False) + "\n").encode())


def memory_high_water_gib(device: torch.device) -> float:
    """Measure the most memory so far: torch's allocator on a GPU, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def _open_metrics(path: Path) -> int:
    """Open for appending, on a new line where a kill tore the last one."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def _spelt(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
