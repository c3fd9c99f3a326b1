"""The process that made the imports once, and forks each program that it is asked for: they cost ten times what a tiny
run does.

`python -m tests.training.fork_server` reads a request a line (`argv`, `processes`, `log`, `folder`, `environment`), and
writes what became of it: {"keeper", "pid"} when it runs, {"keeper", "ended"} when it is over. It ends with its input.
`argv[0]` says which program: `worker` (mpt's), `faulty` (mpt's with a fault) or `cells` (the matrix's).
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpt.running.tie import die_with_parent
from mpt.training.worker import quiet_libraries

# What a worker imports, and what libraries import at their first use.
IMPORTS = (
    *("datasets", "peft", "tensorboard", "torchao", "torch.utils.cpp_extension", "networkx"),
    *("deepspeed.moe.ep_router", "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    *(
        "transformers.models.bert.modeling_bert",
        "mpt.training.tasks.masked_lm",
        "mpt.training.tasks.sequence_classification",
        "sklearn.metrics",
    ),
    *(
        "mpt.training.session",
        "mpt.training.autopsy",
        "mpt.training.compare_gradients",
        "mpt.training.tasks.causal_lm",
        "mpt.training.tasks.sft",
    ),
    *("tests.training.faulty_worker", "tests.training.matrix_cells"),
)
LEAVE_S = 5.0  # for ranks to end by themselves after one has failed; torchrun gives them 30 seconds


def main() -> None:
    quiet_libraries()
    for module in IMPORTS:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all of the memory
    for line in sys.stdin:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if os.fork() == 0:
            die_with_parent()
            keep(json.loads(line))


def keep(request: dict[str, Any]) -> None:
    """Stand between the server and a program: start its ranks, end them as torchrun does, and tell its exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(request["processes"]):
        child = os.fork()
        if child == 0:
            be_rank(request, rank, port)
            leave(program_of(request["argv"]), request["argv"][1:])
        ranks[child] = rank
    say(pid=next(iter(ranks)))
    ended = 0
    while ranks:
        child, status = os.waitpid(-1, 0)
        del ranks[child]
        ended = ended or os.waitstatus_to_exitcode(status)
        if ended and ranks:
            end(ranks)
    say(ended=ended)
    os._exit(0)


def be_rank(request: dict[str, Any], rank: int, port: int) -> None:
    """Give a forked process its own output, folder and environment; ranks find one another as torchrun has them do."""
    with Path(os.devnull).open() as nothing, Path(request["log"]).open("a") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        size = str(request["processes"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def leave(program: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Carry the program out and end without what an interpreter tidies up, which would copy all of the memory."""
    status = 1
    try:
        status = program(arguments)
    except BaseException:  # noqa: BLE001 - the process ends here, whatever ends the program
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def program_of(argv: list[str]) -> Callable[[list[str]], int]:
    from mpt.training import worker
    from tests.training import faulty_worker, matrix_cells

    sys.argv = argv
    return {"worker": worker.main, "faulty": faulty_worker.main, "cells": matrix_cells.main}[argv[0]]


def end(ranks: dict[int, int]) -> None:
    """End the ranks that are left when one has failed."""
    until = time.monotonic() + LEAVE_S
    while ranks and time.monotonic() < until:
        child, _ = os.waitpid(-1, os.WNOHANG)
        ranks.pop(child, None)
        time.sleep(0.02)
    for child in ranks:
        os.kill(child, signal.SIGKILL)


def say(**what: int) -> None:
    os.write(1, f"{json.dumps({'keeper': os.getpid()} | what)}\n".encode())


if __name__ == "__main__":
    main()
