"""One supervisor a run directory, and never one too few."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.errors import RunLockedError, StorageError
from mpt.running.lock import locked, owner_of

HOLD = """
import subprocess, sys, time
from pathlib import Path
from mpt.running.lock import locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_live_owner_is_named_with_pid_and_host(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path), pytest.raises(RunLockedError) as error, locked(path):
        pytest.fail("both hold it")
    assert error.value.exit_code == 85
    assert f"process {os.getpid()} on {socket.gethostname()}" in error.value.problem


def test_who_holds_a_lock_can_be_asked_without_taking_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert owner_of(path) is None
    with locked(path):
        assert str(owner_of(path)).startswith(f"process {os.getpid()} on ")
    assert owner_of(path) is None
    with locked(path):
        path.write_text("{torn")
        assert owner_of(path) == "another process"


def test_the_lock_says_who_and_since_when_and_in_which_boot(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        owner = json.loads(path.read_text())
    assert owner["pid"] == os.getpid()
    assert owner["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.fault(3)
@pytest.mark.fault(31)
def test_the_lock_of_a_killed_owner_is_taken_over_though_its_child_lives(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(RunLockedError, match=f"process {owner.pid} "), locked(path):
            pass
        owner.kill()
        owner.wait()
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


@pytest.mark.fault(31)
@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "other", "since": "x"}' + " " * 500])
def test_what_a_dead_owner_left_in_the_file_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.fault(31)
@pytest.mark.parametrize("boot_id", ["this", "another"])
def test_a_number_that_another_process_has_by_now_does_not_keep_the_lock(tmp_path: Path, boot_id: str) -> None:
    """The dead owner's pid was given out again, in this boot or after another one."""
    path = tmp_path / "lock"
    with locked(path):
        owner = json.loads(path.read_text())
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        left = owner | {"pid": stranger.pid} | ({} if boot_id == "this" else {"boot_id": "another"})
        path.write_text(json.dumps(left))
        assert owner_of(path) is None
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_lock_that_can_not_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be written"), locked(tmp_path / "missing" / "lock"):
        pass


def test_the_lock_of_another_host_says_when_it_comes_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.write_text(json.dumps({"pid": 7, "host": "node-17", "since": "2026-01-01T00:00:00+00:00"}))
        with pytest.raises(RunLockedError, match="process 7 on node-17") as error, locked(path):
            pytest.fail("both hold it")
    assert "If node-17 is dead" in error.value.remedy


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(StorageError, match="has no locks") as error, locked(tmp_path / "lock"):
        pytest.fail("it was taken")
    assert error.value.exit_code == 83
    assert "--runs-dir" in error.value.remedy
