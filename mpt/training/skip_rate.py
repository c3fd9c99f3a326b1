"""When skipped steps are too many: fp16 that overflows again and again learns from fewer steps than it pays for.

Pure; `mpt.training.step_watch` tells it of each step and journals what it says.
"""

from collections import deque
from dataclasses import dataclass, field

# After the scale has settled, overflows are expected about once in every few hundred or thousand steps
# (torch.amp.GradScaler's documentation); one step in ten is far off that, and a tenth of the work thrown away.
THRESHOLD = 0.10
WINDOW = 100
MIN_SEEN = 20
# A first scale of 2^32, DeepSpeed's highest default, comes down to 1 in 32 halvings, and hysteresis adds some. Skipping
# for longer than that is no settling.
MAX_SETTLING = 40

REMEDY = (
    "Ask for `precision: bf16` where the devices compute it natively; else lower training.learning_rate, or compute "
    "the layers that overflow in fp32 through precision.layers."
)


@dataclass(frozen=True, slots=True)
class SkipAlarm:
    """Too many steps were skipped: `share` (0 to 1) of the last `window` steps."""

    share: float
    window: int


@dataclass(slots=True)
class SkipRate:
    """The share of skipped steps among the last ones; speaks once an episode, and again only after a quiet time."""

    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _settling: int = 0
    _is_settled: bool = False
    _is_alarmed: bool = False

    def note(self, *, skipped: bool) -> SkipAlarm | None:
        """Count a step; give the alarm where more than THRESHOLD of the last WINDOW steps were skipped.

        It takes MIN_SEEN steps at least. Not counted are the skips before the attempt's first clean step, up to
        MAX_SETTLING of them: a first scale that was too high comes down that way. Armed again once the share is below
        half of THRESHOLD.
        """
        if not self._is_settled:
            self._settling += 1
            self._is_settled = not skipped or self._settling > MAX_SETTLING
            if not self._is_settled:
                return None
        self._recent.append(skipped)
        seen = len(self._recent)
        share = sum(self._recent) / seen
        if share < THRESHOLD / 2:
            self._is_alarmed = False
        if self._is_alarmed or seen < MIN_SEEN or share <= THRESHOLD:
            return None
        self._is_alarmed = True
        return SkipAlarm(share, seen)
