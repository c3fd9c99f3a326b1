"""Train many tiny recipes one after another in this process (or this group of processes): `matrix_cells.py CELLS OUT`.

CELLS is a JSON list of {"name", "recipe"}; OUT becomes {name: {"error"} or {"audit", "losses", "folder"}}. Starting
torch and transformers costs seconds a process, a cell less than one: the matrix of precisions, engines and methods is
affordable only so. Each cell is what the worker does: a plan in a run directory, `session.train`, the audit's file.
"""

import json
import os
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
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory, write_atomically


def run_cell(cell: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
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
        if rank == 0:
            write_atomically(attempt.plan, json.dumps(data))
        _barrier()
        _forget_the_last_one()
        plan = Plan.from_json(data)
        train(plan, run, attempt, 1, Journal(run.journal, 1, rank), StopRequest(attempt.stop), rank)
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
        "skipped": sum(bool(row.get("skipped")) for row in rows),
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


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mpt.training.worker import quiet_libraries

    quiet_libraries()
    cells = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    results: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        results[cell["name"]] = run_cell(cell, out.parent / f"cell-{number:03d}", rank)
        if rank == 0:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
