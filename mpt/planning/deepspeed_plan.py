"""A plan that goes through DeepSpeed, for those who want its configuration whatever the machine. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Origin
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import OffloadSection, Recipe
from mpt.terms import OffloadDevice, Strategy

SMALLEST_STAGE = Strategy.ZERO2


def resolve_for_deepspeed(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    *,
    name: str,
    stage: int | None = None,
    offload: OffloadSection | OffloadDevice | None = None,
    packages: frozenset[str] | None = None,
    modules: Sequence[ModuleShape] | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """Make the plan with `stage` and `offload` in place of the recipe's; stage 2 where that plan would need no ZeRO.

    The second value holds notes for the person. Raises MptError for stage 0 and for wishes that contradict each other.
    """
    if stage is not None:
        recipe = with_strategy(recipe, to_strategy(stage))
    if offload is not None:
        recipe = recipe.model_copy(update={"offload": offload})
    plan = resolve(recipe, machine, facts, name=name, packages=packages, modules=modules)
    if stage is not None:
        plan = _because(plan, "distributed.strategy", Origin.ASKED, f"stage {stage} was asked for")
    if offload is not None:
        plan = _because(plan, "offload", Origin.ASKED, "asked for beside the recipe")
    if plan.deepspeed is not None:
        return plan, plan.deepspeed_notes
    left = plan.values["distributed.strategy"]
    note = (
        f"`mpt train` would go by {left.value} here ({left.reason}), without DeepSpeed; this is stage "
        f"{SMALLEST_STAGE.zero_stage}, which communicates no more than DDP"
    )
    plan = resolve(with_strategy(recipe, SMALLEST_STAGE), machine, facts, name=name, packages=packages, modules=modules)
    plan = _because(plan, "distributed.strategy", Origin.AUTO, "the stage that costs least; see the first note")
    return plan, (note, *plan.deepspeed_notes)


def to_strategy(stage: int) -> Strategy:
    """Name the strategy of a ZeRO stage; raises MptError for stage 0 and for what is no stage."""
    if stage == 0:
        raise MptError(
            "ZeRO stage 0 was asked for, and mpt never writes it: in fp16 and bf16 it trains wrongly (what it learns "
            "depends on the loss scale), and in fp32 it is plain DDP",
            remedy="Ask for stage 1, 2 or 3, or train with `distributed: {strategy: ddp}`.",
        )
    if stage not in (1, 2, 3):
        raise MptError(f"there is no ZeRO stage {stage}", remedy="Ask for stage 1, 2 or 3.")
    return Strategy(f"zero{stage}")


def with_strategy(recipe: Recipe, strategy: Strategy) -> Recipe:
    """Give the recipe with another strategy."""
    distributed = recipe.distributed.model_copy(update={"strategy": strategy})
    return recipe.model_copy(update={"distributed": distributed})


def read_offload(text: str) -> OffloadSection | OffloadDevice:
    """Read an --offload argument: a device, or what goes where.

    Raises MptError for anything else.

    >>> read_offload("optimizer=cpu").parameters.value
    'none'
    """
    help_text = "Write none, cpu, optimizer=cpu, or optimizer=nvme,parameters=cpu,nvme_path=/a/directory."
    if "=" not in text:
        try:
            return OffloadDevice(text.strip())
        except ValueError:
            raise MptError(f"--offload {text}: there is no such device", remedy=help_text) from None
    pairs = [part.partition("=") for part in text.split(",")]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    try:
        return OffloadSection.model_validate(values)
    except ValueError as error:
        said = str(error).splitlines()
        reason = next((line.strip() for line in said[1:] if line.startswith("  ")), said[0])
        raise MptError(f"--offload {text}: {reason.partition(' [type=')[0]}", remedy=help_text) from None


def _because(plan: Plan, key: str, origin: Origin, reason: str) -> Plan:
    """Put the true reason of a value that was set from outside the recipe."""
    decision = replace(plan.values[key], origin=origin, reason=reason)
    return replace(plan, values={**plan.values, key: decision})
