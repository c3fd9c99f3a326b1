"""Watch a run's numbers: judge the loss, the gradient norm and the loss scale of each step, and say what to do.

Pure: plain floats in, a verdict out; no torch, no clock, no file. Every rank calls it with the same numbers and comes
to the same verdict, so it needs no communication. The rules stand in `mpt.training.lost_updates` (N0 to N3, N7),
`spikes` (N5, N6), `drift` (N6) and `dead_model`; this module knows their order. What is not finite is judged first and
enters no statistic.

    verdict = monitor.before_update(...)    after the last backward pass, before the optimizer step
    ...                                     apply, clip and apply, leave out, or end the attempt
    verdict = monitor.after_update(...)     unless the attempt has ended
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from mpt.training.dead_model import DeadModel
from mpt.training.drift import LossDrift
from mpt.training.lost_updates import LOWEST_SCALE, Idle, NonFinite, Overflows
from mpt.training.spikes import GradientSpikes, LossSpikes
from mpt.training.verdict import FINE, Action, Code, Verdict

__all__ = ["Action", "Code", "HealthMonitor", "Thresholds", "Verdict"]

# The update was left out, and before_update has said why.
LOST = (Code.N0, Code.N2, Code.N3)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The recipe's `health:` block, where each key has its meaning and its default: `Thresholds(**block.model_dump())`.

    This one has no defaults, so that they stand in one place.
    """

    spikes: bool
    window: int
    min_seen: int
    spike_sigmas: float
    max_clips: int
    settle_steps: int
    settle_sigmas: float
    runaway_factor: float
    max_bad_in_a_row: int
    max_bad_in_1000: int
    max_overflows_in_a_row: int
    max_overflow_share: float
    max_steps_without_update: int
    dead_after: int
    known_good_after: int


@dataclass(slots=True)
class _Step:
    """A step between its two verdicts."""

    number: int
    loss: float
    grad_norm: float | None
    loss_scale: float | None
    learning_rate: float
    code: Code | None = None


class HealthMonitor:
    """The health of one attempt; `state` and `restore` carry it over to the next one.

    `vocabulary` is the number of classes of the loss, None where the loss is no cross entropy over tokens. `is_scaled`:
    a loss scale is at work (fp16), so that an overflow of the gradient is no fault; one at `lowest_scale` or below is,
    and 0 leaves that to the scaler, which has a floor or is fixed. Losses are unscaled everywhere.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        *,
        vocabulary: int | None,
        is_scaled: bool,
        lowest_scale: float = LOWEST_SCALE,
    ) -> None:
        bounds = thresholds
        self.is_scaled = is_scaled
        self.known_good_after = bounds.known_good_after
        self._judges_spikes = bounds.spikes
        self._non_finite = NonFinite(max_in_a_row=bounds.max_bad_in_a_row, max_in_1000=bounds.max_bad_in_1000)
        self._overflows = Overflows(
            max_in_a_row=bounds.max_overflows_in_a_row,
            max_share=bounds.max_overflow_share,
            lowest_scale=lowest_scale,
        )
        self._idle = Idle(max_steps=bounds.max_steps_without_update)
        self._dead = DeadModel(dead_after=bounds.dead_after, vocabulary=vocabulary)
        self._norms = GradientSpikes(
            window=bounds.window, min_seen=bounds.min_seen, sigmas=bounds.spike_sigmas, max_clips=bounds.max_clips
        )
        self._losses = LossSpikes(
            window=bounds.window,
            min_seen=bounds.min_seen,
            sigmas=bounds.spike_sigmas,
            settle_steps=bounds.settle_steps,
            settle_sigmas=bounds.settle_sigmas,
            runaway_factor=bounds.runaway_factor,
        )
        self._drift = LossDrift(factor=bounds.runaway_factor, vocabulary=vocabulary)
        self._step: _Step | None = None
        self._is_clean = True
        self._healthy_steps = 0

    @property
    def is_healthy(self) -> bool:
        """Whether no event is open and the last step was clean. An overflow under a loss scale changes nothing here."""
        return self._is_clean and not self._losses.is_open

    @property
    def healthy_steps(self) -> int:
        """How many applied steps in a row were healthy, up to now."""
        return self._healthy_steps

    def norm_limit(self) -> float | None:
        """Give the gradient norm above which the next step's is a spike; None: none would be. For an engine that learns
        the norm within its own step, and clips there."""
        return self._norms.limit() if self._judges_spikes else None

    def before_update(
        self, step: int, loss: float, grad_norm: float | None, loss_scale: float | None, learning_rate: float
    ) -> Verdict:
        """Judge a step before its update. `grad_norm` None: it will be known after the update (DeepSpeed).

        The norm is that of the unscaled gradient before any clipping, and DeepSpeed's -1 counts as not finite.
        """
        self._step = _Step(step, loss, grad_norm, loss_scale, learning_rate)
        verdict = self._judge(self._step)
        self._step.code = verdict.code
        self._note_health(verdict)
        return verdict

    def after_update(
        self, step: int, *, applied: bool, grad_norm: float | None = None, limit: float | None = None
    ) -> Verdict:
        """Judge what came of the step: `applied` says whether the weights have changed, by whoever decided that.

        `grad_norm` is for a norm that was not known before, and `limit` is what the engine clipped it to where it was
        larger. Such a verdict comes too late to act on the update: SKIP says that it was left out, CLIP that it was
        clipped, N5 with APPLY that it was not, and ROLL_BACK ends the attempt.
        """
        now, self._step = self._step, None
        assert now is not None and now.number == step, f"after_update({step}) without its before_update"
        is_late = now.grad_norm is None
        if is_late:
            now.grad_norm = grad_norm
        found = self._judge_outcome(now, applied=applied, is_late=is_late, limit=limit)
        code = now.code if found.code is None else found.code
        if code not in (Code.N2, Code.N3):
            self._non_finite.clear_row()
        ends = [found if found.action is Action.ROLL_BACK else None]
        if self.is_scaled:
            ends.append(self._overflows.note(step, now.loss_scale, overflowed=code is Code.N0))
        ends.append(self._idle.note(step, applied=applied))
        if applied:
            ends.append(self._dead.note(step, now.loss, now.grad_norm, now.learning_rate))
        verdict = next((end for end in ends if end is not None), found)
        self._note_health(verdict)
        if now.code is None and verdict.code is None and applied:
            self._note_clean(now)
        return verdict

    def state(self) -> dict[str, Any]:
        """Give everything that later verdicts depend on, as JSON values. Ask between steps, after `after_update`."""
        return {
            "non_finite": self._non_finite.state(),
            "overflows": self._overflows.state(),
            "idle": self._idle.state(),
            "dead": self._dead.state(),
            "norms": self._norms.state(),
            "losses": self._losses.state(),
            "drift": self._drift.state(),
            "is_clean": self._is_clean,
            "healthy_steps": self._healthy_steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, which may have come from other thresholds: a shorter window keeps the newest values."""
        self._non_finite.restore(state["non_finite"])
        self._overflows.restore(state["overflows"])
        self._idle.restore(state["idle"])
        self._dead.restore(state["dead"])
        self._norms.restore(state["norms"])
        self._losses.restore(state["losses"])
        if "drift" in state:  # a checkpoint of an earlier mpt has none
            self._drift.restore(state["drift"])
        self._is_clean = state["is_clean"]
        self._healthy_steps = state["healthy_steps"]

    def _judge(self, now: _Step) -> Verdict:
        if not math.isfinite(now.loss):
            if self.is_scaled:
                reason = f"loss is {now.loss} in the forward pass, and the loss scale comes after it"
                return Verdict(Action.ROLL_BACK, Code.N2, "loss", now.loss, reason, now.number)
            return self._non_finite.note(now.number, Code.N2, "loss", now.loss, f"loss is {now.loss}")
        high_loss = self._judge_loss(now.number, now.loss) if self._judges_spikes else None
        if high_loss is not None and high_loss.action is Action.ROLL_BACK:
            return high_loss
        if now.grad_norm is not None and is_lost(now.grad_norm):
            lost = self._lose(now, now.grad_norm)
            return lost if high_loss is None else replace(lost, reason=f"{high_loss.reason}; {lost.reason}")
        high_norm = None if now.grad_norm is None else self._judge_norm(now.number, now.grad_norm)
        if high_norm is None or high_loss is None:
            return high_norm or high_loss or FINE
        # The event of the loss is the larger one; the clipping is done all the same.
        reason = f"{high_loss.reason}; {high_norm.reason}"
        return replace(high_loss, action=high_norm.action, clip_to=high_norm.clip_to, reason=reason)

    def _judge_outcome(self, now: _Step, *, applied: bool, is_late: bool, limit: float | None) -> Verdict:
        """Judge what was not known before the update."""
        norm = now.grad_norm
        if applied and (now.code is Code.N2 or (norm is not None and is_lost(norm))):
            what, value = ("loss", now.loss) if norm is None or not is_lost(norm) else ("grad_norm", norm)
            reason = f"{what} is {value}, and the update was applied: the weights are spoilt"
            return Verdict(Action.ROLL_BACK, Code.N2 if what == "loss" else Code.N3, what, value, reason, now.number)
        if now.code in LOST:
            return FINE
        if (is_late and norm is not None and is_lost(norm)) or (not applied and (self.is_scaled or is_late)):
            return self._lose(now, norm)
        if not is_late or norm is None:
            return FINE
        high = self._judge_norm(now.number, norm, limit)
        if high is None:
            return FINE
        return high if limit is not None else replace(high, action=Action.APPLY, clip_to=None)

    def _lose(self, now: _Step, norm: float | None) -> Verdict:
        """Judge a gradient that is not finite, by its norm or by an optimizer that refused it."""
        if not self.is_scaled:
            is_known = norm is not None and is_lost(norm)
            found = f"grad_norm is {norm}" if is_known else "the optimizer refused the gradient"
            return self._non_finite.note(now.number, Code.N3, "grad_norm", norm, found)
        scale = "" if now.loss_scale is None else f" of {now.loss_scale:g}"
        reason = f"a gradient is not finite at a loss scale{scale}: the update is left out"
        return Verdict(Action.SKIP, Code.N0, "grad_norm", norm, reason, now.number)

    def _judge_loss(self, step: int, loss: float) -> Verdict | None:
        """Judge a finite loss by its last values; while no event waits for its own judgement, by its best level too."""
        high, drifted = self._losses.judge(step, loss), self._drift.judge(step, loss)
        return high if self._losses.is_open or high is not None else drifted

    def _judge_norm(self, step: int, norm: float, clipped_to: float | None = None) -> Verdict | None:
        return self._norms.judge(step, norm, clipped_to) if self._judges_spikes and norm > 0 else None

    def _note_health(self, verdict: Verdict) -> None:
        if verdict.code not in (None, Code.N0):
            self._is_clean = False
            self._healthy_steps = 0

    def _note_clean(self, now: _Step) -> None:
        """Count an applied step without an event. A loss that is far up, or no gradient at all, is not clean yet."""
        is_high = self._losses.was_high or self._drift.is_up
        self._is_clean = not is_high and now.grad_norm != 0
        self._healthy_steps = self._healthy_steps + 1 if self.is_healthy else 0


def is_lost(grad_norm: float) -> bool:
    """Say whether a norm is not finite; DeepSpeed says -1 for that.

    >>> [is_lost(norm) for norm in (0.0, 1.5, -1.0, math.nan, math.inf)]
    [False, False, True, True, True]
    """
    return not (math.isfinite(grad_norm) and grad_norm >= 0)
