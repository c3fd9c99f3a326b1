"""When updates that were left out are too many: N0 to N3, and N7.

A number that is not finite never reaches the weights, so one such step costs an update and no more. Many of them mean
that something is wrong for good. Called by `mpt.training.health`.
"""

import math
from typing import Any

from mpt.training.verdict import Action, Code, Verdict

# Steps over which skips are counted: those that are not finite, and those of the loss scale.
LONG = 1000
SHORT = 200
# An overflow at this loss scale can't be helped by a lower one: gradients would only get smaller than they are.
LOWEST_SCALE = 1.0
# The first loss scale of torch and DeepSpeed is 2^16.
USUAL_EXPONENT = 16


class NonFinite:
    """N2 and N3: a loss or a gradient that is not finite, and no loss scale that explains it."""

    def __init__(self, *, max_in_a_row: int, max_in_1000: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.max_in_1000 = max_in_1000
        self._in_a_row = 0
        self._steps: list[int] = []

    def note(self, step: int, code: Code, what: str, value: float | None, found: str) -> Verdict:
        """Count a bad step, `found` in words: SKIP, or ROLL_BACK where there are too many."""
        self._in_a_row += 1
        self._steps = [one for one in self._steps if one > step - LONG] + [step]
        onset = step - self._in_a_row + 1
        if self._in_a_row >= self.max_in_a_row:
            reason = f"{found}, for {self._in_a_row} steps in a row"
            return Verdict(Action.ROLL_BACK, code, what, value, reason, onset)
        if len(self._steps) > self.max_in_1000:
            reason = f"{found}, and {len(self._steps)} of the last {LONG} steps were not finite"
            return Verdict(Action.ROLL_BACK, code, what, value, reason, self._steps[0])
        reason = f"{found}: the update is left out ({self._in_a_row} in a row; {self.max_in_a_row} end the attempt)"
        return Verdict(Action.SKIP, code, what, value, reason, onset)

    def clear_row(self) -> None:
        """Note that a step was finite."""
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row, "steps": list(self._steps)}

    def restore(self, state: dict[str, Any]) -> None:
        self._in_a_row, self._steps = state["in_a_row"], list(state["steps"])


class Overflows:
    """N1: under a loss scale overflows are expected, until the scale has come down as far as it can."""

    def __init__(self, *, max_in_a_row: int, max_share: float, lowest_scale: float = LOWEST_SCALE) -> None:
        self.max_in_a_row = max_in_a_row
        self.max_share = max_share
        self.lowest_scale = lowest_scale
        self._seen = 0
        self._in_a_row = 0
        self._allowed = max_in_a_row
        self._onset = 0
        self._steps: list[int] = []

    def note(self, step: int, scale: float | None, *, overflowed: bool) -> Verdict | None:
        """Count a step made at `scale`; ROLL_BACK where the scale has collapsed."""
        self._seen += 1
        if not overflowed:
            self._in_a_row = 0
            return None
        if self._in_a_row == 0:
            self._onset = step
            self._allowed = self.max_in_a_row + _extra_halvings(scale)
        self._in_a_row += 1
        self._steps = [one for one in self._steps if one > step - SHORT] + [step]
        share = len(self._steps) / SHORT
        if scale is not None and scale <= self.lowest_scale:
            reason = f"a gradient overflows at a loss scale of {scale:g}"
            return Verdict(Action.ROLL_BACK, Code.N1, "loss_scale", scale, reason, self._onset)
        if self._in_a_row >= self._allowed:
            reason = f"gradients overflow for {self._in_a_row} steps in a row"
            return Verdict(Action.ROLL_BACK, Code.N1, "loss_scale", scale, reason, self._onset)
        if self._seen >= SHORT and share > self.max_share:
            reason = f"gradients overflowed in {share:.0%} of the last {SHORT} steps"
            return Verdict(Action.ROLL_BACK, Code.N1, "loss_scale", scale, reason, self._steps[0])
        return None

    def state(self) -> dict[str, Any]:
        return {
            "seen": self._seen,
            "in_a_row": self._in_a_row,
            "allowed": self._allowed,
            "onset": self._onset,
            "steps": list(self._steps),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._seen, self._in_a_row, self._allowed = state["seen"], state["in_a_row"], state["allowed"]
        self._onset, self._steps = state["onset"], list(state["steps"])


class Idle:
    """N7: no update for too long, whatever the cause; DeepSpeed's stage 0 skips for ever without a word."""

    def __init__(self, *, max_steps: int) -> None:
        self.max_steps = max_steps
        self._in_a_row = 0

    def note(self, step: int, *, applied: bool) -> Verdict | None:
        """Count a step; ROLL_BACK where the last `max_steps` ones changed nothing."""
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if self._in_a_row < self.max_steps:
            return None
        onset = step - self._in_a_row + 1
        reason = f"no update was applied in {self._in_a_row} steps"
        return Verdict(Action.ROLL_BACK, Code.N7, "update", float(self._in_a_row), reason, onset)

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]


def _extra_halvings(scale: float | None) -> int:
    """Count the halvings that a scale needs beyond the usual first one to come down to 1.

    >>> _extra_halvings(65536.0), _extra_halvings(2.0**32), _extra_halvings(1024.0), _extra_halvings(None)
    (0, 16, 0, 0)
    """
    return 0 if scale is None else max(0, math.ceil(math.log2(scale)) - USUAL_EXPONENT)
