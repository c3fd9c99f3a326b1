"""When a model has died without a number that is not finite: a learning rate of 1e6 does that to a small Llama.

Either every gradient is exactly 0, or the loss rests at ln(vocabulary), what a model has that gives each token the same
probability. Called by `mpt.training.health`.
"""

import math
from typing import Any

from mpt.training.verdict import Action, Code, Verdict

# How near to ln(vocabulary) a loss rests, and how far below it a model has learnt something.
NEAR = 0.001
BELOW = 0.01
# A model that has never been lower may just begin slowly, and gets this many times as long.
PATIENCE_AT_START = 5


class DeadModel:
    """Counts applied steps at a learning rate above 0, and no others: in those a live model moves."""

    def __init__(self, *, dead_after: int, vocabulary: int | None) -> None:
        self.dead_after = dead_after
        self.uniform_loss = math.log(vocabulary) if vocabulary is not None and vocabulary > 1 else None
        self._zeros = 0
        self._zero_onset = 0
        self._rests = 0
        self._rest_onset = 0
        self._was_lower = False

    def note(self, step: int, loss: float, grad_norm: float | None, learning_rate: float) -> Verdict | None:
        """Count an applied step; ROLL_BACK where the model is dead."""
        if learning_rate <= 0:
            return None
        return self._note_norm(step, grad_norm) or self._note_loss(step, loss)

    def _note_norm(self, step: int, grad_norm: float | None) -> Verdict | None:
        if grad_norm is None:
            return None
        if grad_norm != 0:
            self._zeros = 0
            return None
        if self._zeros == 0:
            self._zero_onset = step
        self._zeros += 1
        if self._zeros < self.dead_after:
            return None
        reason = f"every gradient is exactly 0, for {self._zeros} steps: nothing is learnt any more"
        return Verdict(Action.ROLL_BACK, Code.DEAD, "grad_norm", 0.0, reason, self._zero_onset)

    def _note_loss(self, step: int, loss: float) -> Verdict | None:
        if self.uniform_loss is None:
            return None
        self._was_lower = self._was_lower or loss < self.uniform_loss * (1 - BELOW)
        if abs(loss - self.uniform_loss) > NEAR * self.uniform_loss:
            self._rests = 0
            return None
        if self._rests == 0:
            self._rest_onset = step
        self._rests += 1
        patience = self.dead_after * (1 if self._was_lower else PATIENCE_AT_START)
        if self._rests < patience:
            return None
        reason = (
            f"loss rests at {loss:.5g}, what a model that knows nothing has (ln of the vocabulary is "
            f"{self.uniform_loss:.5g}), for {self._rests} steps"
        )
        return Verdict(Action.ROLL_BACK, Code.DEAD, "loss", loss, reason, self._rest_onset)

    def state(self) -> dict[str, Any]:
        return {
            "zeros": self._zeros,
            "zero_onset": self._zero_onset,
            "rests": self._rests,
            "rest_onset": self._rest_onset,
            "was_lower": self._was_lower,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._zeros, self._zero_onset = state["zeros"], state["zero_onset"]
        self._rests, self._rest_onset = state["rests"], state["rest_onset"]
        self._was_lower = state["was_lower"]
