"""Training programs forked from a process that made the imports: they cost ten times what a tiny run does."""

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


class ForkServer:
    """The process of `fork_server`, and what it has told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.fork_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | ENVIRONMENT, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.ended: dict[int, int] = {}
        self._unread = b""
        atexit.register(self.process.kill)

    def start(self, argv: list[str], log: Path, processes: int = 1) -> "Forked":
        """Start a program that this many processes carry out together; its output goes to the log."""
        request = {"argv": argv, "processes": processes, "log": str(log), "folder": str(Path.cwd())}
        request["environment"] = dict(os.environ | ENVIRONMENT)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(request)}\n".encode())
        self.process.stdin.flush()
        while True:
            for told in self.listen(120):
                if "pid" in told:
                    return Forked(self, told["keeper"], told["pid"])

    def listen(self, seconds: float) -> list[dict[str, int]]:
        """Read what it tells within this time; note what has ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        *lines, self._unread = (self._unread + os.read(self.process.stdout.fileno(), 65536)).split(b"\n")
        assert lines or self.process.poll() is None, "the fork server is gone"
        told = [json.loads(line) for line in lines]
        self.ended |= {one["keeper"]: one["ended"] for one in told if "ended" in one}
        return told


@cache
def fork_server() -> ForkServer:
    """The one of this session."""
    return ForkServer()


@dataclass
class Forked:
    """A forked program, as subprocess.Popen would give it. `pid` is its first rank."""

    server: ForkServer
    keeper: int
    pid: int

    def poll(self) -> int | None:
        self.server.listen(0)
        return self.server.ended.get(self.keeper)

    def wait(self, timeout: float) -> int:
        """Wait for all of its processes; give 0 or the exit status of the first that failed."""
        until = time.monotonic() + timeout
        while self.keeper not in self.server.ended:
            left = until - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            self.server.listen(left)
        return self.server.ended[self.keeper]


# A prelude defines `run(name)`, which carries one program out; `sys.argv` is the program's own.
# Processes that train together find one another as torchrun has them do. Each program's output goes to its log.
FORKS = """
import gc, json, os, socket, sys
import datasets, deepspeed, numpy, peft, tokenizers, torch, torchao
import deepspeed.runtime.zero.muon.muon_optimizer, torch.utils.cpp_extension
from transformers import AutoModelForCausalLM, Trainer
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

def start(program, rank, world_size, port):
    child = os.fork()
    if child:
        return child
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(program["log"], "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = program["argv"]
    run(sys.argv[0])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)

gc.freeze()

for program in json.loads(sys.argv[1]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [start(program, rank, program["processes"], port) for rank in range(program["processes"])]
    ended = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    if ended != {0}:
        sys.exit(f"{program['argv']} ended with {ended}: {open(program['log']).read()[-6000:]}")
"""


def carry_out(prelude: str, programs: list[dict[str, Any]], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Carry programs that are not mpt's out one after another, forked from a process with this prelude.

    Each has `argv`, `processes` (how many train together) and `log`, and must end with status 0.
    """
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-c", f"{prelude}{FORKS}", json.dumps(programs)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
