"""When a loss has gone up so slowly that its last values never looked wrong: each was near those just before it.

A learning rate 300 times too high does that to a small Llama under AdamW with clipped gradients: the loss climbs from 6
to 125 within 90 steps, and median and spread of the last values climb with it. So a loss is also held against the best
that the run has known. Called by `mpt.training.health`.
"""

import math
from typing import Any

from mpt.running.ladder import LEVEL
from mpt.training.robust import Window
from mpt.training.verdict import Action, Code, Verdict

# Losses whose median is the level.
RECENT = 16
# A level this many times the lowest, and above the origin: no good place for a checkpoint, and where the way up begins.
UP = 1.5


class LossDrift:
    """N6, against the lowest level so far. A level is the median of the last 16 losses.

    It must also be above where the run began, because a loss near 0 triples without meaning anything. `vocabulary`
    bounds that from above: a run that runs away from its first update on has no good level of its own, but a model that
    knows nothing has ln(vocabulary), or its first loss where that is more. None: the loss is no cross entropy over one.
    """

    def __init__(self, *, factor: float, vocabulary: int | None) -> None:
        self.factor = factor
        self.uniform_loss = math.log(vocabulary) if vocabulary is not None and vocabulary > 1 else None
        self._recent = Window(RECENT)
        self._ceiling: float | None = None
        self._origin: float | None = None
        self._lowest = math.inf
        self._last_low = 0

    @property
    def is_up(self) -> bool:
        """Whether the level is so high that no checkpoint made now is known to be good."""
        return self._origin is not None and self._recent.median() > self._limit(UP)

    def judge(self, step: int, loss: float) -> Verdict | None:
        """Judge a finite loss; ROLL_BACK where the level is out of all proportion, None: nothing to say."""
        if self.uniform_loss is not None and self._ceiling is None:
            self._ceiling = max(self.uniform_loss, loss)
        self._recent.add(loss)
        if len(self._recent) < RECENT:
            if self._ceiling is None or loss <= UP * self._ceiling:
                self._last_low = step
            return None
        level = self._recent.median()
        if self._origin is None:
            self._origin = level if self._ceiling is None else min(level, self._ceiling)
            self._lowest = self._origin
        self._lowest = min(self._lowest, level)
        if loss <= self._limit(UP):
            self._last_low = step
        if level <= self._limit(self.factor):
            return None
        reason = (
            f"loss has drifted away: the last losses' median is {level:.4g}, "
            f"over {self.factor:g} x {self._lowest:.4g}, {self._whence()}"
        )
        return Verdict(Action.ROLL_BACK, Code.N6, LEVEL, level, reason, self._last_low + 1)

    def _limit(self, factor: float) -> float:
        """Give the level that is `factor` times the lowest, or where the run began if that is more."""
        assert self._origin is not None
        # A loss of 0 or below has no multiple that means anything.
        return max(factor * self._lowest, self._origin) if self._lowest > 0 else math.inf

    def _whence(self) -> str:
        if self._lowest != self._origin:
            return "the lowest that it was"
        return "what a model that knows nothing has" if self._origin == self.uniform_loss else "what it began with"

    def state(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "ceiling": self._ceiling,
            "origin": self._origin,
            "lowest": self._lowest if self._origin is not None else None,
            "last_low": self._last_low,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._recent.restart(state["recent"])
        self._ceiling, self._origin = state["ceiling"], state["origin"]
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
        self._last_low = state["last_low"]
