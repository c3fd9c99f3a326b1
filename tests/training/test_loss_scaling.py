"""The loss scale of fp16 moves as DeepSpeed's and torch's do, and what it does is told."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch.utils._python_dispatch import TorchDispatchMode

from mpt.cli.train import _report
from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import resolve
from mpt.recipe.schema import HealthSection
from mpt.reporting.live import describe, spell_loss_scale
from mpt.reporting.summary import summarise
from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal, read_events
from mpt.running.run_directory import RunDirectory
from mpt.training.outcome import Diverged, StopRequest
from mpt.training.precision.loss_scaling import build_scaler, hold_deepspeed_knobs, scale_at_floor
from mpt.training.session import build_monitor
from mpt.training.skip_rate import MAX_SETTLING, MIN_SEEN, REMEDY, WINDOW, SkipRate
from mpt.training.step_watch import StepWatch
from tests.training.tiny_runs import FP16, Run, free_port, tiny_recipe

MakeRun = Callable[..., Run]
KNOBS: dict[str, Any] = {
    "initial": 2.0**16,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 3,
    "min": None,
    "hysteresis": None,
}


class Driven:
    """A scaler at work on one weight, whose gradient is infinite where a step is to overflow."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)

    def backward(self, *, overflow: bool) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale((self.weight * (math.inf if overflow else 1.0)).sum()).backward()

    def step(self, *, overflow: bool) -> float:
        """Make a step; give the scale after it."""
        self.backward(overflow=overflow)
        before = self.weight.item()
        self.scaler.step(self.optimizer)
        assert (self.weight.item() == before) is overflow, "an overflow skips its step, and nothing else does"
        self.scaler.update()
        return self.scaler.get_scale()


# --- as DeepSpeed's

# (min, hysteresis, growth_interval); 2**-60 stands for no floor, which DeepSpeed's scaler can't say.
CASES = [
    (1.0, 1, 3), (1.0, 2, 3), (1.0, 3, 1), (1.0, 2, 1), (1.0, 5, 2), (256.0, 1, 4), (256.0, 2, 2), (2.0**16, 1, 5),
    (2.0**16, 3, 2), (0.25, 2, 7), (3000.0, 1, 2), (3000.0, 2, 1), (2.0**-60, 2, 3), (2.0**-60, 1, 2),
]  # fmt: skip
DEEPSPEED = """
import json, sys
import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
found = []
for minimum, hysteresis, window, overflows in json.load(sys.stdin):
    scaler = DynamicLossScaler(2.0**16, window, minimum, hysteresis, consecutive_hysteresis=False)
    scales = []
    for overflow in overflows:
        try:
            scaler.update_scale(overflow)
        except Exception as error:
            assert "loss scale already at minimum" in str(error)
            break
        scales.append(scaler.cur_scale)
    found.append(scales)
print("\\n" + json.dumps(found))
"""


def overflows(seed: int) -> list[bool]:
    """Steps that overflow: in runs, alone, and at times not for long."""
    chance = random.Random(seed)
    steps: list[bool] = []
    while len(steps) < 120:
        steps += [chance.random() < 0.35] * chance.choice([1, 1, 2, 3, 8])
    return steps


@pytest.fixture(scope="module")
def deepspeed_scales() -> list[list[float]]:
    """The scale after each step by DeepSpeed's own scaler, in a process that has the group it insists on."""
    asked = json.dumps([(*case, overflows(seed)) for seed, case in enumerate(CASES)])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", DEEPSPEED], input=asked, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | place | {"MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scales: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return scales


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(CASES)), ids=[str(case) for case in CASES])
def test_with_floor_and_hysteresis_the_scale_is_deepspeeds_step_by_step(
    seed: int, deepspeed_scales: list[list[float]]
) -> None:
    minimum, hysteresis, window = CASES[seed]
    floor = None if minimum < 1e-9 else minimum
    driven = Driven(build_scaler(KNOBS | {"min": floor, "hysteresis": hysteresis, "growth_interval": window}, "cpu"))
    pattern, expected = overflows(seed), deepspeed_scales[seed]
    for number, overflow in enumerate(pattern):
        driven.backward(overflow=overflow)
        at_floor = scale_at_floor(driven.scaler)
        ends_here = number == len(expected)
        assert (overflow and at_floor is not None and bool(at_floor)) is ends_here
        if ends_here:
            return
        assert driven.step(overflow=overflow) == expected[number], number
    assert len(expected) == len(pattern)


@pytest.mark.slow
def test_the_patterns_reach_what_they_are_to_compare(deepspeed_scales: list[list[float]]) -> None:
    """Some runs end at their floor and some go on, and scales grow and shrink on the way."""
    ended = [len(scales) < len(overflows(seed)) for seed, scales in enumerate(deepspeed_scales)]
    assert any(ended) and not all(ended)
    assert any(max(scales) > 2.0**16 > min(scales) for scales in deepspeed_scales if scales)


# --- as torch's


@pytest.mark.parametrize(("growth", "backoff", "interval"), [(2.0, 0.5, 3), (4.0, 0.25, 1), (1.5, 0.9, 10)])
def test_without_floor_and_hysteresis_the_scale_is_torchs_step_by_step(
    growth: float, backoff: float, interval: int
) -> None:
    knobs = {"growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval}
    ours = Driven(build_scaler(KNOBS | knobs, "cpu"))
    theirs = Driven(torch.amp.GradScaler("cpu", init_scale=2.0**16, **knobs))
    for overflow in overflows(7):
        assert ours.step(overflow=overflow) == theirs.step(overflow=overflow)
    assert scale_at_floor(ours.scaler) is None
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()


@pytest.mark.parametrize("minimum", [0.1, 1.0, 3.0])
def test_the_scale_stops_exactly_at_its_floor_in_fp32(minimum: float) -> None:
    driven = Driven(build_scaler(KNOBS | {"initial": 4.0, "min": minimum, "backoff_factor": 0.3}, "cpu"))
    scales = [driven.step(overflow=True) for _ in range(6)]
    assert min(scales) == scales[-1] == torch.tensor(minimum).item()
    at_floor = scale_at_floor(driven.scaler)
    assert at_floor is not None and bool(at_floor)


def test_a_static_scale_never_moves() -> None:
    driven = Driven(build_scaler({"static": 128.0}, "cpu"))
    assert {driven.step(overflow=overflow) for overflow in overflows(3)} == {128.0}
    assert scale_at_floor(driven.scaler) is None and scale_at_floor(None) is None


class Noted(TorchDispatchMode):
    """Notes every operation that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_moving_the_scale_never_waits_for_the_device() -> None:
    driven = Driven(build_scaler(KNOBS | {"min": 1.0, "hysteresis": 2}, "cpu"))
    driven.backward(overflow=True)
    driven.scaler.step(driven.optimizer)
    with Noted() as noted:
        scale_at_floor(driven.scaler)
        driven.scaler.update()
    assert "_amp_update_scale_" in noted.seen
    assert not noted.seen & {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}
    with Noted() as noted:
        driven.scaler.get_scale()
    assert "_local_scalar_dense" in noted.seen  # what waiting looks like


# --- going on from a checkpoint


def reloaded(scaler: torch.amp.GradScaler, loss_scale: dict[str, Any], folder: Path) -> Driven:
    """Carry a scaler's state through a file into a new one, as the Trainer does."""
    torch.save(scaler.state_dict(), folder / "scaler.pt")
    fresh = build_scaler(loss_scale, "cpu")
    fresh.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
    return Driven(fresh)


@pytest.mark.parametrize("changes", [{}, {"min": 4.0}, {"hysteresis": 3}, {"min": 1.0, "hysteresis": 2}])
def test_a_resumed_scale_goes_on_bit_for_bit_from_every_step(changes: dict[str, Any], tmp_path: Path) -> None:
    loss_scale, pattern = KNOBS | changes, overflows(5)[:60]
    whole = Driven(build_scaler(loss_scale, "cpu"))
    resumed = [reloaded(whole.scaler, loss_scale, tmp_path)]
    for overflow in pattern:
        scale = whole.step(overflow=overflow)
        assert {driven.step(overflow=overflow) for driven in resumed} == {scale}
        resumed.append(reloaded(whole.scaler, loss_scale, tmp_path))
    assert all(driven.scaler.state_dict() == whole.scaler.state_dict() for driven in resumed)


def test_a_scaler_in_use_takes_up_a_state_too() -> None:
    source, target = (Driven(build_scaler(KNOBS | {"hysteresis": 3}, "cpu")) for _ in range(2))
    source.step(overflow=True)
    target.step(overflow=False)
    target.scaler.load_state_dict(source.scaler.state_dict())
    assert [target.step(overflow=True), target.step(overflow=True)] == [2.0**16, 2.0**15]


def test_the_recipes_knobs_hold_over_those_of_the_checkpoint(tmp_path: Path) -> None:
    old = Driven(build_scaler(KNOBS | {"growth_interval": 100}, "cpu"))
    for _ in range(50):
        old.step(overflow=False)
    changed = reloaded(old.scaler, KNOBS | {"growth_factor": 8.0, "backoff_factor": 0.25}, tmp_path)
    # 50 clean steps are more than the new interval of 3 asks for: the very next one completes it.
    assert changed.step(overflow=False) == 2.0**19
    assert changed.step(overflow=True) == 2.0**17


def test_a_scale_may_become_static_and_dynamic_again(tmp_path: Path) -> None:
    dynamic = Driven(build_scaler(KNOBS, "cpu"))
    dynamic.step(overflow=True)
    static = reloaded(dynamic.scaler, {"static": 512.0}, tmp_path)
    assert static.scaler.get_scale() == static.step(overflow=False) == 512.0
    again = reloaded(static.scaler, KNOBS | {"min": 1024.0, "hysteresis": 2}, tmp_path)
    assert again.scaler.get_scale() == 1024.0  # what is below the new floor is raised to it
    assert [again.step(overflow=True), again.step(overflow=False)] == [1024.0, 1024.0]


def deepspeeds(**changes: Any) -> SimpleNamespace:
    """What DeepSpeed's optimizer is after it has loaded a checkpoint: the scaler of back then, whole."""
    knobs = {"init_scale": 2.0**20, "scale_window": 100, "min_scale": 1, "delayed_shift": 4}
    scaler = DynamicLossScaler(**knobs | changes, consecutive_hysteresis=False)
    scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 50, 40, 3
    return SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=True)


def test_under_deepspeed_too_the_recipes_knobs_hold_over_those_of_the_checkpoint() -> None:
    optimizer = deepspeeds()
    hold_deepspeed_knobs(optimizer, KNOBS | {"growth_interval": 7, "min": 16.0, "hysteresis": 2})
    scaler = optimizer.loss_scaler
    assert (scaler.scale_window, scaler.min_scale, scaler.delayed_shift) == (7, 16.0, 2)
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (2.0**20, 50, 40)  # it goes on from there
    assert scaler.cur_hysteresis == 2
    hold_deepspeed_knobs(optimizer, KNOBS | {"min": 2.0**21, "hysteresis": 2})
    assert optimizer.loss_scaler.cur_scale == 2.0**21


def test_under_deepspeed_too_a_scale_may_become_static_and_dynamic_again() -> None:
    optimizer = deepspeeds()
    hold_deepspeed_knobs(optimizer, {"static": 512.0})
    assert (optimizer.loss_scaler.loss_scale, optimizer.dynamic_loss_scale) == (512.0, False)
    assert not optimizer.loss_scaler.dynamic
    hold_deepspeed_knobs(optimizer, KNOBS)
    assert (optimizer.loss_scaler.loss_scale, optimizer.dynamic_loss_scale) == (512.0, True)
    assert optimizer.loss_scaler.scale_window == KNOBS["growth_interval"]


# --- when to give up


def a_watch(tmp_path: Path, loss_scale: dict[str, Any]) -> StepWatch:
    plan = resolve(
        tiny_recipe(precision=FP16 | {"loss_scale": loss_scale}),
        parse_machine("cpu"),
        learn_model_facts(tiny_recipe()),
        name="watched",
    )
    journal, stop = Journal(tmp_path / "journal.jsonl", attempt=1), StopRequest(tmp_path / "stop")
    return StepWatch(
        journal,
        tmp_path / "metrics.jsonl",
        build_monitor(plan),
        attempt=1,
        rank=0,
        stop=stop,
        device=torch.device("cpu"),
        heartbeat=Heartbeat(RunDirectory(tmp_path).attempt(1), rank=0),
    )


@pytest.fixture
def watch(tmp_path: Path) -> StepWatch:
    return a_watch(tmp_path, {"initial": 65536})


def watch_step(
    watch: StepWatch, number: int, *, scale: float | None, skipped: bool, at_floor: bool | None = None
) -> None:
    """Tell the watch of a step as the Trainer does."""
    watch.begin(number, 1e-3)
    watch.add_batch({"input_ids": torch.zeros(2, 4)})
    watch.add_loss(torch.tensor(2.0))
    watch.agree(
        torch.tensor(math.inf if skipped else 1.0),
        None if scale is None else torch.tensor(scale),
        None if at_floor is None else torch.tensor(at_floor),
    )
    watch.conclude(applied=not skipped)


@pytest.mark.parametrize(
    ("scale", "at_floor", "knobs", "skipped", "is_over"),
    [
        (2.0, None, {}, True, False),
        (1.0, None, {}, True, True),
        (0.5, None, {}, True, True),
        (0.5, None, {}, False, False),
        (0.5, False, {"min": 0.25}, True, False),  # a floor below 1 was asked for
        (0.25, True, {"min": 0.25}, True, True),
        (256.0, True, {"min": 256}, True, True),
        (256.0, True, {"min": 256}, False, False),
        (256.0, False, {"min": 256, "hysteresis": 2}, True, False),  # hysteresis is left
        (0.5, None, {"static": 0.5}, True, False),
    ],
)
def test_a_run_is_over_where_overflow_can_not_lower_the_scale(
    tmp_path: Path, scale: float, at_floor: bool | None, knobs: dict[str, Any], skipped: bool, is_over: bool
) -> None:
    watch = a_watch(tmp_path, knobs or {"initial": 65536})
    if not is_over:
        watch_step(watch, 3, scale=scale, skipped=skipped, at_floor=at_floor)
        assert watch.step is not None and watch.step.is_at_floor is at_floor
        return
    with pytest.raises(Diverged) as raised:
        watch_step(watch, 3, scale=scale, skipped=skipped, at_floor=at_floor)
    told = raised.value
    assert (told.step, told.what, told.value, told.code) == (3, "loss_scale", scale, "N1")
    last = read_events(watch.journal.path)[-1]
    assert (last["kind"], last["what"], last["value"]) == ("health", "loss_scale", scale)


def test_a_static_scale_is_given_up_after_many_skips_in_a_row(tmp_path: Path) -> None:
    watch = a_watch(tmp_path, {"static": 64})
    row = HealthSection().max_overflows_in_a_row
    pattern = [True] * (row - 1) + [False] + [True] * (row - 1)
    for number, skipped in enumerate(pattern, 1):
        watch_step(watch, number, scale=64.0, skipped=skipped)
    with pytest.raises(Diverged):
        watch_step(watch, len(pattern) + 1, scale=64.0, skipped=True)


# --- the alarm


def alarms(*steps: tuple[int, bool]) -> list[tuple[int, float, int]]:
    """Feed runs of (count, skipped) steps; give each alarm's step, share and window."""
    rate, found, number = SkipRate(), [], 0
    for count, skipped in steps:
        for _ in range(count):
            number += 1
            alarm = rate.note(skipped=skipped)
            if alarm is not None:
                found.append((number, alarm.share, alarm.window))
    return found


CLEAN, SKIP = False, True


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param([], [], id="no step"),
        pytest.param([(1, CLEAN)], [], id="one step"),
        pytest.param([(1000, CLEAN)], [], id="never skipped"),
        pytest.param([(MAX_SETTLING, SKIP), (1000, CLEAN)], [], id="a first scale that settles"),
        pytest.param(
            [(MAX_SETTLING + MIN_SEEN - 1, SKIP)], [], id="settling for too long, one step before enough are seen"
        ),
        pytest.param(
            [(MAX_SETTLING + MIN_SEEN, SKIP)], [(MAX_SETTLING + MIN_SEEN, 1.0, MIN_SEEN)], id="settling for too long"
        ),
        pytest.param([(16, CLEAN), (3, SKIP)], [], id="19 steps are too few"),
        pytest.param([(17, CLEAN), (3, SKIP)], [(20, 3 / 20, 20)], id="3 of 20"),
        pytest.param([(18, CLEAN), (2, SKIP)], [], id="2 of 20 are not more than a tenth"),
        pytest.param([(11, SKIP), (17, CLEAN), (3, SKIP)], [(31, 3 / 20, 20)], id="3 of 20 after settling"),
        pytest.param([(500, CLEAN), (10, SKIP)], [], id="10 of 100"),
        pytest.param([(500, CLEAN), (11, SKIP)], [(511, 0.11, 100)], id="11 of 100"),
        pytest.param([(500, CLEAN), (60, SKIP)], [(511, 0.11, 100)], id="once an episode"),
        pytest.param(
            [(500, CLEAN), (11, SKIP), (94, CLEAN), (11, SKIP)], [(511, 0.11, 100)], id="5 of 100 do not arm it again"
        ),
        pytest.param(
            [(500, CLEAN), (11, SKIP), (96, CLEAN), (11, SKIP)],
            [(511, 0.11, 100), (618, 0.11, 100)],
            id="fewer than 5 of 100 arm it again",
        ),
    ],
)
def test_too_many_skipped_steps_raise_an_alarm(
    steps: list[tuple[int, bool]], expected: list[tuple[int, float, int]]
) -> None:
    assert alarms(*steps) == expected
    assert WINDOW == 100


def test_the_alarm_is_journalled_once_and_only_for_a_run_with_a_loss_scale(watch: StepWatch) -> None:
    for number in range(1, 41):
        watch_step(watch, number, scale=1024.0, skipped=number % 2 == 0)
        watch.write_step()
    (alarm,) = [event for event in read_events(watch.journal.path) if event["kind"] == "alarm"]
    told = {key: alarm[key] for key in ("step", "what", "share", "window", "remedy")}
    assert told == {"step": 20, "what": "skip_rate", "share": 0.5, "window": 20, "remedy": REMEDY}
    assert describe(alarm) == f"step 20  ALARM: 50% of the last 20 steps were skipped by overflow. {REMEDY}"


# --- real runs on this CPU, where fp16 is emulated


@pytest.fixture(scope="module")
def restless_run(new_run: MakeRun) -> Iterator[Run]:
    """A finished fp16 run whose scale grows after every clean step, and so overflows again and again."""
    knobs = {"initial": 2.0**21, "growth_interval": 1}
    run = new_run(precision=FP16 | {"loss_scale": knobs}, training={"max_steps": 24, "save_steps": 24})
    assert run.train() == 0, run.log()
    yield run


@pytest.mark.slow
def test_a_run_in_fp16_overflows_where_fp16_does_and_learns_all_the_same(restless_run: Run) -> None:
    rows = list(restless_run.steps.values())
    clean, skipped = ([row for row in rows if row["skipped"] is kind] for kind in (False, True))
    largest = max(row["grad_norm"] for row in clean)
    assert len(skipped) >= 5
    for row in skipped:
        # fp16 ends at 65504, fp32 and bf16 at 3e38: at this scale only a backward pass in fp16 overflows.
        assert 65504 < row["loss_scale"] * largest < 1e30
        assert not math.isfinite(float(row["grad_norm"]))
        assert 0 < row["loss"] < 10
    assert restless_run.audit()["autocast_dtype"] == "fp16"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.4
    for before, after in pairwise(rows):
        assert after["loss_scale"] == before["loss_scale"] * (0.5 if before["skipped"] else 2.0)


@pytest.mark.slow
def test_a_run_tells_every_skipped_step_and_raises_the_alarm(restless_run: Run) -> None:
    skipped = [row for row in restless_run.steps.values() if row["skipped"]]
    told = [event for event in restless_run.events if event["kind"] == "step_skipped"]
    assert [(event["step"], event["loss_scale"]) for event in told] == [(r["step"], r["loss_scale"]) for r in skipped]
    (alarm,) = [event for event in restless_run.events if event["kind"] == "alarm"]
    assert (alarm["what"], alarm["window"]) == ("skip_rate", MIN_SEEN)
    assert alarm["share"] > 0.1 and "bf16" in alarm["remedy"]


@pytest.mark.slow
def test_summary_and_report_say_how_the_loss_scale_fared(
    restless_run: Run, fp32_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = restless_run.steps
    count, scale = sum(row["skipped"] for row in rows.values()), rows[24]["loss_scale"]
    summary = summarise(restless_run.directory)
    assert (summary["skipped_steps"], summary["loss_scale"]) == (count, scale)
    _report(restless_run.directory, None, as_json=False)
    assert (
        f"loss scale {spell_loss_scale(scale)} at the end; {count} of 24 steps skipped by overflow\n"
        in capsys.readouterr().err
    )
    summary = summarise(fp32_run.directory)
    assert (summary["skipped_steps"], summary["loss_scale"]) == (0, None)
    _report(fp32_run.directory, None, as_json=False)
    assert "loss scale" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.fault(27)
def test_an_overflow_at_the_floor_ends_a_run_and_its_resumption_at_the_same_step(new_run: MakeRun) -> None:
    """Step 1 uses up the hysteresis, step 2 halves to the floor, and step 3 has no room: also after a kill at step 2,
    which a scaler with all of its hysteresis back would outlive."""
    knobs = {"initial": 2.0**39, "min": 2.0**38, "hysteresis": 2}
    whole = new_run(precision=FP16 | {"loss_scale": knobs}, training={"save_steps": 2})
    assert whole.train() == 81, whole.log()
    assert [row["loss_scale"] for row in whole.steps.values()] == [2.0**39, 2.0**39]
    told = [(event["step"], event["loss_scale"]) for event in whole.events if event["kind"] == "step_skipped"]
    assert told == [(1, 2.0**39), (2, 2.0**39), (3, 2.0**38)]
    assert whole.train(2, "checkpoint-2") == 81, whole.log(2)
    for attempt in (1, 2):
        word = whole.last_word(attempt)
        assert (word["kind"], word["step"], word["what"], word["value"]) == ("diverged", 3, "loss_scale", 2.0**38)
    assert summarise(whole.directory)["skipped_steps"] == 3  # the one that ended the run has no row of its own
