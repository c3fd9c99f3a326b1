"""The training process: `python -m mpt.training.worker RUN_DIR ATTEMPT`, by itself or under torchrun.

It reads the attempt's plan and obeys it. What happens goes into the run directory: phases and events into the journal,
a row a step into the metrics, and at the end one last word (`finished`, `stopped`, `diverged` or `failed`). The exit
status repeats the last word for whoever started it.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode, MptError
from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
from mpt.running.stacks import answer_with_stacks
from mpt.running.tie import die_with_parent
from mpt.secrets import redact_streams
from mpt.training.allocator import keep_freed_memory
from mpt.training.imports import heavy_imports, leave

# What accelerate's own list (accelerate/utils/memory.py) leaves out: errors that arrive late or from cuBLAS's handle.
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIP error: out of memory")


def main(arguments: list[str]) -> int:
    """Train the attempt; give the exit code."""
    die_with_parent()
    if len(arguments) != 2:
        print("usage: python -m mpt.training.worker RUN_DIR ATTEMPT", file=sys.stderr)
        return ExitCode.USAGE
    # Before the libraries: their loggers keep the stream that they find.
    redact_streams(os.environ)
    run = RunDirectory(Path(arguments[0]))
    number = int(arguments[1])
    rank = int(os.environ.get("RANK", "0"))
    journal = Journal(run.journal, number, rank)
    try:
        return _train(run, number, rank, journal)
    except MptError as error:
        print(f"error: {error.problem}\n{error.remedy}", file=sys.stderr)
        return _last_word_failed(journal, error.problem, error.remedy, error.exit_code)
    except Exception as error:  # noqa: BLE001 - a main function: every end has its last word
        traceback.print_exc()
        problem, remedy, code = explain(error)
        return _last_word_failed(journal, problem, remedy, code)


def _train(run: RunDirectory, number: int, rank: int, journal: Journal) -> int:
    from mpt.training.outcome import Diverged, Stopped, StopRequest

    attempt = run.attempt(number)
    stop = StopRequest(attempt.stop)
    stop.listen()
    answer_with_stacks(attempt, rank)
    heartbeat = Heartbeat(attempt, rank)
    if rank == 0:
        journal.append("phase", phase="imports")
    with heavy_imports():
        quiet_libraries()

        from mpt.planning.plan import Plan

        plan = Plan.from_json(json.loads(attempt.plan.read_text(encoding="utf-8")))
        _choose_device(plan)

        from mpt.training.bad_rows import told_to
        from mpt.training.session import train

    def tell(text: str) -> None:
        if rank == 0:
            journal.append("notice", text=text)

    try:
        with told_to(tell):
            done = train(plan, run, attempt, number, journal, stop, rank, heartbeat)
    except Stopped as stopped:
        return _last_word(journal, rank, ExitCode.STOPPED, "stopped", step=stopped.step, checkpoint=stopped.checkpoint)
    except Diverged as diverged:
        print(f"diverged: {diverged}", file=sys.stderr)
        told = {"step": diverged.step, "what": diverged.what, "value": diverged.value, "code": diverged.code}
        told |= {"reason": diverged.reason, "onset": diverged.onset}
        return _last_word(journal, rank, ExitCode.DIVERGED, "diverged", **told)
    return _last_word(
        journal,
        rank,
        ExitCode.DONE,
        "finished",
        step=done.step,
        train_loss=done.train_loss,
        eval_loss=done.eval_loss,
        metrics=dict(done.metrics),
        stopped_early=None if done.stopped_early is None else dict(done.stopped_early),
    )


def explain(error: BaseException) -> tuple[str, str, ExitCode]:
    """Say what an exception that is no MptError means to the person at the terminal: problem, remedy, exit code."""
    from mpt.training.saving import is_storage_error

    line = " ".join(str(error).split())[:400] or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory: {line}",
            "Set micro_batch_size or data.sequence_length lower, or `gradient_checkpointing: true`.",
            ExitCode.OUT_OF_MEMORY,
        )
    if is_storage_error(error):
        return line, "Free space there, or choose another --runs-dir.", ExitCode.STORAGE
    return (
        f"{type(error).__name__}: {line}",
        "A bug in mpt or below it; the traceback is in the log.",
        ExitCode.BUG,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in the words of any device."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _last_word(journal: Journal, rank: int, exit_code: ExitCode, kind: str, /, **payload: Any) -> int:
    """Write what every rank agreed on, once: rank 0 does."""
    if rank == 0:
        journal.append(kind, **payload)
    _leave_together()
    return exit_code


def _last_word_failed(journal: Journal, problem: str, remedy: str, code: ExitCode) -> int:
    journal.append("failed", problem=problem, remedy=remedy, exit_code=int(code), traceback_in="worker.log")
    return code


def _leave_together() -> None:
    """Wait for rank 0's last word: torchrun ends the others as soon as one rank has left with an error status."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from mpt.training.precision.float8 import quiet_torchao

    quiet_torchao()
    # DeepSpeed calls torch's older names, several times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _choose_device(plan: Any) -> None:
    """Keep DeepSpeed from looking for a GPU where the plan is for the CPU, and the memory where it is needed again."""
    if plan.machine.is_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
