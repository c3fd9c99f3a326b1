"""Runs of the small worker under the real supervisor, each supervisor a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.running.journal import read_events
from mpt.running.launcher import MARK
from mpt.running.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "tests.running.small_train")


def small_plan(
    *,
    max_steps: int = 20,
    processes: int = 1,
    zero_stage: int = 0,
    micro_batch_size: int = 1,
    global_batch_size: int | None = None,
    compare: dict[str, Any] | None = None,
    recovery: dict[str, Any] | None = None,
    **restart: Any,
) -> Plan:
    """Plan a tiny model on a CPU; the small worker obeys of it only where to resume. `restart` is that block."""
    recipe = Recipe.model_validate(
        {
            "model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 300},
            "data": {"source": "builtin:python-reference", "sequence_length": 64},
            "micro_batch_size": micro_batch_size,
            "training": {"max_steps": max_steps},
            "restart": {"max_restarts": 3} | restart,
            "distributed": {"processes_per_node": processes, "strategy": f"zero{zero_stage}" if zero_stage else "auto"},
        }
        | {key: block for key, block in (("compare", compare), ("recovery", recovery)) if block is not None}
        | ({} if global_batch_size is None else {"global_batch_size": global_batch_size})
    )
    return resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="small")


@dataclass
class SmallRun:
    """A runs folder, and the supervisors started in it. `wishes` is what the worker is to do and suffer."""

    runs_dir: Path
    wishes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.runs_dir / "small")

    def start(self, *changes: str, resume: str = "auto") -> "subprocess.Popen[str]":
        """Start a supervisor and give its process."""
        environment = os.environ | {"SMALL_WORKER": json.dumps(self.wishes), "OMP_NUM_THREADS": "1"} | self.environment
        environment["PYTHONPATH"] = str(ROOT)
        process = subprocess.Popen(
            [*PROGRAM, str(self.runs_dir), resume, *changes],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.started.append(process)
        return process

    def train(self, *changes: str, resume: str = "auto", timeout: float = 120) -> "Ended":
        """Run a supervisor to its end."""
        return wait(self.start(*changes, resume=resume), timeout)

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.directory.journal)

    def kinds(self, kind: str, key: str) -> list[Any]:
        return [event.get(key) for event in self.events if event["kind"] == kind]

    @property
    def steps(self) -> int:
        """Rows in the metrics so far."""
        return len(self.directory.metrics.read_text().splitlines()) if self.directory.metrics.exists() else 0

    @property
    def state(self) -> str:
        """The "weights" of the finished run."""
        return self.directory.final.joinpath("state").read_text()

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.directory.checkpoints.iterdir())


@dataclass
class Ended:
    """How a supervisor ended."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


def wait(process: "subprocess.Popen[str]", timeout: float = 120) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    """Wait for something that another process does."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers_of(run: SmallRun) -> list[int]:
    """Find every live process that an attempt started, by the mark in its environment and the run's path."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                environ = process.joinpath("environ").read_bytes()
                command = process.joinpath("cmdline").read_bytes()
            except OSError:
                continue
            if MARK.encode() in environ and str(run.runs_dir).encode() in command:
                found.append(int(process.name))
    return found


def kill_all(run: SmallRun) -> None:
    for process in run.started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
