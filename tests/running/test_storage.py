"""A disk that refuses is named before anything starts, and nothing half-written stays."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running.small_runs import SmallRun

NewRun = Callable[..., SmallRun]


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this environment may not mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount("--bind", str(folder), str(folder))
    mount("-o", "remount,ro,bind", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with disk.joinpath("filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_is_refused_before_anything_starts(small_disk: Path) -> None:
    fill(small_disk)
    ended = SmallRun(small_disk / "runs").train()
    assert ended.code == 83
    assert "No space left on device" in ended.err
    assert "--runs-dir" in ended.err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.fault(16)
def test_a_disk_that_is_read_only_is_refused(read_only: Path) -> None:
    ended = SmallRun(read_only / "runs").train()
    assert ended.code == 83
    assert "Read-only file system" in ended.err
    assert list(read_only.iterdir()) == []


@pytest.mark.fault(16)
@pytest.mark.parametrize("place", ["runs", "runs/small"])
def test_a_file_in_the_place_of_a_folder_is_refused_and_stays(new_run: NewRun, place: str) -> None:
    run = new_run()
    path = run.runs_dir.with_name("x") if place == "runs" else run.runs_dir / "small"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    refused = (SmallRun(path) if place == "runs" else run).train()
    assert refused.code == 83
    assert path.read_text() == "a file"


def test_a_disk_that_fills_up_ends_the_run_and_more_space_lets_it_go_on(small_disk: Path) -> None:
    run = SmallRun(small_disk / "runs", {"step_s": 0.02, "faults": [{"attempt": 1, "step": 13, "do": "kill"}]})
    process = run.start()
    while run.steps < 11:
        assert process.poll() is None
    fill(small_disk)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 83, err
    assert "No space left" in err
    os.unlink(small_disk / "filler")  # noqa: PTH108
    assert run.train().code == 0
    straight = SmallRun(small_disk / "straight")
    straight.train()
    assert run.state == straight.state
