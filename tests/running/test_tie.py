"""A process that is tied to its parent does not outlive it, however the parent dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running.small_runs import ROOT, is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")

TIED_CHILD = "[sys.executable, '-m', 'mpt.running.tie', str(os.getpid()), '--', 'sleep', '300']"
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen({command}, start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""
# What a worker does: it is the tied process, or that one's child.
WORKER = """
import os, sys, time
from mpt.running.tie import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(300)
"""


def run_python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def say(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_child_dies_with_its_parent(number: signal.Signals) -> None:
    with run_python(PARENT.format(command=TIED_CHILD)) as parent:
        child = say(parent)
        assert is_alive(child)
        wait_until(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes()[:5])
        parent.send_signal(number)
        parent.wait()
        wait_until(lambda: not is_alive(child))


def test_the_tie_holds_through_a_process_between(tmp_path: Path) -> None:
    """As with torchrun: supervisor, launcher, worker."""
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"
    command = f"[sys.executable, '-m', 'mpt.running.tie', str(os.getpid()), '--', sys.executable, '-c', {between!r}]"
    source = f"""
import os, subprocess, sys, time
subprocess.Popen({command})
time.sleep(300)
"""
    with run_python(source) as parent:
        worker = say(parent)
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_alive(worker))


def test_a_worker_without_a_tied_process_runs_by_itself() -> None:
    """Started by hand, its parent may be anything, process 1 of a container among others."""
    done = subprocess.run(
        [sys.executable, "-c", "from mpt.running.tie import die_with_parent; die_with_parent(); print('runs')"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "runs\n"


def test_a_worker_whose_tied_parent_was_gone_before_it_looked_ends_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mpt.running.tie import die_with_parent; die_with_parent(); print('runs')"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "MPT_TIED_PROCESS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("arguments", [[], ["x", "--", "true"], ["1"], ["1", "true", "x"]])
def test_arguments_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpt.running.tie", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr.startswith("usage:")


def test_a_command_whose_starter_is_gone_is_not_started() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpt.running.tie", "1", "--", "echo", "started"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert "died" in done.stderr
