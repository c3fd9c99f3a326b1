"""When to save before the allotted time is up."""

import signal

import pytest

from mpt.recipe.schema import RestartSection
from mpt.running.deadline import deadline_of
from mpt.running.signals import StopWish


@pytest.mark.parametrize(
    ("recipe", "environment", "stop_at"),
    [
        ({}, {"SLURM_JOB_END_TIME": "5000"}, None),
        ({"stop_before": "10m"}, {}, None),
        ({"stop_before": "10m"}, {"SLURM_JOB_END_TIME": "5000"}, 100 + 4000 - 600),
        ({"stop_before": "10m"}, {"SLURM_JOB_END_TIME": "500"}, 100 - 500 - 600),
        ({"stop_before": "10m"}, {"SLURM_JOB_END_TIME": "soon"}, None),
        ({"stop_before": "10m"}, {"SLURM_JOB_END_TIME": ""}, None),
        ({"stop_before": "10m", "time_limit": "1h"}, {}, 100 + 3600 - 600),
        ({"stop_before": "10m", "time_limit": "1h"}, {"SLURM_JOB_END_TIME": "3000"}, 100 + 2000 - 600),
        ({"stop_before": 0, "time_limit": "1h"}, {"SLURM_JOB_END_TIME": "9000"}, 100 + 3600),
    ],
)
def test_the_earlier_end_counts_less_what_a_save_needs(
    recipe: dict[str, str], environment: dict[str, str], stop_at: float | None
) -> None:
    policy = RestartSection.model_validate(recipe)
    deadline, note = deadline_of(policy, environment, now=100.0, epoch=1000.0)
    assert deadline.stop_at == stop_at
    assert (note is not None) == (stop_at is None and "stop_before" in recipe)


def test_a_deadline_wishes_once_and_leaves_an_earlier_wish_alone() -> None:
    deadline, _ = deadline_of(RestartSection(stop_before=60, time_limit=100), {}, now=0.0, epoch=0.0)
    wish = StopWish()
    deadline.check(39.9, wish)
    assert wish.signal is None
    deadline.check(40.0, wish)
    assert (wish.signal, wish.is_urgent) == (signal.SIGTERM, False)
    assert "60 s are left" in wish.by
    other = StopWish(signal=signal.SIGINT, by="SIGINT")
    deadline.check(99.0, other)
    assert (other.signal, other.by) == (signal.SIGINT, "SIGINT")
