"""The plan that a run is compared with: the same recipe in another precision, and everything else as it was planned."""

from collections.abc import Sequence
from typing import Any

from mpt.errors import MptError
from mpt.planning.attention import KERNEL
from mpt.planning.engines import check_trainable
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import DistributedSection, OffloadSection, PrecisionSection, Recipe
from mpt.terms import Attention, Precision

# Kernels that exist for 16 bits alone.
HALF_ONLY = tuple(KERNEL)


def plan_reference(
    plan: Plan, packages: frozenset[str] | None, modules: Sequence[ModuleShape] | None = None
) -> Plan | None:
    """Resolve the reference of a plan whose recipe asks for a comparison; None where it does not.

    `packages` and `modules` as in `resolve`. Raises MptError or UnsupportedError for a reference that can't be trained
    here.
    """
    section = plan.recipe.compare
    if section is None:
        return None
    try:
        reference = resolve(
            _recipe(plan, Precision(section.to)),
            plan.machine,
            plan.facts,
            name=plan.name,
            packages=packages,
            modules=modules,
            task_folder=plan.task_folder,
        )
        check_trainable(reference)
    except MptError as error:
        raise MptError(
            f"compare.to is {section.to}, and the same recipe can't be trained in it here: {error.problem}",
            remedy=f"Compare with another precision, leave the comparison out, or: {error.remedy}",
            exit_code=error.exit_code,
        ) from error
    return reference


def _recipe(plan: Plan, precision: Precision) -> Recipe:
    """Replace the precision, and pin what planning could choose otherwise for it."""
    recipe = plan.recipe
    pinned: dict[str, Any] = {
        "precision": PrecisionSection(mode=precision, allow_emulation=recipe.precision.allow_emulation),
        "micro_batch_size": plan.value("micro_batch_size"),
        "gradient_accumulation_steps": plan.value("gradient_accumulation_steps"),
        "global_batch_size": plan.value("global_batch_size"),
        "gradient_checkpointing": plan.value("gradient_checkpointing"),
        "distributed": DistributedSection(
            strategy=plan.value("distributed.strategy"), processes_per_node=plan.value("processes_per_node")
        ),
        "offload": OffloadSection.model_validate(plan.value("offload")),
    }
    is_half = precision in (Precision.BF16, Precision.FP16)
    if recipe.attention == "auto" and (is_half or plan.value("attention") not in HALF_ONLY):
        pinned["attention"] = Attention(plan.value("attention"))
    elif recipe.attention in HALF_ONLY and not is_half:
        pinned["attention"] = "auto"
    return recipe.model_copy(update=pinned)


def trainable_count(plan: Plan) -> int:
    """Count the parameters that have a gradient."""
    adapters = plan.value("adapters")
    return int(plan.facts.parameters if adapters is None else adapters["trainable_parameters"])
