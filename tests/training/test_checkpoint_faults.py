"""Real checkpoints under kills and damage: what is half-written or not what was saved is never gone on from."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpt.running import checkpoints
from mpt.running.run_directory import RunDirectory
from tests.running.test_checkpoints import DAMAGE, flip_a_bit
from tests.training.tiny_runs import Run

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def killed(new_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Path]]:
    """A run that nothing befell, and what its directory held where it was killed in the save of step 4."""
    run = new_run(training={"save_steps": 2, "max_steps": 6})
    run.prepare()
    folder = tmp_path_factory.mktemp("killed") / "points"
    command = [sys.executable, "-m", "tests.training.killed_saves", "4", str(folder), str(run.path), "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return run, sorted(folder.iterdir())


@pytest.mark.fault(2)
def test_a_kill_at_any_point_of_a_save_leaves_the_older_checkpoint_or_the_new_one_and_no_half(
    killed: tuple[Run, list[Path]],
) -> None:
    run, points = killed
    files = list((run.directory.checkpoints / "checkpoint-4").iterdir())
    # After each file, with the manifest whole, renamed, journalled.
    assert len(points) == len(files) + 3
    chosen = []
    for point in points:
        choice = checkpoints.newest_usable(RunDirectory(point))
        assert choice is not None
        assert choice.passed_over == ()
        chosen.append(choice.step)
    assert chosen == [2] * (len(points) - 2) + [4, 4]


@pytest.mark.fault(2)
@pytest.mark.parametrize(("point", "step"), [(-3, 2), (-2, 4)], ids=["with all files written", "renamed"])
def test_a_run_goes_on_bit_for_bit_after_a_kill_in_a_save(
    killed: tuple[Run, list[Path]], point: int, step: int
) -> None:
    whole, points = killed
    resumed = Run(RunDirectory(points[point]), whole.recipe)
    assert resumed.train(2, f"checkpoint-{step}") == 0, resumed.log(2)
    assert resumed.trajectory == whole.trajectory
    assert all(torch.equal(resumed.weights()[name], tensor) for name, tensor in whole.weights().items())
    assert not list(resumed.directory.checkpoints.glob(".*"))


@pytest.fixture
def copy(fp32_run: Run, tmp_path: Path) -> RunDirectory:
    """The checkpoints of a finished run, to be damaged."""
    shutil.copytree(fp32_run.directory.checkpoints, tmp_path / "checkpoints")
    return RunDirectory(tmp_path)


@pytest.mark.fault(17)
@pytest.mark.fault(18)
@pytest.mark.fault(19)
@pytest.mark.fault(20)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_real_checkpoint_is_named_and_the_older_one_is_taken(
    copy: RunDirectory, damage: str
) -> None:
    newest = copy.checkpoints / "checkpoint-8"
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        content = newest.joinpath(name).read_bytes()
        DAMAGE[damage](newest / name)
        choice = checkpoints.newest_usable(copy)
        assert choice is not None
        assert choice.path.name == "checkpoint-4", name
        ((passed_over, wrong),) = choice.passed_over
        assert passed_over == "checkpoint-8"
        assert name in wrong
        newest.joinpath(name).write_bytes(content)
    assert checkpoints.verify(newest) is None


@pytest.mark.fault(18)
def test_a_flipped_bit_is_loaded_without_a_word_by_the_libraries(copy: RunDirectory) -> None:
    """Which is why the hashes are compared."""
    newest = copy.checkpoints / "checkpoint-8"
    flip_a_bit(newest / "model.safetensors")
    flip_a_bit(newest / "optimizer.pt")
    assert load_file(newest / "model.safetensors").keys()
    assert torch.load(newest / "optimizer.pt").keys()
