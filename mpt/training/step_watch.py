"""What a step amounts to over all ranks: loss, tokens, gradient norm, whether to stop. One collective and one host
synchronisation a step, made after the last backward pass and before the optimizer step.

Bad numbers are judged here (`mpt.training.health`) before they reach the weights: a NaN gradient makes every parameter
NaN in one AdamW step.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal
from mpt.training.health import Action, Code, HealthMonitor, Verdict
from mpt.training.outcome import Diverged, StopRequest
from mpt.training.skip_rate import REMEDY, SkipRate


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
    clip_to: float | None = None
    """The norm to which the gradient is scaled down; None: as it is."""


class StepWatch:
    """Collects a step's micro batches, agrees on them with the other ranks, and writes the metrics row (rank 0)."""

    def __init__(
        self,
        journal: Journal,
        metrics: Path,
        health: HealthMonitor,
        *,
        attempt: int,
        rank: int,
        stop: StopRequest,
        device: torch.device,
        heartbeat: Heartbeat,
    ) -> None:
        self.journal = journal
        self.health = health
        self.attempt = attempt
        self.is_writer = rank == 0
        self.stop = stop
        self.device = device
        self.heartbeat = heartbeat
        self.stop_agreed = False
        self.blame: Callable[[], str | None] = lambda: None
        """Names the weights whose gradients are not finite at the moment, where somebody can."""
        self.step: Step | None = None
        self._metrics = _open_metrics(metrics) if self.is_writer else -1
        self._losses: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor | int] = []
        self._number = 0
        self._learning_rate = 0.0
        self._skip_rate = SkipRate()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def go_on_from(self, number: int) -> None:
        """Say which step was the last one before this attempt: what is found before its first step is of that one."""
        self._number = number

    def begin(self, number: int, learning_rate: float) -> None:
        """Start step `number` (from 1), before its data is fetched; `learning_rate` is the one it will use."""
        self.heartbeat.step(number)
        self._losses, self._tokens = [], []
        self._number, self._learning_rate = number, learning_rate
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def add_batch(self, inputs: dict[str, Any], sample_tokens: torch.Tensor | None = None) -> None:
        """Count a micro batch's tokens, padding excluded: those of its samples, or by its mask."""
        self.heartbeat.beat()
        mask = inputs.get("attention_mask") if sample_tokens is None else sample_tokens
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

        The health monitor judges the sums, on every rank alike. Raises Diverged where the run must go back.
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
        step.grad_norm = None if grad_norm is None else norm
        self._heed(
            self.health.before_update(step.number, step.loss, step.grad_norm, step.loss_scale, step.learning_rate)
        )
        if step.skipped and step.is_at_floor:
            self.give_up_scale()
        return step

    def conclude(self, *, applied: bool, grad_norm: float | None = None, limit: float | None = None) -> None:
        """Judge what came of the step: whether the weights have changed, and a norm that was not known before, which
        the engine has clipped to `limit`.

        Raises Diverged where the run must go back.
        """
        assert self.step is not None
        if grad_norm is not None:
            self.step.grad_norm = grad_norm
        self.step.skipped = not applied
        self._heed(
            self.health.after_update(self.step.number, applied=applied, grad_norm=grad_norm, limit=limit), late=True
        )

    def give_up_scale(self) -> None:
        """End the attempt: an overflow at the floor of the loss scale, which can give no more room."""
        assert self.step is not None
        scale = self.step.loss_scale
        reason = f"a gradient overflows at the lowest loss scale that is allowed, {scale:g}"
        self.roll_back(Verdict(Action.ROLL_BACK, Code.N1, "loss_scale", scale, reason, self.step.number))

    def roll_back(self, verdict: Verdict) -> NoReturn:
        """Journal why nothing of this step may stay, and end the attempt. Every rank comes to it."""
        self._journal(verdict)
        raise Diverged(
            self._number,
            str(verdict.what),
            math.nan if verdict.value is None else verdict.value,
            code=str(verdict.code),
            reason=verdict.reason,
            onset=self._number if verdict.onset is None else verdict.onset,
        )

    def _heed(self, verdict: Verdict, *, late: bool = False) -> None:
        """Do what a verdict says, and journal it where it says something."""
        assert self.step is not None
        if verdict.code is Code.N3 and (culprits := self.blame()) is not None:
            verdict = replace(verdict, reason=f"{verdict.reason}; not finite: {culprits}")
        if verdict.action is Action.ROLL_BACK:
            self.roll_back(verdict)
        if not late:
            self.step.skipped = verdict.action is Action.SKIP
            self.step.clip_to = verdict.clip_to
        if verdict.code is Code.N0:
            if self.is_writer:
                self.journal.append(
                    "step_skipped",
                    step=self.step.number,
                    reason="overflow: a gradient is not finite at this loss scale",
                    loss_scale=self.step.loss_scale,
                )
        elif verdict.code is not None:
            self._journal(verdict)

    def _journal(self, verdict: Verdict) -> None:
        if self.is_writer:
            told = {"code": verdict.code, "action": verdict.action, "what": verdict.what, "value": verdict.value}
            self.journal.append("health", step=self._number, **told, reason=verdict.reason, onset=verdict.onset)

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
