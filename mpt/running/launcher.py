"""A plan as a command and its environment; starting and ending that process group."""

import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt.planning.plan import Plan
from mpt.running.run_directory import RunDirectory, write_atomically

WORKER = ("-m", "mpt.training.worker")
# How long processes that were asked to end may take before they are killed.
TERMINATION_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments, and what its environment has beyond the supervisor's."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """Write the command as it can be pasted into a shell."""
        return shlex.join([*(f"{key}={value}" for key, value in self.environment.items()), *self.argv])


def build_command(plan: Plan, run: RunDirectory, attempt: int, environment: Mapping[str, str]) -> Command:
    """Build the worker's command: plain Python for one process, torchrun for more.

    torchrun restarts nothing and rendezvous on a port that is free at that moment: with gloo a restart inside torchrun
    dials the dead attempt's ports (pytorch#135712).
    """
    processes = plan.value("processes_per_node")
    worker = (*WORKER, str(run.path), str(attempt))
    if processes == 1:
        argv: tuple[str, ...] = (sys.executable, *worker)
    else:
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes))
        rendezvous = ("--max-restarts", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
        identity = ("--rdzv-id", uuid.uuid4().hex, "--local-addr", "127.0.0.1")
        argv = (sys.executable, *torchrun, *rendezvous, *identity, *worker)
    return Command(argv, _environment(plan, processes, environment))


def _environment(plan: Plan, processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    cores = plan.machine.cpu_cores or len(os.sched_getaffinity(0))
    added = {
        # CUDA's own order is fastest first; the plan counts devices as the driver does.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Said outright, so that a resumed run divides sums as the first attempt did.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    added = {key: value for key, value in added.items() if key not in environment}
    if plan.machine.is_cpu:
        added |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return added


def start(command: Command, log: Path, note: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, its output in `log`, tied to this process's life.

    The terminal's Ctrl-C then reaches the supervisor alone, and the kernel ends the child with the supervisor.
    """
    write_atomically(note, f"{command}\n")
    tied = (sys.executable, "-m", "mpt.running.tie", str(os.getpid()), "--", *command.argv)
    with log.open("ab") as output:
        return subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )


def end(process: "subprocess.Popen[bytes]", *, grace_s: float = TERMINATION_GRACE_S) -> int:
    """End a child and its process group: SIGTERM, then SIGKILL after `grace_s` seconds (0: at once)."""
    if grace_s > 0 and process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
    _signal_group(process, signal.SIGKILL)
    return process.wait()


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
