"""What of a checkpoint another plan can carry on: asked before a run is gone on with under other values. Pure.

`--accept-changes` takes responsibility for other values. It can't make DeepSpeed load what it doesn't load, and there
the Trainer would begin with a fresh optimizer, silently; nor does it mean a change that nobody wrote down.
"""

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.running.repairs import SET_BY
from mpt.terms import Strategy


def check_loads(before: Plan, now: Plan, name: str, written_by: int) -> None:
    """Raise MptError where the checkpoint `name`, written by so many processes under `before`, does not load."""
    was, strategy = (Strategy(plan.value("distributed.strategy")) for plan in (before, now))
    world_size = now.value("world_size")
    if was.zero_stage != strategy.zero_stage:
        raise MptError(
            f"{name} was written by {was} and can't be loaded by {strategy}: the optimizer lies in the files of its "
            "engine; --accept-changes does not help",
            remedy=_go_on_or_begin(was, written_by),
        )
    if strategy.zero_stage is not None and written_by != world_size:
        raise MptError(
            f"{name} was written by {written_by} processes with {was}, each of which holds its part of the optimizer, "
            f"and can't be loaded by {world_size}; --accept-changes does not help",
            remedy=_go_on_or_begin(was, written_by),
        )


def check_batch(before: Plan, now: Plan, asked: set[str]) -> None:
    """Raise MptError where another number of processes alone changes the global batch.

    The data position is counted in global batches, and a learning rate is chosen for one. `asked` are the keys of the
    recipe that changed.
    """
    was, size = (plan.value("global_batch_size") for plan in (before, now))
    if was == size or asked & set(SET_BY["micro_batch"]):
        return
    processes = now.value("world_size")
    raise MptError(
        f"the global batch was {was} and would be {size} with {processes} process{'es' if processes > 1 else ''}: the "
        "run would go on at another place in its data, with a learning rate for another batch",
        remedy=f"Add global_batch_size={was}, which keeps both, or ask for another batch in the recipe.",
    )


def _go_on_or_begin(was: Strategy, processes: int) -> str:
    return (
        f"Go on with {was} and {processes} process{'es' if processes > 1 else ''}, or begin anew with --resume never; "
        "model.name_or_path can name the weights that the run has made (its final/, where it finished)."
    )
