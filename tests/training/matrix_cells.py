"""Train many tiny recipes one after another in this process (or this group of processes): `cells CELLS OUT`.

The fork server starts it. CELLS is a JSON list of {"name", "recipe"} and, for one that goes on from another's
checkpoint, {"continues": [name, checkpoint]}; OUT becomes {name: {"error"} or {"audit", "losses", "folder", ...}}.
Joining a group of processes and DeepSpeed's first set-up cost more than a cell. Each cell is what the worker does: a
plan in a run directory, `session.train`, the audit's file.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.engines import check_trainable
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory, write_atomically

WIRE: set[str] = set()  # the formats of what was summed over ranks since the cell began, small tensors aside
TRAINERS: list[Any] = []  # the cell's


def run_cell(cell: dict[str, Any], folder: Path, rank: int, folders: dict[str, Path]) -> dict[str, Any]:
    """Train a cell; give its audit and losses, or the message of the refusal."""
    from mpt.training.outcome import Diverged, Stopped, StopRequest
    from mpt.training.session import train

    run = RunDirectory(folder)
    attempt = run.attempt(1)
    if rank == 0:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        recipe = Recipe.model_validate(cell["recipe"])
        plan = resolve(
            recipe, parse_machine("cpu"), learn_model_facts(recipe), name="cell", modules=learn_modules(recipe)
        )
        check_trainable(plan)
        data = json.loads(json.dumps(plan.to_json()))
        if "continues" in cell:
            whole, checkpoint = cell["continues"]
            data["resume_from"] = checkpoint
            if rank == 0:
                part = f"checkpoints/{checkpoint}"
                shutil.copytree(folders[whole] / part, folder / part)
        if rank == 0:
            write_atomically(attempt.plan, json.dumps(data))
        _barrier()
        _forget_the_last_one()
        plan = Plan.from_json(data)
        journal, stop, heartbeat = Journal(run.journal, 1, rank), StopRequest(attempt.stop), Heartbeat(attempt, rank)
        train(plan, run, attempt, 1, journal, stop, rank, heartbeat)
    except (MptError, ValueError) as error:
        said = error.problem if isinstance(error, MptError) else str(error)
        return {"error": said, "folder": str(folder)}
    except (Diverged, Stopped) as error:
        return {"error": str(error), "folder": str(folder)}
    _barrier()
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    report = json.loads(attempt.audit.read_text())
    return {
        "folder": str(folder),
        "losses": [row["loss"] for row in rows if "loss" in row],
        "skipped": [bool(row["skipped"]) for row in rows if "loss" in row],
        "scales": [row["loss_scale"] for row in rows if "loss" in row],
        "wire": sorted(WIRE),
        "ranks": _of_every_rank(_what_this_rank_holds()),
        "passed": report["passed"],
        "audit": {check["what"]: check["found"] for check in report["checks"]},
    }


def _forget_the_last_one() -> None:
    """Reset what accelerate, transformers and DeepSpeed keep for a process that trains once."""
    from accelerate.state import AcceleratorState
    from transformers.integrations import deepspeed as hf_deepspeed

    AcceleratorState._reset_state()
    hf_deepspeed.unset_hf_deepspeed_config()
    if "deepspeed" in sys.modules:
        from deepspeed.runtime import torch_autocast

        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def _watch_what_is_made_and_sent() -> None:
    """Keep the trainer that the session makes, and note the formats of the sums over ranks."""
    import torch.distributed as dist

    from mpt.training import session

    class KeptTrainer(session.PlanTrainer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            TRAINERS[:] = [self]

    session.PlanTrainer = KeptTrainer  # type: ignore[misc]
    summed = dist.all_reduce

    @functools.wraps(summed)
    def noting(tensor: Any, *arguments: Any, **keywords: Any) -> Any:
        if tensor.numel() > 1000:
            WIRE.add(str(tensor.dtype).removeprefix("torch."))
        return summed(tensor, *arguments, **keywords)

    dist.all_reduce = noting


def _what_this_rank_holds() -> dict[str, Any]:
    """Hash this rank's weights, and what its optimizer updates; and say which shard the optimizer rounds for."""
    from mpt.training import findings

    trainer = TRAINERS[0]
    is_deepspeed = trainer.is_deepspeed_enabled
    optimizer = findings.innermost(trainer.model_wrapped.optimizer if is_deepspeed else trainer.optimizer)
    moments = [value for entry in optimizer.state.values() for value in entry.values() if hasattr(value, "numel")]
    return {
        "weights": _hash(trainer.model.parameters()),
        "moments": _hash(moments),
        "shard": getattr(optimizer, "shard", None),
    }


def _hash(tensors: Any) -> str:
    import torch

    found = hashlib.blake2b()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _of_every_rank(mine: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def main(arguments: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mpt.training.worker import quiet_libraries

    quiet_libraries()
    cells = json.loads(Path(arguments[0]).read_text())
    out = Path(arguments[1])
    _watch_what_is_made_and_sent()
    results: dict[str, Any] = {}
    folders = {cell["name"]: out.parent / f"cell-{number:03d}" for number, cell in enumerate(cells)}
    for cell in cells:
        WIRE.clear()
        results[cell["name"]] = run_cell(cell, folders[cell["name"]], rank, folders)
        if rank == 0:
            out.write_text(json.dumps(results))
    return 0
