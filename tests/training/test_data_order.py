"""The data order that a run keeps, whatever interrupts it: random numbers by position, and poisoned data left out."""

import functools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, SequentialSampler

from mpt.hardware.specs import parse_machine
from mpt.planning.data_window import DataWindow
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import resolve
from mpt.running.launcher import build_command
from mpt.running.opening import opened
from mpt.running.recovery import Stop
from mpt.running.run_directory import write_atomically
from mpt.running.signals import listening
from mpt.running.supervisor import supervise
from mpt.training.data_order import SAMPLE_IDS, DataOrder, Place, Placed, PlacedCollator, keyed_randomness
from tests.training.tiny_runs import Run, continue_from

MakeRun = Callable[..., Run]


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_keyed_numbers_follow_from_the_key_and_leave_the_process_its_own() -> None:
    def under(*key: int) -> tuple[float, float, float]:
        with keyed_randomness(*key):
            return drawn()

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    undisturbed = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    first = under(42, 0, 8)
    assert drawn() == undisturbed
    assert under(42, 0, 8) == first
    for other in ((42, 0, 16), (42, 1, 8), (43, 0, 8)):
        assert not set(under(*other)) & set(first)


@pytest.mark.parametrize("kind", [SeedableRandomSampler, RandomSampler, SequentialSampler])
def test_an_order_repeats_for_its_epoch_whatever_was_drawn_before(kind: Any) -> None:
    options = {"data_seed": 42} if kind is SeedableRandomSampler else {}
    orders: list[list[Place]] = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        order = DataOrder(kind(range(50), **options), 42, [])
        order.set_epoch(3)
        orders.append(list(order))
    assert orders[0] == orders[1]
    assert sorted(place.sample for place in orders[0]) == list(range(50))
    assert [place.position for place in orders[0]] == list(range(50))
    if kind is not SequentialSampler:
        order.set_epoch(4)
        assert [place.sample for place in order] != [place.sample for place in orders[0]]


def test_without_windows_the_order_is_the_samplers_own() -> None:
    sampler = SeedableRandomSampler(range(50), data_seed=42)
    order = DataOrder(sampler, 42, [])
    sampler.set_epoch(2)
    theirs = list(sampler)
    order.set_epoch(2)
    assert [place.sample for place in order] == theirs
    left = DataOrder(sampler, 42, [DataWindow(2, 10, 14)])
    left.set_epoch(2)
    assert [place.sample for place in left][:10] == theirs[:10]
    assert [place.sample for place in left][10:46] == theirs[14:]


def test_a_batch_carries_the_numbers_of_its_samples() -> None:
    def stack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.stack([sample["input_ids"] for sample in samples])}

    placed = Placed([{"input_ids": torch.tensor([number])} for number in range(5)])
    collate = PlacedCollator(stack, 42)
    batch = collate(placed.__getitems__([Place(0, 0, 3), Place(0, 1, 1)]))
    assert batch[SAMPLE_IDS].tolist() == [3, 1] and batch["input_ids"].tolist() == [[3], [1]]
    assert SAMPLE_IDS not in collate(placed.__getitems__([3, 1]))  # as evaluation asks for them


@pytest.mark.slow
@pytest.mark.fault(32)
def test_a_collator_that_draws_random_numbers_resumes_bit_for_bit(new_run: MakeRun) -> None:
    def make() -> Run:
        run = new_run(micro_batch_size=4, global_batch_size=8)
        run.fault = {"collator": "drawing"}
        return run

    whole = make()
    assert whole.train() == 0, whole.log()
    resumed = continue_from(whole, "checkpoint-4", make)
    assert resumed.trajectory == whole.trajectory
    ours, theirs = resumed.weights(), whole.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Quiet:
    """A view that shows nothing, and remembers the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def supervised(run: Run, view: Quiet) -> Stop:
    """Carry a run out under the real supervisor, with the faulty worker in the real one's place."""
    plan = resolve(run.recipe, parse_machine("cpu"), learn_model_facts(run.recipe), name="tiny")
    worker = (sys.executable, "-m", "tests.training.faulty_worker", json.dumps(run.fault))
    build = functools.partial(build_command, worker=worker)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with listening() as wish, opened(plan, run.directory, resume="auto", accept_changes=False) as found:
        return supervise(plan, run.directory, view, wish, environment, start_from=found.start_from, build=build)


@pytest.fixture(scope="module")
def poisoned(new_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Stop, Quiet]:
    """A run of several epochs in which one sample makes the loss infinite, whenever it comes."""
    folder = tmp_path_factory.mktemp("poisoned")
    folder.joinpath("text.txt").write_text("\n".join(topics[name] for name in sorted(topics))[:9000])
    run = new_run(
        data={"source": str(folder / "text.txt"), "eval_fraction": 0.0},
        tokenizer={"vocab_size": 300},
        training={"max_steps": 32, "save_steps": 4, "save_total_limit": 20},
        health={"max_bad_in_a_row": 1, "known_good_after": 1},
        recovery={"margin": 1, "exclude_batches": 2},
    )
    run.fault = {"poisoned_at": 6, "kept_in": str(folder / "poisoned.json")}
    view = Quiet()
    return run, supervised(run, view), view


@pytest.mark.slow
@pytest.mark.fault(23)
def test_a_poisoned_sample_is_confirmed_and_then_left_out_for_good(poisoned: tuple[Run, Stop, Quiet]) -> None:
    run, stop, view = poisoned
    assert stop.exit_code == 0, (stop, run.log())
    repairs = run.texts("plan_changed", "repair")
    assert [repair["kind"] for repair in repairs] == ["retry", "exclude_data"]
    assert (
        repairs[1]["values"] | {"code": "N2", "onset": 6, "epoch": 0, "first": 40, "last": 56} == repairs[1]["values"]
    )
    assert run.texts("attempt_started", "resume_from") == [None, "checkpoint-4", "checkpoint-4"]
    assert any("16 samples around it are left out" in note for note in view.notes)
    started = [event for event in run.events if event["kind"] == "training_started"]
    assert started[-1]["max_steps"] > 2 * started[-1]["steps_per_epoch"]  # it would have come again
    assert sorted(run.steps) == list(range(1, 33))
    (bad,) = json.loads(Path(run.fault["kept_in"]).read_text()) if run.fault else ()
    incident = json.loads((run.directory.incidents / "0002" / "autopsy.json").read_text())
    assert bad in incident["sample_ids"] and len(incident["samples"]) == len(incident["sample_ids"]) == 8


@pytest.mark.slow
@pytest.mark.fault(23)
def test_an_excluded_window_survives_a_kill(poisoned: tuple[Run, Stop, Quiet], new_run: MakeRun) -> None:
    run, _, _ = poisoned
    again = new_run()
    again.recipe, again.fault = run.recipe, run.fault
    for kept in ("checkpoints/checkpoint-24", "tokenizer"):
        shutil.copytree(run.path / kept, again.path / kept)
    plan = json.loads(run.directory.attempt(3).plan.read_text()) | {"resume_from": "checkpoint-24"}
    write_atomically(again.directory.attempt(1).plan, json.dumps(plan))
    assert again.start().wait(timeout=400) == 0, again.log()
    assert again.trajectory == {step: row for step, row in run.trajectory.items() if step > 24}
    ours, theirs = again.weights(), run.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
