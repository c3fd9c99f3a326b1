"""Whether checkpoints are written while the training goes on, from a copy in the host's memory. Pure."""

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.memory import MemoryEstimate
from mpt.recipe.schema import Recipe
from mpt.terms import Method, Strategy

# Of adapters the memory estimate does not tell their weights: half of AdamW's two states.
COPIED_OF_ADAPTERS = 1.5
# Of the host's memory; data, loaders and the page cache that the checkpoint is written through need the rest.
HOST_SHARE = 0.5


def choose_background_saving(
    recipe: Recipe, machine: Machine, memory: MemoryEstimate, strategy: Strategy, method: Method
) -> Decision[bool]:
    """Decide; `memory` is what a rank holds.

    Raises MptError where the recipe asks for it under DeepSpeed, whose ranks write a checkpoint together.
    """
    asked = recipe.background_saving
    if strategy.zero_stage is not None:
        if asked is True:
            raise MptError(
                f"background_saving is true, and under {strategy.value} every rank writes its part within DeepSpeed's "
                "own save",
                remedy="Leave background_saving out, or ask for `distributed: {strategy: ddp}`.",
            )
        return Decision(False, Origin.DERIVED, "DeepSpeed's ranks write a checkpoint together")
    if asked != "auto":
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    if machine.is_cpu:
        return Decision(False, Origin.AUTO, "on a CPU the copy would take the memory and cores that train")
    optimizer = memory.parts_gib.get("optimizer", 0.0)
    is_full = method is Method.FULL
    needed = optimizer + memory.parts_gib.get("weights", 0.0) if is_full else COPIED_OF_ADAPTERS * optimizer
    host = machine.host_memory_gib
    if host is not None and needed > HOST_SHARE * host:
        return Decision(False, Origin.AUTO, f"the copy takes {needed:.0f} GiB of the host's {host:.0f}")
    size = "whose size is not known" if host is None else f"of {host:.0f} GiB"
    reason = f"training waits only for a copy of {needed:.1f} GiB in the host's memory, {size}"
    return Decision(True, Origin.AUTO, reason)
