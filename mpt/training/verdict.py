"""What the watch over a run's numbers can say about a step: the event, and what to do about it.

Only words: the rules are in `mpt.training.lost_updates`, `spikes` and `dead_model`, and `mpt.training.health` asks
them.
"""

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What to do with a step's update."""

    APPLY = "apply"
    SKIP = "skip"
    """Leave this update out, and go on."""
    CLIP = "clip"
    """Scale the gradient down to the norm `clip_to`, then apply."""
    ROLL_BACK = "roll_back"
    """End the attempt; nothing of this step's update may be applied where it has not been already."""


class Code(StrEnum):
    """The event behind a verdict."""

    N0 = "N0"
    """A gradient that is not finite under a loss scale: the scale finds its level."""
    N1 = "N1"
    """The loss scale can give no more room."""
    N2 = "N2"
    """The forward pass gave a loss that is not finite."""
    N3 = "N3"
    """A gradient that is not finite, and no loss scale to blame."""
    N4 = "N4"
    """A weight or an optimizer state that is not finite. Found where a checkpoint is saved, never by the numbers."""
    N5 = "N5"
    """A gradient norm far above the last ones."""
    N6 = "N6"
    """A loss far above the last ones."""
    N7 = "N7"
    """No update for too long."""
    DEAD = "dead"
    """Nothing is learnt any more, and every number is finite."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and why. `code` None: nothing happened.

    `what` is "loss", "loss level", "grad_norm", "loss_scale" or "update"; `value` is that number, which may not be
    finite (for "update": how many were left out; None: unknown). `onset` is the first step of the event. `clip_to` goes
    with CLIP alone.
    """

    action: Action
    code: Code | None = None
    what: str | None = None
    value: float | None = None
    reason: str = ""
    onset: int | None = None
    clip_to: float | None = None


FINE = Verdict(Action.APPLY)
