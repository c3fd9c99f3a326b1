"""A checkpoint is offered only if it is what was saved, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.errors import MptError, NoUsableCheckpointError
from mpt.running import checkpoints
from mpt.running.run_directory import RunDirectory

FILES = {"model.safetensors": b"weights" * 1000, "optimizer.pt": b"moments" * 2000, "sub/state.json": b"{}"}


def save(run: RunDirectory, step: int, files: dict[str, bytes] = FILES) -> Path:
    staging = run.checkpoints / f".staging-{step}"
    for name, content in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content)
    final = run.checkpoints / f"checkpoint-{step}"
    checkpoints.commit(staging, final, step=step, world_size=2)
    return final


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_a_committed_checkpoint_verifies_and_holds_every_file(run: RunDirectory) -> None:
    path = save(run, 5)
    assert checkpoints.verify(path) is None
    manifest = checkpoints.read_manifest(path)
    assert (manifest["step"], manifest["world_size"], set(manifest["files"])) == (5, 2, set(FILES))
    assert manifest["files"]["model.safetensors"]["size"] == 7000
    assert not (run.checkpoints / ".staging-5").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 6 // 10] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "bit_flipped": flip_a_bit,
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_taken(run: RunDirectory, name: str, damage: str) -> None:
    save(run, 5)
    newest = save(run, 10)
    if name == "manifest.json" and damage == "bit_flipped":
        text = (newest / name).read_text()
        (newest / name).write_text(text.replace('"size": 7000', '"size": 7001'))
    else:
        DAMAGE[damage](newest / name)
    assert checkpoints.verify(newest) is not None
    choice = checkpoints.newest_usable(run)
    assert choice is not None
    assert (choice.step, choice.path.name) == (5, "checkpoint-5")
    assert [passed for passed, _ in choice.passed_over] == ["checkpoint-10"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"step": 5, "files": {}}', '{"step": 5, "files": {"a": 1}}', "nul"])
def test_a_manifest_that_is_none_is_noticed(run: RunDirectory, manifest: str) -> None:
    path = save(run, 5)
    path.joinpath("manifest.json").write_text(manifest)
    assert "manifest" in str(checkpoints.verify(path))


def test_a_checkpoint_under_another_step_s_name_is_refused(run: RunDirectory) -> None:
    shutil.copytree(save(run, 5), run.checkpoints / "checkpoint-50")
    assert "step 5" in str(checkpoints.verify(run.checkpoints / "checkpoint-50"))


def test_no_checkpoint_is_none_and_only_bad_ones_are_an_error(run: RunDirectory) -> None:
    assert checkpoints.newest_usable(run) is None
    for step in (5, 10):
        flip_a_bit(save(run, step) / "optimizer.pt")
    with pytest.raises(NoUsableCheckpointError, match=r"checkpoint-10.*checkpoint-5") as error:
        checkpoints.newest_usable(run)
    assert error.value.exit_code == 84


def test_the_newest_is_the_highest_step_whatever_the_clock_said(run: RunDirectory) -> None:
    for step in (9, 10, 100):
        os.utime(save(run, step), (10**9 - step * 1000, 10**9 - step * 1000))
    assert checkpoints.newest_usable(run).step == 100  # type: ignore[union-attr]
    assert checkpoints.prune(run, 1) == ["checkpoint-9", "checkpoint-10"]


def test_what_is_not_a_finished_checkpoint_is_not_offered(run: RunDirectory) -> None:
    save(run, 5)
    for name in (".staging-9", ".trash-checkpoint-8", "checkpoint-7x", "quarantine-1"):
        (run.checkpoints / name).mkdir()
    run.checkpoints.joinpath("checkpoint-30").write_text("a file")
    assert [step for step, _ in checkpoints.list_checkpoints(run)] == [5]


@pytest.mark.parametrize(
    ("keep", "protect", "left"),
    [(1, set(), [15]), (2, {"checkpoint-5"}, [5, 10, 15]), (9, set(), [5, 10, 15])],
)
def test_pruning_keeps_the_newest_and_the_protected(
    run: RunDirectory, keep: int, protect: set[str], left: list[int]
) -> None:
    for step in (5, 10, 15):
        save(run, step)
    checkpoints.prune(run, keep, protect)
    assert [step for step, _ in checkpoints.list_checkpoints(run)] == left
    assert not list(run.checkpoints.glob(".trash-*"))


def test_saving_a_step_again_replaces_it(run: RunDirectory) -> None:
    save(run, 5)
    path = save(run, 5, {"model.safetensors": b"other"})
    assert checkpoints.verify(path) is None
    assert path.joinpath("model.safetensors").read_bytes() == b"other"
    assert not path.joinpath("optimizer.pt").exists()


def test_going_back_moves_later_checkpoints_out_of_reach(run: RunDirectory) -> None:
    for step in (5, 10, 15):
        save(run, step)
    assert checkpoints.quarantine_later(run, 5) == ["checkpoint-10", "checkpoint-15"]
    assert checkpoints.newest_usable(run).step == 5  # type: ignore[union-attr]
    save(run, 10)
    checkpoints.quarantine_later(run, 5)
    kept = {str(path.relative_to(run.checkpoints)) for path in run.checkpoints.glob("quarantine-*/*")}
    assert kept == {"quarantine-1/checkpoint-10", "quarantine-1/checkpoint-15", "quarantine-2/checkpoint-10"}


def test_a_checkpoint_can_be_named_by_folder_step_or_path(run: RunDirectory, tmp_path: Path) -> None:
    save(run, 5)
    path = save(run, 10)
    for name in ("checkpoint-10", "10", str(path), f"{path}/"):
        assert checkpoints.named(run, name).step == 10
    elsewhere = tmp_path / "elsewhere" / "checkpoint-10"
    shutil.copytree(path, elsewhere)
    for name in ("checkpoint-11", "1", str(elsewhere), ""):
        with pytest.raises(MptError, match="there is no checkpoint") as error:
            checkpoints.named(run, name)
        assert error.value.exit_code == 2
        assert "checkpoint-5, checkpoint-10" in error.value.remedy
    truncate(path / "optimizer.pt")
    with pytest.raises(NoUsableCheckpointError, match=r"optimizer.pt has 7000 bytes"):
        checkpoints.named(run, "checkpoint-10")


# Kills the process at the n-th call of something that touches the disk's names or its durability.
COMMIT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from mpt.running import checkpoints
countdown = int(sys.argv[2])
def fuse(function):
    def burning(*arguments, **keywords):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return burning
for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
    setattr(os, name, fuse(getattr(os, name)))
folder = Path(sys.argv[1])
checkpoints.commit(folder / ".staging-10", folder / "checkpoint-10", step=10, world_size=1)
checkpoints.prune(checkpoints.RunDirectory(folder.parent), 1)
print("whole")
"""


@pytest.mark.parametrize("moment", range(1, 40))
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(run: RunDirectory, moment: int) -> None:
    save(run, 5)
    save(run, 10, {"model.safetensors": b"of an abandoned attempt"})
    staging = run.checkpoints / ".staging-10"
    (staging / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (staging / name).write_bytes(content)
    command = [sys.executable, "-c", COMMIT_AND_DIE, str(run.checkpoints), str(moment)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    choice = checkpoints.newest_usable(run)
    assert choice is not None
    assert choice.passed_over == ()  # nothing half-written has a checkpoint's name
    assert choice.step in (5, 10)
    if done.stdout:
        assert choice.step == 10
        assert json.loads((choice.path / "manifest.json").read_text())["files"].keys() == FILES.keys()
