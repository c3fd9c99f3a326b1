"""The watch over loss, gradient norm and loss scale: each class of event at its boundary and on both sides of it."""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from pydantic import ValidationError

from mpt.recipe.schema import HealthSection
from mpt.running.ladder import LEVEL
from mpt.training.dead_model import PATIENCE_AT_START
from mpt.training.health import Action, Code, HealthMonitor, Thresholds, Verdict
from mpt.training.lost_updates import SHORT
from mpt.training.spikes import RUNAWAY_STEPS

VOCABULARY = 32000
UNIFORM = math.log(VOCABULARY)
NAN, INF = math.nan, math.inf
Event = tuple[int, Action, Code | None]


def monitor(*, vocabulary: int | None = VOCABULARY, is_scaled: bool = False, **keys: Any) -> HealthMonitor:
    thresholds = Thresholds(**HealthSection(**keys).model_dump())
    return HealthMonitor(thresholds, vocabulary=vocabulary, is_scaled=is_scaled)


class Run:
    """A training loop without a model: what a verdict asks for is done, and the verdicts with a code are kept."""

    def __init__(self, monitor: HealthMonitor) -> None:
        self.monitor = monitor
        self.number = 0
        self.verdicts: list[Verdict] = []
        self.events: list[Event] = []

    def step(
        self,
        loss: float = 2.0,
        norm: float | None = 0.5,
        *,
        scale: float | None = None,
        rate: float = 1e-3,
        late: float | None = None,
        applied: bool | None = None,
    ) -> Verdict:
        """Make a step and give its last verdict with a code, or else its last one."""
        self.number += 1
        verdict = self.monitor.before_update(self.number, loss, norm, scale, rate)
        self._keep(verdict)
        if verdict.action is Action.ROLL_BACK:
            return verdict
        is_applied = verdict.action in (Action.APPLY, Action.CLIP) if applied is None else applied
        after = self.monitor.after_update(self.number, applied=is_applied, grad_norm=late)
        self._keep(after)
        return verdict if after.code is None else after

    def quiet(self, steps: int = 100, *, loss: float = 2.0, norm: float | None = 0.5, **keywords: Any) -> None:
        """Make steps whose numbers vary by a per cent or two, and see that nothing happens."""
        noise = random.Random(steps)
        known = len(self.events)
        for _ in range(steps):
            moved = None if norm is None else norm * math.exp(noise.gauss(0, 0.05))
            self.step(loss * (1 + noise.gauss(0, 0.01)), moved, **keywords)
        assert self.events[known:] == []

    def _keep(self, verdict: Verdict) -> None:
        if verdict.code is not None:
            self.verdicts.append(verdict)
            self.events.append((self.number, verdict.action, verdict.code))


def run(**keys: Any) -> Run:
    return Run(monitor(**keys))


# --- non-finite numbers


@pytest.mark.parametrize(
    ("loss", "norm", "code", "what"),
    [
        (NAN, 0.5, Code.N2, "loss"),
        (INF, 0.5, Code.N2, "loss"),
        (-INF, 0.5, Code.N2, "loss"),
        (NAN, NAN, Code.N2, "loss"),
        (NAN, None, Code.N2, "loss"),
        (2.0, NAN, Code.N3, "grad_norm"),
        (2.0, INF, Code.N3, "grad_norm"),
        (2.0, -1.0, Code.N3, "grad_norm"),
        (2.0, -1e-9, Code.N3, "grad_norm"),
    ],
)
def test_a_number_that_is_not_finite_is_left_out_and_the_third_in_a_row_rolls_back(
    loss: float, norm: float | None, code: Code, what: str
) -> None:
    made = run()
    made.quiet(10)
    for action in (Action.SKIP, Action.SKIP, Action.ROLL_BACK):
        verdict = made.step(loss, norm)
        assert (verdict.action, verdict.code, verdict.what, verdict.onset) == (action, code, what, 11)
        assert str(verdict.value) == str(loss if what == "loss" else norm)
        assert verdict.clip_to is None
        assert not made.monitor.is_healthy


@pytest.mark.parametrize("norm", [0.0, 1e-300, 0.5, 1e30])
def test_a_finite_norm_is_no_lost_gradient(norm: float) -> None:
    assert run().step(2.0, norm) == Verdict(Action.APPLY)


def test_loss_and_gradient_count_in_one_row_and_a_clean_step_ends_it() -> None:
    made = run()
    made.step(NAN)
    made.step(2.0, NAN)
    assert made.step() == Verdict(Action.APPLY)
    made.step(2.0, NAN)
    made.step(NAN)
    assert made.step(2.0, NAN).action is Action.ROLL_BACK
    assert made.verdicts[-1].onset == 4


def test_ten_bad_steps_in_a_thousand_are_borne_and_the_eleventh_is_not() -> None:
    made = run()
    for _ in range(10):
        assert made.step(NAN).action is Action.SKIP
        made.quiet(50)
    verdict = made.step(NAN)
    assert (verdict.action, verdict.code, verdict.onset) == (Action.ROLL_BACK, Code.N2, 1)
    slow = run()
    for _ in range(30):
        assert slow.step(NAN).action is Action.SKIP
        slow.quiet(99)


def test_bad_numbers_enter_no_statistic() -> None:
    made = run(max_bad_in_1000=900)
    made.quiet()
    before = made.monitor.state()
    made.step(NAN)
    made.step(2.0, INF)
    after = made.monitor.state()
    assert after["norms"] == before["norms"]
    assert after["losses"]["accepted"][-1] == 2.0  # the finite loss of the second one
    json.dumps(after, allow_nan=False)


def test_a_loss_that_is_not_finite_under_a_loss_scale_rolls_back_at_once() -> None:
    verdict = run(is_scaled=True).step(INF, NAN, scale=65536.0)
    assert (verdict.action, verdict.code, verdict.onset) == (Action.ROLL_BACK, Code.N2, 1)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_bad_gradient_that_was_applied_has_spoilt_the_weights(is_scaled: bool) -> None:
    verdict = run(is_scaled=is_scaled).step(2.0, NAN, scale=1024.0, applied=True)
    assert (verdict.action, verdict.code) == (Action.ROLL_BACK, Code.N3)
    late = run(is_scaled=is_scaled).step(2.0, None, late=INF, applied=True)
    assert (late.action, late.code) == (Action.ROLL_BACK, Code.N3)
    assert run().step(NAN, applied=True).code is Code.N2


# --- the loss scale


def overflow_until_the_end(made: Run, scale: float, *, backoff: float = 0.5, late: bool = False) -> int:
    """Overflow again and again; give the number of steps until the run was rolled back."""
    for count in range(1, 200):
        verdict = made.step(2.0, None if late else INF, scale=scale, applied=False, late=-1.0 if late else None)
        if verdict.action is Action.ROLL_BACK:
            assert (verdict.code, verdict.what, verdict.value, verdict.onset) == (Code.N1, "loss_scale", scale, 1)
            return count
        assert (verdict.action, verdict.code) == (Action.SKIP, Code.N0)
        scale *= backoff
    return 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("scale", "backoff", "steps"),
    [
        (65536.0, 0.5, 17),  # the 17th overflow is at a scale of 1
        (65536.0, 1.0, 18),  # a fixed scale
        (65536.0, 0.75, 18),
        (2.0, 0.5, 2),
        (1.0, 1.0, 1),
        (0.5, 0.5, 1),
        (2.0**32, 0.5, 33),
        (2.0**32, 1.0, 34),
        (2.0**17, 1.0, 19),
        (1024.0, 1.0, 18),
    ],
)
def test_a_loss_scale_may_come_down_to_one(scale: float, backoff: float, steps: int, late: bool) -> None:
    assert overflow_until_the_end(run(is_scaled=True), scale, backoff=backoff, late=late) == steps


def test_calibration_is_no_event_and_leaves_the_health_as_it_was() -> None:
    made = run(is_scaled=True)
    made.quiet(40, scale=65536.0)
    for count in range(17):
        assert made.step(2.0, INF, scale=2.0 ** (20 - count)).code is Code.N0
        assert made.monitor.is_healthy
        assert made.monitor.healthy_steps == 40
    made.quiet(1, scale=8.0)
    assert made.monitor.healthy_steps == 41


@pytest.mark.parametrize(("every", "ends"), [(4, False), (3, True), (5, False)])
def test_overflows_in_more_than_a_quarter_of_the_steps_end_the_attempt_after_200(every: int, ends: bool) -> None:
    made = run(is_scaled=True)
    for step in range(1, 601):
        verdict = made.step(2.0, INF if step % every == 0 else 0.5, scale=1024.0)
        if verdict.action is Action.ROLL_BACK:
            assert ends
            assert verdict.code is Code.N1
            assert step == 201  # the first overflow from step 200 on
            return
    assert not ends


def test_the_share_is_judged_at_200_steps_and_not_before() -> None:
    made = run(is_scaled=True)
    for step in range(1, SHORT + 1):
        verdict = made.step(2.0, INF if step % 2 == 0 else 0.5, scale=1024.0)
        assert (verdict.action is Action.ROLL_BACK) == (step == SHORT)


@pytest.mark.parametrize("late", [True, False])
def test_an_optimizer_that_leaves_its_update_out_under_a_loss_scale_has_overflowed(late: bool) -> None:
    made = run(is_scaled=True)
    verdict = made.step(2.0, None if late else 0.5, scale=1024.0, applied=False, late=0.5 if late else None)
    assert (verdict.action, verdict.code) == (Action.SKIP, Code.N0)


# --- a norm that is known after the update


def test_a_late_norm_that_is_not_finite_is_judged_as_an_early_one() -> None:
    made = run()
    for action in (Action.SKIP, Action.SKIP, Action.ROLL_BACK):
        verdict = made.step(2.0, None, late=-1.0, applied=False)
        assert (verdict.action, verdict.code) == (action, Code.N3)


def test_an_update_that_was_refused_without_a_norm_counts_as_a_bad_gradient() -> None:
    verdict = run().step(2.0, None, applied=False)
    assert (verdict.action, verdict.code) == (Action.SKIP, Code.N3)
    assert "refused" in verdict.reason


def test_a_bad_loss_is_counted_once_though_the_norm_comes_after_it() -> None:
    made = run()
    made.step(NAN, None, late=NAN)
    assert made.events == [(1, Action.SKIP, Code.N2)]
    assert made.monitor.state()["non_finite"]["in_a_row"] == 1


def test_a_late_spike_is_reported_and_nothing_is_asked_for() -> None:
    made = run()
    for _ in range(60):
        made.step(2.0, None, late=0.5)
    verdict = made.step(2.0, None, late=5.0)
    assert (verdict.action, verdict.code, verdict.value, verdict.clip_to) == (Action.APPLY, Code.N5, 5.0, None)
    assert made.monitor.healthy_steps == 0


def test_an_engine_that_clips_by_itself_is_told_the_limit_beforehand() -> None:
    made = run()
    assert made.monitor.norm_limit() is None  # nothing is judged before 32 values
    made.quiet(100)
    limit = made.monitor.norm_limit()
    assert limit is not None
    for norm, action in ((limit * 0.999, Action.APPLY), (limit * 1.001, Action.CLIP)):
        made.monitor.before_update(101, 2.0, None, None, 1e-3)
        verdict = made.monitor.after_update(101, applied=True, grad_norm=norm, limit=limit)
        assert verdict.action is action
    assert (verdict.code, verdict.clip_to) == (Code.N5, limit)
    assert f"clipped to {limit:.4g}" in verdict.reason
    assert run(spikes=False).monitor.norm_limit() is None


def test_the_limit_is_lifted_where_the_next_norm_is_the_new_level() -> None:
    made = run()
    made.quiet(100, norm=0.5)
    for _ in range(16):
        assert made.monitor.norm_limit() is not None
        made.step(2.0, 50.0)
    assert made.monitor.norm_limit() is None


# --- spikes of the gradient


def test_the_published_norms_of_bloom_are_clipped_from_the_first_abnormal_one() -> None:
    made = run()
    made.quiet(100, norm=0.24)
    for number, norm in enumerate((0.95, 2.4, 15.9, 145.0, 960.0)):
        verdict = made.step(2.0, norm)
        assert (verdict.action, verdict.code, verdict.value, verdict.onset) == (Action.CLIP, Code.N5, norm, 101)
        assert verdict.clip_to == pytest.approx(0.24, rel=0.05), number
    assert made.step(2.0, 0.24).action is Action.APPLY


@pytest.mark.parametrize(("seen", "action"), [(31, Action.APPLY), (32, Action.CLIP), (200, Action.CLIP)])
def test_nothing_is_judged_before_32_values_were_seen(seen: int, action: Action) -> None:
    made = run()
    made.quiet(seen)
    assert made.step(2.0, 500.0).action is action


@pytest.mark.parametrize(
    ("factor", "action"),
    [(1.03, Action.APPLY), (1.05, Action.CLIP), (0.001, Action.APPLY)],  # exp(8 x 0.5 %) is 1.041
)
def test_a_series_that_never_moved_has_a_floor_under_its_sigma(factor: float, action: Action) -> None:
    made = run()
    for _ in range(60):
        made.step(2.0, 0.5)
    assert made.step(2.0, 0.5 * factor).action is action


def test_the_norm_to_clip_to_is_the_median_of_the_accepted_ones() -> None:
    made = run(min_seen=5, window=5)
    for norm in (0.4, 0.5, 0.6, 0.7, 0.8):
        made.step(2.0, norm)
    for _ in range(3):  # rejected ones don't move it
        assert made.step(2.0, 1e6).clip_to == pytest.approx(0.6)


def test_a_level_that_stays_is_accepted_after_sixteen_clips() -> None:
    made = run()
    made.quiet(100, norm=0.5)
    for _ in range(16):
        assert made.step(2.0, 50.0).action is Action.CLIP
    verdict = made.step(2.0, 50.0)
    assert (verdict.action, verdict.code, verdict.onset) == (Action.APPLY, Code.N5, 101)
    made.quiet(200, norm=50.0)
    assert made.step(2.0, 5000.0).action is Action.CLIP


# --- spikes of the loss


def test_a_spike_of_the_loss_that_passes_is_an_event_and_no_rollback() -> None:
    made = run()
    made.quiet(100)
    for _ in range(30):
        made.step(5.0)
    for _ in range(60):
        made.step(2.0)
    assert made.events == [(103, Action.APPLY, Code.N6), (167, Action.APPLY, Code.N6)]
    opened, closed = made.verdicts
    assert (opened.onset, closed.onset, opened.what) == (101, 101, "loss")
    assert made.monitor.is_healthy
    assert made.monitor.healthy_steps == 190 - 167


def test_a_loss_that_stays_up_is_rolled_back_when_its_time_is_over() -> None:
    made = run()
    made.quiet(100)
    for step in range(101, 167):
        assert made.step(2.6).action is Action.APPLY, step
        assert not made.monitor.is_healthy
    verdict = made.step(2.6)
    assert (made.number, verdict.action, verdict.code, verdict.onset) == (167, Action.ROLL_BACK, Code.N6, 101)


def test_a_loss_that_runs_away_is_rolled_back_after_eight_steps() -> None:
    made = run()
    made.quiet(100)
    actions = [made.step(6.5).action for _ in range(RUNAWAY_STEPS)]
    assert actions == [Action.APPLY] * 7 + [Action.ROLL_BACK]
    assert made.verdicts[-1].onset == 101


def test_a_pause_starts_the_count_of_a_runaway_anew() -> None:
    made = run()
    made.quiet(100)
    for _ in range(7):
        made.step(6.5)
    made.step(5.5)
    assert all(made.step(6.5).action is Action.APPLY for _ in range(7))
    assert made.step(6.5).action is Action.ROLL_BACK


@pytest.mark.parametrize(
    ("pattern", "opens"),
    [("H", False), ("HH", False), ("HHH", True), ("HLHLH", True), ("HLLHH", True), ("HLLLHH", False), ("HLH", False)],
)
def test_three_high_losses_of_five_open_an_event(pattern: str, opens: bool) -> None:
    made = run()
    made.quiet(100)
    for letter in pattern:
        made.step(4.0 if letter == "H" else 2.0)
        assert made.monitor.is_healthy == (letter == "L")
    assert bool(made.events) == opens


def test_a_high_loss_does_not_enter_its_own_yardstick() -> None:
    made = run()
    made.quiet(100)
    before = made.monitor.state()["losses"]["accepted"]
    made.step(4.0)
    assert made.monitor.state()["losses"]["accepted"] == before
    made.step(2.0)
    assert made.monitor.state()["losses"]["accepted"] == [*before, 2.0]


@pytest.mark.parametrize(("factor", "opens"), [(1.09, False), (1.11, True), (0.5, False)])
def test_a_high_loss_is_ten_per_cent_above_the_median_too(factor: float, opens: bool) -> None:
    made = run()
    for _ in range(100):
        made.step(2.0)  # sigma is at its floor, and 8 of it are 4 %
    for _ in range(5):
        made.step(2.0 * factor)
    assert bool(made.events) == opens


@pytest.mark.parametrize("level", [2.0, 0.0, -2.0, 1e-12])
def test_losses_around_zero_and_below_are_judged_too(level: float) -> None:
    made = run(vocabulary=None)
    noise = random.Random(0)
    for _ in range(200):
        made.step(level + noise.gauss(0, 0.01))
    assert made.events == []
    for _ in range(3):
        made.step(level + 3)
    assert made.events == [(203, Action.APPLY, Code.N6)]


def test_a_spike_of_both_keeps_the_event_of_the_loss_and_clips() -> None:
    made = run()
    made.quiet(100)
    made.step(4.0, 50.0)
    made.step(4.0, 50.0)
    verdict = made.step(4.0, 50.0)
    assert (verdict.action, verdict.code, verdict.clip_to) == (Action.CLIP, Code.N6, pytest.approx(0.5, rel=0.05))
    assert "grad_norm" in verdict.reason
    assert verdict.reason.startswith("loss is 4")


def test_a_lost_gradient_at_the_opening_of_an_event_says_both() -> None:
    made = run()
    made.quiet(100)
    made.step(4.0)
    made.step(4.0)
    verdict = made.step(4.0, NAN)
    assert (verdict.action, verdict.code) == (Action.SKIP, Code.N3)
    assert "far above the median" in verdict.reason
    assert "grad_norm is nan" in verdict.reason


def test_after_an_event_the_window_starts_anew() -> None:
    made = run()
    noise = random.Random(0)
    for _ in range(100):
        made.step(2.0 * (1 + noise.gauss(0, 0.1)))
    for _ in range(10):
        made.step(5.0)
    for _ in range(60):
        made.step(2.5)  # a new level within 4 sigma
    assert [code for _, _, code in made.events] == [Code.N6, Code.N6]
    assert set(made.monitor.state()["losses"]["accepted"]) == {2.5}


# --- no update, and dead models


@pytest.mark.fault(27)
def test_fifty_steps_without_an_update_end_the_attempt() -> None:
    made = run()
    made.quiet(10)
    for count in range(1, 51):
        verdict = made.step(applied=False)
        assert (verdict.action is Action.ROLL_BACK) == (count == 50)
    assert (verdict.code, verdict.what, verdict.value, verdict.onset) == (Code.N7, "update", 50.0, 11)


def test_overflows_count_as_steps_without_an_update() -> None:
    made = run(is_scaled=True, max_steps_without_update=10)
    for count in range(1, 11):
        verdict = made.step(2.0, INF, scale=1024.0)
        assert (verdict.code is Code.N7) == (count == 10)


def test_one_update_in_fifty_steps_is_enough() -> None:
    made = run()
    for _ in range(5):
        for _ in range(49):
            assert made.step(applied=False).action is Action.APPLY
        made.step()


@pytest.mark.parametrize("is_late", [True, False])
def test_a_gradient_of_exactly_zero_for_fifty_updates_is_a_dead_model(is_late: bool) -> None:
    made = run()
    made.quiet(40)
    zero: dict[str, Any] = {"norm": None, "late": 0.0} if is_late else {"norm": 0.0}
    for count in range(1, 51):
        verdict = made.step(2.0, **zero)
        assert (verdict.action is Action.ROLL_BACK) == (count == 50)
        assert not made.monitor.is_healthy
    assert (verdict.code, verdict.what, verdict.value, verdict.onset) == (Code.DEAD, "grad_norm", 0.0, 41)


@pytest.mark.parametrize(("norm", "rate"), [(1e-30, 1e-3), (0.0, 0.0), (None, 1e-3)])
def test_a_tiny_gradient_a_learning_rate_of_zero_and_an_unknown_norm_are_not_death(
    norm: float | None, rate: float
) -> None:
    made = run()
    for _ in range(300):
        assert made.step(2.0, norm, rate=rate).action is Action.APPLY


def test_zero_gradients_must_follow_each_other() -> None:
    made = run()
    for _ in range(10):
        for _ in range(49):
            made.step(2.0, 0.0)
        made.step(2.0, 0.5)
    assert made.events == []


@pytest.mark.parametrize("factor", [1.0, 1.0009, 0.9991])
@pytest.mark.parametrize("had_learnt", [True, False])
def test_a_loss_that_rests_at_ln_of_the_vocabulary_is_a_dead_model(factor: float, had_learnt: bool) -> None:
    made = run()
    made.step(UNIFORM * (0.98 if had_learnt else 1.02))
    count = 0
    while made.step(UNIFORM * factor).action is Action.APPLY and count < 1000:
        count += 1
    assert count + 1 == (50 if had_learnt else 50 * PATIENCE_AT_START)
    verdict = made.verdicts[-1]
    assert (verdict.action, verdict.code, verdict.what, verdict.onset) == (Action.ROLL_BACK, Code.DEAD, "loss", 2)


@pytest.mark.parametrize(
    ("factor", "vocabulary", "rate"),
    [
        (1.0011, VOCABULARY, 1e-3),
        (0.9989, VOCABULARY, 1e-3),
        (1.0, None, 1e-3),
        (1.0, 1, 1e-3),
        (1.0, VOCABULARY, 0.0),
    ],
)
def test_a_loss_beside_it_or_of_another_kind_is_alive(factor: float, vocabulary: int | None, rate: float) -> None:
    made = run(vocabulary=vocabulary)
    for _ in range(1000):
        assert made.step(UNIFORM * factor, rate=rate).action is Action.APPLY


# --- no false alarm


def student(noise: random.Random, freedom: int) -> float:
    return noise.gauss(0, 1) / math.sqrt(noise.gammavariate(freedom / 2, 2) / freedom)


NOISES: dict[str, Callable[[random.Random], float]] = {
    "gaussian": lambda noise: noise.gauss(0, 1),
    "student-4": lambda noise: student(noise, 4),
    "student-3": lambda noise: student(noise, 3),
}


@pytest.mark.parametrize(
    ("loss_noise", "norm_noise", "norm_sigma", "most_clips"),
    [
        ("gaussian", "gaussian", 0.1, 0),
        ("gaussian", "gaussian", 0.6, 0),
        ("student-4", "gaussian", 0.6, 0),
        ("student-3", "gaussian", 0.3, 0),
        ("student-4", "student-4", 0.3, 10),  # a tail of 4 degrees is over 8 sigma in about 4 of 10 000
        ("student-3", "student-3", 0.3, 30),
    ],
)
@pytest.mark.parametrize("shape", ["decay", "flat"])
def test_ten_thousand_ordinary_steps_give_no_false_alarm(
    loss_noise: str, norm_noise: str, norm_sigma: float, most_clips: int, shape: str
) -> None:
    noise = random.Random(7)
    made = run()
    for step in range(10_000):
        progress = math.exp(-step / 800) if shape == "decay" else 0.0
        loss = 2.5 + (UNIFORM - 2.5) * progress + 0.05 * NOISES[loss_noise](noise)
        level = 0.3 + 5 * math.exp(-step / 200)
        norm = level * math.exp(norm_sigma * NOISES[norm_noise](noise))
        made.step(loss, norm, rate=1e-3 * min(1.0, step / 500))
    counted = Counter((action, code) for _, action, code in made.events)
    assert counted.pop((Action.CLIP, Code.N5), 0) <= most_clips
    assert not counted
    assert made.monitor.is_healthy


@pytest.mark.parametrize("speed", [50, 100, 400])
def test_a_norm_that_grows_with_the_warm_up_is_followed(speed: int) -> None:
    """It doubles every `speed` steps, ten times over, and then falls as it rose."""
    noise = random.Random(3)
    made = run()
    for step in range(20 * speed):
        doublings = min(step, 20 * speed - step) / speed
        made.step(2.0 + 0.02 * noise.gauss(0, 1), 0.01 * 2**doublings * math.exp(0.2 * noise.gauss(0, 1)))
    assert made.events == []


# --- a loss that drifts away


def climb(made: Run, start: float, by: float, steps: int, *, noise: float = 0.03) -> Verdict | None:
    """Make losses that grow by a share a step, too slowly for their last values to tell; give the verdict that ends it.

    The gradient norm is as usual.
    """
    draw = random.Random(5)
    for step in range(steps):
        verdict = made.step(start * (1 + by) ** step * (1 + draw.gauss(0, noise)), 0.5 * math.exp(draw.gauss(0, 0.05)))
        if verdict.action is Action.ROLL_BACK:
            return verdict
    return None


def test_a_loss_that_climbs_from_the_first_step_ends_the_attempt_far_above_that_of_a_model_that_knows_nothing() -> None:
    """The window never has a level to compare with: AdamW at 300 times the rate that a small Llama bears does that."""
    made = run()
    verdict = climb(made, UNIFORM, 0.05, 200)
    assert verdict is not None and made.number < 45
    assert (verdict.code, verdict.what) == (Code.N6, LEVEL)
    assert "over 3 x 10.37, what a model that knows nothing has" in verdict.reason
    # Where it was half again as high: 1.05 ** 8 = 1.48.
    assert verdict.onset == pytest.approx(10, abs=2)


def test_a_loss_that_climbs_at_once_is_seen_at_the_first_level() -> None:
    made = run()
    verdict = climb(made, 3 * UNIFORM, 0.2, 50)
    assert verdict is not None and made.number == 16


@pytest.mark.parametrize("vocabulary", [VOCABULARY, None])
def test_a_loss_that_had_fallen_and_climbs_back_beyond_where_it_began(vocabulary: int | None) -> None:
    made = Run(monitor(vocabulary=vocabulary))
    assert climb(made, 4.0, -0.01, 70, noise=0.1) is None  # to 2
    assert climb(made, 2.0, 0.005, 300, noise=0.1) is not None
    verdict = made.verdicts[-1]
    assert "loss has drifted away" in verdict.reason and "the lowest that it was" in verdict.reason
    assert 70 + 100 < (verdict.onset or 0) < made.number - 20  # 4 is where the run began, and 2 x 1.005 ** 139


@pytest.mark.parametrize(
    ("start", "end", "is_seen"),
    [(4.0, 0.02, False), (0.05, 0.01, False), (2.0, 2.0, True), (UNIFORM, 2.5, True)],
)
def test_three_times_the_lowest_is_no_drift_below_where_the_run_began(start: float, end: float, is_seen: bool) -> None:
    """A loss near 0 triples without meaning anything."""
    made = run()
    steps = 400
    assert climb(made, start, (end / start) ** (1 / steps) - 1, steps, noise=0.1) is None
    top = max(start * 0.9, end * 4) if not is_seen else max(start * 1.5, end * 4)
    verdict = climb(made, end, (top / end) ** (1 / steps) - 1, steps, noise=0.1)
    assert (verdict is not None) == is_seen


def test_a_model_that_begins_far_above_ln_of_the_vocabulary_may_come_down() -> None:
    made = run()
    assert climb(made, 30 * UNIFORM, -0.02, 250) is None
    assert made.events == []


def test_no_checkpoint_is_known_to_be_good_while_the_loss_is_half_again_over_its_lowest() -> None:
    made = Run(monitor(vocabulary=None))
    assert climb(made, 2.0, 0.0, 60, noise=0.1) is None
    assert climb(made, 2.0, 0.004, 60, noise=0.1) is None  # to 2.5
    assert made.monitor.healthy_steps == 120
    assert climb(made, 2.5, 0.004, 90, noise=0.1) is None  # to 3.6
    assert made.events == []
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (False, 0)
    assert climb(made, 3.6, -0.01, 60, noise=0.1) is None  # and down again
    assert made.monitor.is_healthy


def test_losses_of_zero_and_below_have_no_multiple() -> None:
    made = Run(monitor(vocabulary=None))
    for step in range(300):
        made.step(-2.0 + 0.01 * step)
    assert made.events == []


def test_a_state_of_before_there_was_a_drift_is_taken() -> None:
    made = run()
    made.quiet(50)
    state = made.monitor.state()
    del state["drift"]
    other = monitor()
    other.restore(state)
    again = Run(other)
    again.quiet(50)
    assert again.events == []


# --- health, and going on


def test_healthy_steps_count_from_the_last_event() -> None:
    made = run()
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (True, 0)
    made.quiet(100)
    assert made.monitor.healthy_steps == 100
    made.step(2.0, 50.0)
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (False, 0)
    made.quiet(5)
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (True, 5)
    made.step(NAN)
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (False, 0)
    made.step(applied=False)  # a step that changes nothing says nothing
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (False, 0)
    made.quiet(1)
    assert (made.monitor.is_healthy, made.monitor.healthy_steps) == (True, 1)


def troubled(seed: int, *, is_late: bool, is_scaled: bool) -> Iterator[dict[str, Any]]:
    """Make the numbers of a run in which everything happens now and then."""
    noise = random.Random(seed)
    level, zeros, resting = 0.0, 0, 0
    for step in range(900):
        if step % 210 == 150:
            level = 3.0
        level = max(0.0, level - 0.15)
        zeros = 20 if noise.random() < 0.005 else max(0, zeros - 1)
        resting = 30 if noise.random() < 0.003 else max(0, resting - 1)
        loss = UNIFORM if resting else 2.0 + 2 * level + 0.03 * noise.gauss(0, 1)
        norm = 0.0 if zeros else 0.4 * math.exp(0.2 * noise.gauss(0, 1) + (3 if noise.random() < 0.02 else 0))
        if noise.random() < 0.004 and not is_scaled:
            loss = NAN
        is_lost = noise.random() < (0.1 if is_scaled else 0.004)
        norm = INF if is_lost else norm
        yield {
            "loss": loss,
            "norm": None if is_late else norm,
            "late": norm if is_late else None,
            "scale": 2.0 ** noise.randrange(4, 16) if is_scaled else None,
            "applied": False if is_lost or math.isnan(loss) else None,
        }


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_run_decides_as_the_uninterrupted_one(seed: int, is_late: bool, is_scaled: bool) -> None:
    keys: dict[str, Any] = {"is_scaled": is_scaled, "max_bad_in_1000": 100}
    whole, parts = run(**keys), run(**keys)
    cuts = random.Random(seed)
    for numbers in troubled(seed, is_late=is_late, is_scaled=is_scaled):
        if cuts.random() < 0.2:
            written = json.dumps(parts.monitor.state(), allow_nan=False)
            parts.monitor = monitor(**keys)
            parts.monitor.restore(json.loads(written))
            assert json.dumps(parts.monitor.state()) == written
        assert repr(parts.step(**numbers)) == repr(whole.step(**numbers))
        assert parts.monitor.is_healthy == whole.monitor.is_healthy
        assert parts.monitor.healthy_steps == whole.monitor.healthy_steps
        if whole.events and whole.events[-1][:2] == (whole.number, Action.ROLL_BACK):
            whole.monitor, parts.monitor = monitor(**keys), monitor(**keys)
    assert whole.number == 900
    assert len({code for _, _, code in whole.events}) >= 3


def test_a_state_does_not_change_with_the_monitor_that_gave_it() -> None:
    made = run()
    made.quiet(50)
    state = made.monitor.state()
    written = json.dumps(state)
    other = monitor()
    other.restore(state)
    made.quiet(20)
    Run(other).quiet(20)
    assert json.dumps(state) == written


def test_a_shorter_window_keeps_the_newest_values_of_a_state() -> None:
    made = run()
    made.quiet(128)
    short = monitor(window=40)
    short.restore(made.monitor.state())
    assert short.state()["losses"]["accepted"] == made.monitor.state()["losses"]["accepted"][-40:]


def test_a_verdict_after_the_update_needs_the_one_before_it() -> None:
    with pytest.raises(AssertionError, match="without its before_update"):
        monitor().after_update(1, applied=True)


def test_a_step_costs_less_than_a_hundred_microseconds() -> None:
    """In time of this process, so that a busy machine does not matter."""
    noise = random.Random(0)
    numbers = [(2 + 0.1 * student(noise, 3), math.exp(0.6 * noise.gauss(0, 1))) for _ in range(5000)]
    watch = monitor()
    began = time.process_time()
    for step, (loss, norm) in enumerate(numbers):
        watch.before_update(step, loss, norm, None, 1e-3)
        watch.after_update(step, applied=True)
    assert (time.process_time() - began) / len(numbers) < 100e-6


# --- the recipe's block


def spike_of_the_norm(made: Run) -> None:
    made.quiet(40)
    made.step(2.0, 50.0)


def plateau(made: Run) -> None:
    made.quiet(100)
    for _ in range(80):
        if made.step(2.6).action is Action.ROLL_BACK:
            return


def shifted_norm(made: Run) -> None:
    made.quiet(100)
    for _ in range(20):
        made.step(2.0, 50.0)


def low_plateau(made: Run) -> None:
    """Three high losses, then a level that is 6 sigma up."""
    noise = random.Random(1)
    for _ in range(128):
        made.step(2.0 * (1 + noise.gauss(0, 0.02)))
    for _ in range(80):
        if made.step(2.0 * 1.25 if made.number < 140 else 2.24).action is Action.ROLL_BACK:
            return


def runaway(made: Run) -> None:
    made.quiet(100)
    for _ in range(10):
        if made.step(6.5).action is Action.ROLL_BACK:
            return


def old_level(made: Run) -> None:
    """A norm that was usual 80 steps ago, and has been rare since."""
    made.quiet(60, norm=5.0)
    made.quiet(60, norm=0.5)
    made.step(2.0, 5.0)


def bad_rows(made: Run) -> None:
    for _ in range(2):
        made.step(NAN)


def bad_now_and_then(made: Run) -> None:
    for _ in range(4):
        made.step(NAN)
        made.quiet(5)


def overflows(made: Run) -> None:
    made.step(2.0, 0.5, scale=1024.0)
    for _ in range(10):
        if made.step(2.0, INF, scale=1024.0).action is Action.ROLL_BACK:
            return


def overflows_now_and_then(made: Run) -> None:
    for step in range(250):
        if made.step(2.0, INF if step % 5 == 0 else 0.5, scale=1024.0).action is Action.ROLL_BACK:
            return


def idle(made: Run) -> None:
    for _ in range(20):
        if made.step(applied=False).action is Action.ROLL_BACK:
            return


def no_gradient(made: Run) -> None:
    for _ in range(20):
        if made.step(2.0, 0.0).action is Action.ROLL_BACK:
            return


@pytest.mark.parametrize(
    ("series", "key", "value"),
    [
        (spike_of_the_norm, "spikes", False),
        (plateau, "spikes", False),
        (old_level, "window", 64),
        (spike_of_the_norm, "min_seen", 41),
        (spike_of_the_norm, "spike_sigmas", 200),
        (plateau, "spike_sigmas", 100),
        (shifted_norm, "max_clips", 5),
        (plateau, "settle_steps", 16),
        (low_plateau, "settle_sigmas", 7.5),
        (runaway, "runaway_factor", 4),
        (bad_rows, "max_bad_in_a_row", 2),
        (bad_now_and_then, "max_bad_in_1000", 3),
        (overflows, "max_overflows_in_a_row", 10),
        (overflows_now_and_then, "max_overflow_share", 0.15),
        (idle, "max_steps_without_update", 20),
        (no_gradient, "dead_after", 20),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_every_threshold_has_an_effect(series: Callable[[Run], None], key: str, value: Any) -> None:
    is_scaled = "overflow" in key
    usual, other = run(is_scaled=is_scaled), run(is_scaled=is_scaled, **{key: value})
    series(usual)
    series(other)
    assert usual.events != other.events


def test_every_threshold_is_in_the_table_above() -> None:
    marks = test_every_threshold_has_an_effect.pytestmark  # type: ignore[attr-defined]
    # What known_good_after does needs checkpoints: tests/training/test_health_of_runs.py.
    assert {row[1] for row in marks[0].args[1]} | {"known_good_after"} == set(HealthSection.model_fields)


def test_the_thresholds_are_the_block_of_the_recipe() -> None:
    assert [field.name for field in fields(Thresholds)] == list(HealthSection.model_fields)
    thresholds = Thresholds(**HealthSection().model_dump())
    assert replace(thresholds, window=64) == Thresholds(**HealthSection(window=64).model_dump())


def test_the_defaults_are_those_of_the_policy() -> None:
    assert HealthSection().model_dump() == {
        "spikes": True,
        "window": 128,
        "min_seen": 32,
        "spike_sigmas": 8.0,
        "max_clips": 16,
        "settle_steps": 64,
        "settle_sigmas": 4.0,
        "runaway_factor": 3.0,
        "max_bad_in_a_row": 3,
        "max_bad_in_1000": 10,
        "max_overflows_in_a_row": 18,
        "max_overflow_share": 0.25,
        "max_steps_without_update": 50,
        "dead_after": 50,
        "known_good_after": 100,
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"window": 31}, "window is 31, below min_seen 32"),
        ({"min_seen": 129}, "window is 128, below min_seen 129"),
        ({"settle_sigmas": 8.5}, "settle_sigmas is 8.5, above spike_sigmas 8"),
        ({"spike_sigmas": 3}, "settle_sigmas is 4, above spike_sigmas 3"),
        ({"spikes": False, "window": 64, "max_clips": 2}, "spikes is false, and max_clips, window say"),
        ({"max_bad_in_a_row": 51}, "max_bad_in_a_row is 51"),
        ({"max_overflows_in_a_row": 30, "max_steps_without_update": 29}, "write at most 29, or raise that"),
        ({"min_seen": 1}, "greater than or equal to 2"),
        ({"settle_steps": 15}, "greater than or equal to 16"),
        ({"runaway_factor": 1}, "greater than 1"),
        ({"spike_sigmas": 0}, "greater than 0"),
        ({"max_overflow_share": 1.1}, "less than or equal to 1"),
        ({"dead_after": 0}, "greater than 0"),
        ({"max_clips": 0}, "greater than 0"),
        ({"max_bad_in_1000": 1000}, "less than 1000"),
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        HealthSection(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"window": 32},
        {"settle_sigmas": 8},
        {"spikes": False},
        {"spikes": False, "dead_after": 10},
        {"spikes": True, "window": 64},
        {"max_bad_in_a_row": 50},
        {"max_steps_without_update": 5},
        {"max_bad_in_1000": 0},
        {"max_overflow_share": 1},
    ],
)
def test_thresholds_at_their_bounds_are_taken(keys: dict[str, Any]) -> None:
    monitor(**keys)
