"""When a finite loss or gradient norm is far above the last ones: N5 and N6.

Both are judged in robust standard deviations over the last accepted values. A value that was rejected never enters its
own yardstick: with it there, a spike would hide the next one. Called by `mpt.training.health`.
"""

import math
from collections import deque
from typing import Any

from mpt.training.robust import Window, middle
from mpt.training.verdict import Action, Code, Verdict

# A series that hardly moves must not make a spike of everything: sigma is taken as 0.5 % of the median at least.
FLOOR = 0.005
# A loss counts as high only where it is 10 % above the median too.
LOSS_RISE = 0.10
# Three high ones of five open an event. With one of one, losses of heavy tails (Student t, 3 degrees of freedom) make
# 13 false alarms in 10 000 steps, and with three of five none (synthetic independent series).
HIGH, OF = 3, 5
# The last losses, whose median says whether an event has passed.
RECENT = 16
# Steps in a row above `runaway_factor` medians that end the attempt at once.
RUNAWAY_STEPS = 8


class GradientSpikes:
    """N5, on the logarithm of the norm: norms are skewed, and raw ones at a lognormal sigma of 0.6 give 22 false alarms
    in 10 000 steps where their logarithms give none."""

    def __init__(self, *, window: int, min_seen: int, sigmas: float, max_clips: int) -> None:
        self.min_seen = min_seen
        self.sigmas = sigmas
        self.max_clips = max_clips
        self._accepted = Window(window)
        self._rejected: list[float] = []
        self._onset = 0

    def limit(self) -> float | None:
        """Give the norm above which the next one is a spike; None where none would be clipped: too few were seen, or
        the next one is taken for the new level."""
        if len(self._accepted) < self.min_seen or len(self._rejected) >= self.max_clips:
            return None
        return math.exp(self._accepted.median() + self.sigmas * max(self._accepted.sigma(), FLOOR))

    def judge(self, step: int, norm: float, clipped_to: float | None = None) -> Verdict | None:
        """Judge a finite norm above 0; None: nothing to say. CLIP, or APPLY where a new level is accepted.

        CLIP is to the median, unless the gradient is `clipped_to` another norm already.
        """
        value = math.log(norm)
        if len(self._accepted) < self.min_seen:
            self._accepted.add(value)
            return None
        median = self._accepted.median()
        rise = value - median
        # Sigma is never below its floor, and most values are not worth working it out for.
        sigma = FLOOR if rise <= self.sigmas * FLOOR else max(self._accepted.sigma(), FLOOR)
        if rise <= self.sigmas * sigma:
            self._accepted.add(value)
            self._rejected.clear()
            return None
        if not self._rejected:
            self._onset = step
        self._rejected.append(value)
        clip_to, row = math.exp(median), len(self._rejected)
        high = f"grad_norm is {norm:.4g}, {rise / sigma:.1f} sigma above the median {clip_to:.4g}"
        if row > self.max_clips:
            self._accepted.restart(self._rejected)
            self._rejected.clear()
            reason = f"{high}, for {row} steps: this is the new level"
            return Verdict(Action.APPLY, Code.N5, "grad_norm", norm, reason, self._onset)
        if clipped_to is not None:
            reason = f"{high}: clipped to {clipped_to:.4g}"
            return Verdict(Action.CLIP, Code.N5, "grad_norm", norm, reason, self._onset, clipped_to)
        return Verdict(Action.CLIP, Code.N5, "grad_norm", norm, f"{high}: clipped to it", self._onset, clip_to)

    def state(self) -> dict[str, Any]:
        return {"accepted": list(self._accepted), "rejected": list(self._rejected), "onset": self._onset}

    def restore(self, state: dict[str, Any]) -> None:
        self._accepted.restart(state["accepted"])
        self._rejected, self._onset = list(state["rejected"]), state["onset"]


class LossSpikes:
    """N6: an event opens, and is judged when it has had time to pass, or at once where the loss runs away."""

    def __init__(
        self,
        *,
        window: int,
        min_seen: int,
        sigmas: float,
        settle_steps: int,
        settle_sigmas: float,
        runaway_factor: float,
    ) -> None:
        self.min_seen = min_seen
        self.sigmas = sigmas
        self.settle_steps = settle_steps
        self.settle_sigmas = settle_sigmas
        self.runaway_factor = runaway_factor
        self.was_high = False
        """Whether the last loss was far up, though it may not have opened an event."""
        self._accepted = Window(window)
        self._high_steps: deque[int | None] = deque(maxlen=OF)
        self._runaway = 0
        self._event: dict[str, float] | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def is_open(self) -> bool:
        """Whether an event waits for its judgement."""
        return self._event is not None

    def judge(self, step: int, loss: float) -> Verdict | None:
        """Judge a finite loss; None: nothing to say. APPLY where an event opens or closes, or ROLL_BACK."""
        if self._event is not None:
            return self._follow(self._event, step, loss)
        if len(self._accepted) < self.min_seen:
            self._accepted.add(loss)
            self.was_high = False
            return None
        median = self._accepted.median()
        rise = loss - median
        sigma = self._sigma_if_high(rise, median)
        self.was_high = sigma is not None
        self._high_steps.append(step if self.was_high else None)
        self._count_runaway(rise, median)
        if sigma is None:
            self._accepted.add(loss)
            return None
        high = [one for one in self._high_steps if one is not None]
        if len(high) < HIGH:
            return None
        self._event = {"opened": step, "onset": high[0], "median": median, "sigma": sigma}
        self._recent.append(loss)
        reason = (
            f"loss is {loss:.4g}, far above the median {median:.4g} in {len(high)} of {len(self._high_steps)} steps: "
            f"judged at step {step + self.settle_steps}"
        )
        return Verdict(Action.APPLY, Code.N6, "loss", loss, reason, high[0])

    def _follow(self, event: dict[str, float], step: int, loss: float) -> Verdict | None:
        """Wait for the end of an open event."""
        median, sigma, onset = event["median"], event["sigma"], int(event["onset"])
        self._recent.append(loss)
        self._count_runaway(loss - median, median)
        if self._runaway >= RUNAWAY_STEPS:
            reason = (
                f"loss is {loss:.4g}, over {self.runaway_factor:g} x its median {median:.4g} for {self._runaway} steps"
            )
            return Verdict(Action.ROLL_BACK, Code.N6, "loss", loss, reason, onset)
        if step < event["opened"] + self.settle_steps:
            return None
        level = middle(sorted(self._recent))
        above = f"the last losses' median is {level:.4g}, and it was {median:.4g} before step {onset}"
        if level - median > self.settle_sigmas * sigma:
            return Verdict(Action.ROLL_BACK, Code.N6, "loss", loss, f"loss stays up: {above}", onset)
        self._accepted.restart(self._recent)
        self._recent.clear()
        self._high_steps.clear()
        self._runaway, self._event, self.was_high = 0, None, False
        return Verdict(Action.APPLY, Code.N6, "loss", loss, f"the spike has passed: {above}", onset)

    def _sigma_if_high(self, rise: float, median: float) -> float | None:
        """Give the spread of the accepted losses where a loss that much above their median is high, else None."""
        if rise <= LOSS_RISE * abs(median):
            return None
        sigma = max(self._accepted.sigma(), FLOOR * abs(median))
        return sigma if rise > self.sigmas * sigma else None

    def _count_runaway(self, rise: float, median: float) -> None:
        is_running = rise > (self.runaway_factor - 1) * abs(median)
        self._runaway = self._runaway + 1 if is_running else 0

    def state(self) -> dict[str, Any]:
        return {
            "was_high": self.was_high,
            "accepted": list(self._accepted),
            "high_steps": list(self._high_steps),
            "runaway": self._runaway,
            "event": None if self._event is None else dict(self._event),
            "recent": list(self._recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.was_high = state["was_high"]
        self._accepted.restart(state["accepted"])
        self._high_steps = deque(state["high_steps"], maxlen=OF)
        self._runaway = state["runaway"]
        self._event = None if state["event"] is None else dict(state["event"])
        self._recent = deque(state["recent"], maxlen=RECENT)
