"""When a silent rank is taken to hang: limits that know what it is doing, and learn from what was seen in this run.

The supervisor measures silence with its own monotonic clock. Pure but for `HangWatch.look`, which reads heartbeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpt.recipe.schema import RestartSection
from mpt.running.heartbeat import Beat, read_beat
from mpt.running.run_directory import AttemptDirectory

LOADING = ("imports", "data", "model", "setup", "compiling")
# A rank may take this many times as long as the slowest before it, as in NVIDIA's resiliency extension (safety_factor).
TIMES_SEEN = 5.0
# Between two looks the supervisor itself may have stood still, with the machine or its container: that is nobody's
# silence.
LONGEST_LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Hang:
    """A rank that was silent for too long, and all that were; `ranks` begins with the one that fell silent first."""

    phase: str
    step: int
    silent_s: float
    limit_s: float
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, sorted(self.ranks)))}"
        at = f" at step {self.step}" if self.step else ""
        return (
            f"{who} hung while {self.phase}{at}: silent for {self.silent_s:.0f} s, and the limit was {self.limit_s:.0f}"
        )


def kind_of(beat: Beat | None) -> str:
    """Name the limit that holds for what a rank does: loading, first_step, step, or its phase; unknown is loading.

    >>> kind_of(None), kind_of(Beat("training", 7, 1, 9, 1)), kind_of(Beat("training", 8, 2, 9, 1))
    ('loading', 'first_step', 'step')
    """
    if beat is None or beat.phase in LOADING:
        return "loading"
    if beat.phase == "training":
        return "step" if beat.steps_begun > 1 else "first_step"
    return beat.phase


def limit_for(kind: str, seen: Mapping[str, float], policy: RestartSection) -> float | None:
    """Give the silence that is allowed, in seconds; None where the recipe sets no limit.

    `seen` is the longest silence so far that ended by itself, by kind.

    >>> limit_for("step", {"step": 200.0}, RestartSection()), limit_for("step", {}, RestartSection(step_timeout=0))
    (1000.0, None)
    """
    floors = {
        "loading": policy.loading_timeout,
        "first_step": policy.first_step_timeout,
        "step": policy.step_timeout,
    }
    floor = floors.get(kind, policy.phase_timeout)
    return max(floor, TIMES_SEEN * seen.get(kind, 0.0)) if floor else None


@dataclass(slots=True)
class Rank:
    """What the supervisor knows of a rank's heartbeat."""

    beat: Beat | None = None
    silent_s: float = 0.0


@dataclass(slots=True)
class HangWatch:
    """Follows the heartbeats of one attempt. `seen` outlives it: the next attempt goes on learning."""

    files: AttemptDirectory
    ranks: int
    policy: RestartSection
    seen: dict[str, float]
    looked_at: float
    known: list[Rank] = field(default_factory=list)

    def look(self, now: float) -> Hang | None:
        """Read all heartbeats at `now` (monotonic seconds); a Hang where a rank was silent beyond its limit."""
        passed, self.looked_at = min(now - self.looked_at, LONGEST_LOOK_S), now
        self.known = self.known or [Rank() for _ in range(self.ranks)]
        for number, rank in enumerate(self.known):
            self._note(rank, read_beat(self.files.heartbeat(number)), passed)
        limits = [limit_for(kind_of(rank.beat), self.seen, self.policy) for rank in self.known]
        silent = [rank.silent_s for rank in self.known]
        over = [n for n, limit in enumerate(limits) if limit is not None and silent[n] > limit]
        if not over:
            return None
        over.sort(key=lambda number: -silent[number])
        first, beat = over[0], self.known[over[0]].beat
        limit = limits[first]
        assert limit is not None
        return Hang(beat.phase if beat else "starting", beat.step if beat else 0, silent[first], limit, tuple(over))

    def _note(self, rank: Rank, beat: Beat | None, passed: float) -> None:
        rank.silent_s += passed
        if beat is None or beat == rank.beat:
            return
        kind = kind_of(rank.beat)
        self.seen[kind] = max(self.seen.get(kind, 0.0), rank.silent_s)
        rank.beat, rank.silent_s = beat, 0.0

    def pids(self) -> dict[int, int]:
        """Give the process of each rank that has said which it is."""
        return {number: rank.beat.pid for number, rank in enumerate(self.known) if rank.beat is not None}


def to_event(hang: Hang, stacks: Mapping[int, str]) -> dict[str, Any]:
    """Give the payload of the journal's `hang` event."""
    return {
        "phase": hang.phase,
        "step": hang.step,
        "silent_s": round(hang.silent_s, 3),
        "limit_s": round(hang.limit_s, 3),
        "ranks": list(hang.ranks),
        "stacks": {str(rank): said for rank, said in stacks.items()},
    }
