"""When the allotted time of a run is up, and when to save before that."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpt.recipe.schema import RestartSection
from mpt.running.signals import StopWish

# Seconds since the epoch; Slurm sets it in every job since 22.05.
SLURM_END = "SLURM_JOB_END_TIME"


@dataclass(frozen=True, slots=True)
class Deadline:
    """`stop_at` is on this process's monotonic clock, None where nobody knows an end; `says` is what set it."""

    stop_at: float | None = None
    says: str = ""

    def check(self, now: float, wish: StopWish) -> None:
        """Wish for a graceful end once it is time."""
        if self.stop_at is not None and now >= self.stop_at:
            wish.ask(self.says)


def deadline_of(
    policy: RestartSection, environment: Mapping[str, str], *, now: float, epoch: float
) -> tuple[Deadline, str | None]:
    """Work out when to stop; and a note where the recipe wants it and no end is known.

    `now` is the monotonic clock and `epoch` the wall clock at this moment: the scheduler's end is read once, so that a
    clock that is set later changes nothing.
    """
    if policy.stop_before is None:
        return Deadline(), None
    ends: list[tuple[float, str]] = []
    if policy.time_limit is not None:
        ends.append((now + policy.time_limit, "restart.time_limit"))
    if environment.get(SLURM_END, "").isdecimal():
        ends.append((now + int(environment[SLURM_END]) - epoch, SLURM_END))
    if not ends:
        return Deadline(), f"restart.stop_before has nothing to go by: no restart.time_limit, and no {SLURM_END}"
    end, source = min(ends)
    return Deadline(end - policy.stop_before, f"{source}: {policy.stop_before:g} s are left"), None
