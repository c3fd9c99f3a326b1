"""A plan as a command and its environment; starting and ending the processes of an attempt."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt.planning.plan import Plan
from mpt.running.run_directory import AttemptDirectory, RunDirectory, write_atomically, writing
from mpt.running.trackers import tracker_environment

WORKER = (sys.executable, "-m", "mpt.training.worker")
# Marks every process of an attempt, so that each can be found whatever became of its parents.
MARK = "MPT_ATTEMPT"
# What another launcher may have left in the shell: torchrun and accelerate would obey it instead of the plan.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
FOREIGN_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_")
END_S = 10.0
REPORT_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments; what its environment has beyond the supervisor's, and what it lacks."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Write the command as it can be pasted into a shell."""
        unset = [part for name in self.without for part in ("-u", name)]
        return shlex.join(["env", *unset, *(f"{key}={value}" for key, value in self.environment.items()), *self.argv])


def build_command(
    plan: Plan, run: RunDirectory, attempt: int, environment: Mapping[str, str], worker: tuple[str, ...] = WORKER
) -> Command:
    """Build the command of an attempt: the worker alone for one process, torchrun for more.

    torchrun restarts nothing and meets on a port that it binds itself: a chosen one could be taken meanwhile, and with
    gloo a restart inside torchrun dials the dead attempt's ports (pytorch#135712).
    """
    processes = plan.value("processes_per_node")
    argv = (*worker, str(run.path), str(attempt))
    if processes > 1:
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes))
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", uuid.uuid4().hex)
        place = ("--max-restarts", "0", "--local-addr", "127.0.0.1", "--no-python")
        argv = (*torchrun, *meeting, *place, *argv)
    without = tuple(key for key in environment if key in FOREIGN or key.startswith(FOREIGN_PREFIXES))
    added = worker_environment(plan, processes, environment)
    return Command(argv, added | tracker_environment(plan.value("trackers"), run, environment), without)


def worker_environment(plan: Plan, processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Give what a process of the training zone has in its environment beyond its parent's."""
    cores = plan.machine.cpu_cores or len(os.sched_getaffinity(0))
    added = {
        # CUDA's own order is fastest first; the plan counts devices as the driver does.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Said outright: how many threads share a sum decides its last bits, and with them whether a resumed run is the
        # same run.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(__file__).parents[2] != Path.cwd():
        # `python -m` would look for torch's and datasets' modules in the user's folder first.
        added["PYTHONSAFEPATH"] = "1"
    added = {key: value for key, value in added.items() if key not in environment}
    if plan.machine.is_cpu:
        added |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # Threads that wait for each other actively steal the core that they wait for. On two busy cores a step of a
        # small Llama took 1.7 to 2.9 s with libgomp's default and 0.5 to 0.9 s with this (AMD EPYC, torch 2.13).
        if "OMP_WAIT_POLICY" not in environment:
            added["OMP_WAIT_POLICY"] = "PASSIVE"
    return added


class Processes:
    """The processes of one attempt: a child in a session of its own, tied to this process's life.

    The terminal's Ctrl-C reaches the supervisor alone, and the kernel ends the child with the supervisor.
    """

    def __init__(self, command: Command, files: AttemptDirectory, environment: Mapping[str, str]) -> None:
        """Start `command`, its output in the attempt's log. Raises StorageError where that can't be written."""
        write_atomically(files.command, f"{command}\n")
        self._mark = uuid.uuid4().hex
        inherited = {key: value for key, value in environment.items() if key not in command.without}
        with writing(files.log):
            output = files.log.open("ab")
        with output:
            self._child = subprocess.Popen(
                (sys.executable, "-m", "mpt.running.tie", str(os.getpid()), "--", *command.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **command.environment, MARK: self._mark},
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def pids(self) -> list[int]:
        """Find the live processes of the attempt, whatever became of their parents."""
        return _marked(self._mark)

    def end(self) -> int:
        """Kill what is left, at once; give the child's exit status, negative for a signal."""
        if self._child.poll() is None:
            self._child.kill()
        code = self._child.wait()
        until = time.monotonic() + END_S
        # torchrun gives each worker a session of its own, and a worker's data loaders outlive it for seconds.
        while (left := _marked(self._mark)) and time.monotonic() < until:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        return code


def failed_ranks(log: Path) -> list[tuple[int, int]]:
    """Read torchrun's report at the end of a log: the ranks that ended badly, each with its exit status, negative for a
    signal; the one that torchrun saw first comes first. Empty where there is no report.

    Ranks that torchrun itself asked to end (SIGTERM) are left out.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - REPORT_BYTES))
            end = file.read().decode(errors="replace")
    except OSError:
        return []  # deleted meanwhile, or its disk is gone
    others, is_report, root = end.rpartition("Root Cause (first observed failure)")
    if not is_report:
        return []
    listed = others.rpartition("Failures:")[2]
    found = re.findall(r"rank +: (\d+) .*?exitcode +: (-?\d+) ", f"{root}\n{listed}", re.DOTALL)
    return [(int(rank), int(code)) for rank, code in found if int(code) != -signal.SIGTERM]


def _marked(mark: str) -> list[int]:
    """Find the live processes that carry an attempt's mark in their environment."""
    if sys.platform != "linux":
        return []
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if wanted in process.joinpath("environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it ended, or belongs to somebody else
    return found
