"""The promise: a run that is killed, wherever and however often, ends as the run that nobody killed, bit for bit."""

import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpt.reporting.summary import read_rows
from mpt.running.heartbeat import read_beat
from tests.cli.real_runs import RECIPE, Folder
from tests.running.small_runs import is_alive, wait_until

pytestmark = pytest.mark.slow
SEED = 20260101
# Dropout, accumulation, and an epoch of 8 steps, so that random numbers and data order have to be taken up midway.
MODEL = {
    "model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 32,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
}  # fmt: skip
CHANGES: dict[str, Any] = {
    "model": {"config": MODEL},
    "data": {"source": "short.txt", "sequence_length": 32, "eval_fraction": 0},
    "training": {"num_train_epochs": 3, "save_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
}


def write(folder: Folder, **changes: Any) -> None:
    folder.write(**{key: value for key, value in RECIPE.items() if key != "sample"} | CHANGES | changes, sample=None)
    text = folder.path.joinpath("reference.txt").read_text(encoding="utf-8")
    folder.path.joinpath("short.txt").write_text(text[:1900], encoding="utf-8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run that nobody kills."""
    folder = Folder(tmp_path_factory.mktemp("undisturbed"))
    write(folder)
    done = folder.train("tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert 20 <= len(read_rows(folder.run)) <= 30
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "killed")
    write(made)
    return made


def moments() -> list[int]:
    """Choose a step to kill after, one in each half of the run."""
    chance = random.Random(SEED)
    return [chance.randint(2, 10), chance.randint(12, 18)]


def wait_for_step(folder: Folder, step: int, attempt: int, process: "subprocess.Popen[str]") -> None:
    def reached() -> bool:
        assert process.poll() is None, "the run ended before it could be killed"
        return any(row["attempt"] == attempt and row["step"] >= step for row in folder.rows)

    wait_until(reached, timeout=300)


def worker_of(process: "subprocess.Popen[str]") -> int:
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(worker)


def check_equal(folder: Folder, undisturbed: Folder) -> None:
    weights = [where.run.final.joinpath("model.safetensors").read_bytes() for where in (folder, undisturbed)]
    assert weights[0] == weights[1]
    keys = ("loss", "grad_norm", "learning_rate", "tokens")
    rows = [
        {step: [row[key] for key in keys] for step, row in read_rows(where.run).items()}
        for where in (folder, undisturbed)
    ]
    assert rows[0] == rows[1]
    (first,) = folder.listed("finished", "train_loss")
    assert [first] == undisturbed.listed("finished", "train_loss")


@pytest.mark.fault(1)
def test_a_killed_worker_changes_nothing_about_the_result(folder: Folder, undisturbed: Folder) -> None:
    process = folder.start("tiny.yaml")
    for attempt, step in enumerate(moments(), 1):
        wait_for_step(folder, step, attempt, process)
        os.kill(worker_of(process), signal.SIGKILL)
        await_restart(folder, attempt, process)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert folder.listed("attempt_ended", "verdict") == ["restart", "restart", "finished"]
    check_equal(folder, undisturbed)


def await_restart(folder: Folder, attempt: int, process: "subprocess.Popen[str]") -> None:
    wait_until(lambda: len(folder.listed("attempt_started", "attempt")) > attempt or process.poll() is not None)


@pytest.mark.fault(3)
def test_a_killed_supervisor_takes_its_worker_along_and_changes_nothing_about_the_result(
    folder: Folder, undisturbed: Folder
) -> None:
    for attempt, step in enumerate(moments(), 1):
        process = folder.start("tiny.yaml")
        wait_for_step(folder, step, attempt, process)
        worker = worker_of(process)
        process.kill()
        process.communicate()
        wait_until(lambda: not is_alive(worker))  # noqa: B023
    done = folder.train("tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert len(folder.listed("attempt_started", "attempt")) == 3
    assert folder.listed("run_finished", "exit_code") == [0]
    check_equal(folder, undisturbed)


@pytest.mark.fault(5)
def test_a_stop_in_a_step_changes_nothing_about_the_result(folder: Folder, undisturbed: Folder) -> None:
    process = folder.start("tiny.yaml")
    wait_for_step(folder, 6, 1, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 80, err
    done = folder.train("tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert folder.listed("attempt_started", "resume_from") == [None, *folder.listed("stopped", "checkpoint")]
    check_equal(folder, undisturbed)


@pytest.mark.fault(11)
def test_one_of_two_ranks_killed_ends_the_other_and_changes_nothing_about_the_result(tmp_path: Path) -> None:
    """Over gloo, where the other rank waits for it in a collective."""
    folders = [Folder(tmp_path / name) for name in ("killed", "undisturbed")]
    for folder in folders:
        write(folder, distributed={"processes_per_node": 2}, gradient_accumulation_steps=1)
    killed, undisturbed = folders
    assert undisturbed.train("tiny.yaml").returncode == 0
    process = killed.start("tiny.yaml")
    wait_for_step(killed, 7, 1, process)
    pids = [beat.pid for rank in (0, 1) if (beat := read_beat(killed.run.attempt(1).heartbeat(rank))) is not None]
    os.kill(pids[1], signal.SIGKILL)
    await_restart(killed, 1, process)
    assert not any(map(is_alive, pids))
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert killed.listed("attempt_ended", "reason")[0].startswith("rank 1 was killed (SIGKILL)")
    assert killed.listed("attempt_started", "resume_from") == [None, "checkpoint-5"]
    check_equal(killed, undisturbed)
