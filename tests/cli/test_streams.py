"""What a command prints or writes meets pipes, links, devices and full disks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.running.run_directory import write_atomically


def shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"MPT": f"{sys.executable} -m mpt"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_full_stdout_is_one_message_and_the_storage_exit_code(tmp_path: Path) -> None:
    done = shell("$MPT formats > /dev/full", tmp_path)
    assert done.returncode == 83
    assert done.stderr.startswith("error: stdout can't be written")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    done = shell("$MPT plan quickstart --machine T4 | head -1; exit ${PIPESTATUS[1]}", tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_link_is_written_through_and_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_atomically(tmp_path / "pipe", "through the pipe")
    assert reader.communicate(timeout=30)[0] == "through the pipe"
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["quickstart", "model.config.num_key_value_heads=3"], "3 key-value heads"),
        (["quickstart", "data=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_refused_run_says_so_in_json_too_and_leaves_nothing(
    arguments: list[str], problem: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "train", *arguments, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["outcome"] == "refused"
    assert problem in answer["problem"]
    assert problem in done.stderr
    assert not list(tmp_path.iterdir())
