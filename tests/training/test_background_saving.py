"""Checkpoints that a thread writes while the training goes on: the same ones, and no less safe."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.running import checkpoints
from mpt.training.background import Background, copied
from tests.training.tiny_runs import Run, continue_from

MakeRun = Callable[..., Run]
SAVES = {"background_saving": True, "training": {"save_steps": 2, "max_steps": 8, "save_total_limit": 9}}


def same_weights(run: Run, other: Run) -> bool:
    ours, theirs = run.weights(), other.weights()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def saved(run: Run) -> list[int]:
    assert checkpoints.newest_usable(run.directory) is not None
    return [step for step, _ in checkpoints.list_checkpoints(run.directory)]


def test_a_copy_is_apart_from_what_it_was_copied_from_and_ties_stay() -> None:
    weight = torch.ones(3)
    state = {"a": weight, "tied": weight, "nested": [{"b": torch.zeros(2)}, 5, None], "view": weight[:2]}
    copy = copied(state)
    weight.add_(1)
    assert copy["a"].tolist() == [1, 1, 1] and copy["view"].tolist() == [1, 1]
    assert copy["a"] is copy["tied"]
    assert copy["nested"][1:] == [5, None]


def test_tensors_without_a_storage_of_their_own_are_copied_each() -> None:
    from torchao.optim import AdamW8bit

    weights = [torch.nn.Parameter(torch.randn(256, 32)) for _ in range(2)]
    optimizer = AdamW8bit(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    copy = copied(state)
    for number in state:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(copy[number][name].dequantize(), state[number][name].dequantize())


def test_a_writer_may_empty_the_dictionary_that_it_is_given() -> None:
    background = Background()
    given: list[dict[str, Any]] = []

    def write(state: dict[str, Any]) -> None:
        given.append(dict(state))
        state.clear()

    with background.copying() as writes:
        background.write_later(write, {"a": torch.ones(2)})
    for _ in range(2):
        writes[0]()
    assert [list(state) for state in given] == [["a"], ["a"]]


@pytest.mark.slow
def test_a_checkpoint_written_meanwhile_is_the_one_that_training_waits_for(new_run: MakeRun, fp32_run: Run) -> None:
    run = new_run(**SAVES)
    assert run.train() == 0, run.log()
    assert (run.trajectory, saved(run)) == (fp32_run.trajectory, [2, 4, 6, 8])
    assert same_weights(run, fp32_run)
    assert run.texts("checkpoint_saved", "step") == [2, 4, 6, 8]

    def files(other: Run) -> dict[str, int]:
        folder = other.directory.checkpoints / "checkpoint-4"
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")}

    assert files(run) == files(fp32_run)
    resumed = continue_from(run, "checkpoint-4", lambda: new_run(**SAVES))
    assert resumed.trajectory == run.trajectory
    assert same_weights(resumed, run)


@pytest.mark.slow
def test_two_ranks_and_adapters_save_in_the_background_too(new_run: MakeRun, fp32_run: Run) -> None:
    model = {"name_or_path": str(fp32_run.directory.final), "config": None}
    keys: dict[str, Any] = SAVES | {"model": model, "tokenizer": None, "lora": {"rank": 4}}
    run = new_run(**keys, distributed={"strategy": "ddp", "processes_per_node": 2}, micro_batch_size=4)
    assert run.train(processes=2) == 0, run.log()
    assert saved(run) == [2, 4, 6, 8]
    folder = run.directory.checkpoints / "checkpoint-4"
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= {
        file.name for file in folder.iterdir()
    }
    again = new_run(**keys, distributed={"strategy": "ddp", "processes_per_node": 2}, micro_batch_size=4)
    shutil.copytree(folder, again.directory.checkpoints / "checkpoint-4")
    assert again.train(2, "checkpoint-4", processes=2) == 0, again.log(2)
    assert again.trajectory == {step: row for step, row in run.trajectory.items() if step > 4}


@pytest.mark.slow
def test_a_disk_that_refuses_the_thread_costs_that_checkpoint_alone(new_run: MakeRun) -> None:
    run = new_run(**SAVES)
    run.fault = {"file_limit": 100_000, "in_background": [4]}
    assert run.train() == 0, run.log()
    assert saved(run) == [2, 6, 8]
    assert run.texts("save_failed", "step") == [4]
    assert not list(Path(run.directory.checkpoints).glob(".staging-*"))


@pytest.mark.slow
def test_a_second_try_writes_all_of_it(new_run: MakeRun, fp32_run: Run) -> None:
    run = new_run(**SAVES)
    run.fault = {"file_limit": 100_000, "in_background": [4], "tries": 1}
    assert run.train() == 0, run.log()
    assert saved(run) == [2, 4, 6, 8]
    assert run.texts("save_failed", "step") == []
    ours, theirs = (other.weights(other.directory.checkpoints / "checkpoint-4") for other in (run, fp32_run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_the_checkpoint_before(new_run: MakeRun, fp32_run: Run) -> None:
    run = new_run(**SAVES)
    run.fault = {"dies_in_background": 6}
    assert run.train() == -signal.SIGKILL
    newest = checkpoints.newest_usable(run.directory)
    assert newest is not None and newest.step == 4
    run.fault = None
    assert run.train(2, "checkpoint-4") == 0, run.log(2)
    assert run.trajectory == fp32_run.trajectory
    assert same_weights(run, fp32_run)
