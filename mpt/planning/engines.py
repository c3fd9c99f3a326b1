"""What this version can carry out. Everything can be planned; what has no engine yet is refused before a run
begins, never ignored."""

from mpt.errors import MptError, UnsupportedError
from mpt.planning.plan import Plan
from mpt.terms import Strategy


def without_engine(plan: Plan) -> list[str]:
    """Name each wish of the plan that this version can plan and not yet train."""
    wishes = []
    if plan.value("distributed.strategy") == Strategy.FSDP2:
        wishes.append("distributed.strategy: fsdp2")
    if plan.value("nodes") > 1:
        wishes.append(f"{plan.value('nodes')} nodes")
    return wishes


def check_trainable(plan: Plan) -> None:
    """Raise MptError where the plan needs an engine that is not there yet, UnsupportedError where it needs memory."""
    wishes = without_engine(plan)
    if wishes:
        raise MptError(
            f"not yet: this version of mpt plans {', '.join(wishes)} and can't train it",
            remedy="`mpt plan` shows what it would do. What trains today: language models and classifiers, whole, by "
            "LoRA and by QLoRA, in every precision, on one node, with one process, DDP or ZeRO 1-3.",
        )
    if not plan.memory.fits:
        raise UnsupportedError(
            f"the plan needs {plan.memory.peak_gib:.1f} GiB a device, and there are {plan.memory.capacity_gib:.1f}",
            remedy="See `mpt plan` for the parts; a smaller micro_batch_size or data.sequence_length, "
            "`gradient_checkpointing: true`, zero3 or `offload: cpu` need less.",
        )
