"""A plan in words: the short form that `mpt train` prints. The long form is a table of `plan.values` (`mpt plan`)."""

from mpt.planning.layers import count_layers
from mpt.planning.plan import Plan
from mpt.terms import Packing


def explain_short(plan: Plan) -> list[tuple[str, str]]:
    """Say in a few (subject, sentence) pairs what will happen and why."""
    facts, value = plan.facts, plan.value
    source = plan.recipe.model.name_or_path or "from scratch"
    precision = plan.values["precision"]
    strategy = plan.values["distributed.strategy"]
    steps = plan.values["max_steps"]
    capacity = "" if plan.memory.capacity_gib is None else f" of {plan.memory.capacity_gib:.1f}"
    lines = [
        ("model", f"{facts.model_type}, {count(facts.parameters)} parameters, {source}"),
        ("machine", plan.machine.label if plan.machine.device_count > 1 else plan.machine.devices[0].name),
        ("precision", f"{precision.value} ({precision.origin}): {precision.reason}"),
        ("weights", f"{value('weights_dtype')}: {plan.values['weights_dtype'].reason}"),
        ("attention", f"{value('attention')}: {plan.values['attention'].reason}"),
        (
            "batch",
            f"{value('global_batch_size')} samples of {value('sequence_length')} tokens = {value('micro_batch_size')} "
            f"micro x {value('gradient_accumulation_steps')} accumulated x {value('world_size')} "
            f"{'process' if value('world_size') == 1 else 'processes'}",
        ),
        ("steps", str(steps.value) if steps.value else steps.reason),
        ("memory", f"about {plan.memory.peak_gib:.1f}{capacity} GiB"),
    ]
    if value("world_size") > 1 or strategy.value != "single":
        lines.insert(5, ("strategy", f"{strategy.value}: {strategy.reason}"))
    if value("gradient_checkpointing"):
        lines.insert(6, ("checkpointing", plan.values["gradient_checkpointing"].reason))
    if value("packing") != Packing.BLOCKS:
        padding = ", and no padding" if value("padding_free") else ""
        lines.insert(-2, ("packing", f"{value('packing')}: {plan.values['packing'].reason}{padding}"))
    if value("adapters") is not None:
        lines.insert(4, ("adapters", plan.values["adapters"].reason))
    if value("layers") is not None:
        lines.insert(3, ("layers", _layers_sentence(plan)))
    return lines


def _layers_sentence(plan: Plan) -> str:
    counted, fp8 = count_layers(plan.value("layers")), plan.value("fp8")
    if fp8 is None:
        return counted
    if fp8["emulated"]:
        return f"{counted}; fp8 is EMULATED: right numbers, slower than bf16"
    backend = "torchao" if fp8["backend"] == "torchao" else "Transformer Engine"
    return f"{counted}; fp8 by {backend}, {fp8['recipe']}{', compiled' if plan.value('compile') else ''}"


def count(number: int) -> str:
    """Write a number of parameters as people say it.

    >>> count(6738415616), count(494032768), count(3456)
    ('6.7 B', '494 M', '3456')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            scaled = number / (1e3 if unit == "k" else size)
            return f"{scaled:.{0 if scaled >= 100 else 1}f} {unit}"
    return str(number)
