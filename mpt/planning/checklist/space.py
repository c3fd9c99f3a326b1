"""Points about memory: what is kept, computed anew, divided or moved, and whether it must be. Pure."""

from mpt.planning.checklist.point import Case, Verdict, not_applicable, ticked, to_gain
from mpt.planning.memory import optimizer_bytes_per_parameter
from mpt.planning.plan import Plan
from mpt.planning.speed import bandwidth_gb_s, matmul_seconds, passes
from mpt.terms import Feature, Method, OffloadDevice, Strategy, Task

CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing")  # of TrainingArguments
SMALL_SHARE = 0.1
# Optimizers of TrainingArguments whose update is one kernel for many tensors.
FUSED = ("adamw_torch_fused",)
EIGHT_BIT = "adamw_8bit"


def logits(case: Case) -> Verdict:
    """Whether the loss makes the peak."""
    plan = case.plan
    if plan.value("task") == Task.SEQUENCE_CLASSIFICATION:
        return not_applicable("a handful of classes: the logits are small")
    decision, takes = plan.values["loss"], plan.memory.parts_gib.get("logits", 0.0)
    if decision.value != "full":
        return ticked(f"loss {decision.value}: {decision.reason}")
    if takes < SMALL_SHARE * plan.memory.peak_gib:
        return ticked(f"they take {takes:.2f} GiB of {plan.memory.peak_gib:.1f}")
    keys = {"loss": "auto"}
    other = case.with_only(keys)
    if other is None or other.value("loss") == "full":
        against = "; ".join(f"{option.value}: {option.reason}" for option in decision.rejected)
        return not_applicable(f"they take {takes:.2f} GiB, and nothing else computes this loss ({against})")
    return to_gain(
        f"a vocabulary of {plan.facts.vocab_size} takes {takes:.1f} GiB of {plan.memory.peak_gib:.1f}",
        keys,
        memory_gib=case.freed_gib(other) or None,
        gain="head and loss chunk by chunk (Hsu et al. 2024)",
    )


def gradient_checkpointing(case: Case) -> Verdict:
    """Whether activations are computed anew without need, or kept without room."""
    plan, decision = case.plan, case.plan.values["gradient_checkpointing"]
    asked = [f"training.{key}" for key in CHECKPOINTING_KEYS if key in plan.recipe.training_keys]
    keys = dict.fromkeys(asked or ["gradient_checkpointing"], not decision.value)
    other = case.with_only(keys)
    if decision.value:
        if other is not None and other.memory.fits and plan.memory.fits:
            return to_gain(
                f"without it this batch needs {_of(other)}: it fits",
                keys,
                memory_gib=case.freed_gib(other),
                speed=passes(plan) / passes(other),
                gain="no forward pass is made twice",
            )
        needs = "" if other is None else f": without it this batch needs {_of(other)}"
        return ticked(f"needed{needs}")
    if plan.memory.fits:
        return ticked(f"off, and {_of(plan)} fits: {decision.reason}")
    if other is None:
        return not_applicable(decision.reason)
    return to_gain(
        f"the plan needs {_of(plan)} and does not fit",
        keys,
        memory_gib=case.freed_gib(other),
        speed=passes(plan) / passes(other),
        gain="it fits then" if other.memory.fits else "and even so it does not fit",
    )


def fused_optimizer(case: Case) -> Verdict:
    """Whether the update reads and writes each tensor once."""
    plan = case.plan
    name = plan.value("optimizer")
    offload = plan.value("offload")
    if offload["optimizer"] != OffloadDevice.NONE:
        return ticked("the offloaded update is DeepSpeed's CPU Adam, which is vectorised")
    if name in FUSED:
        return ticked(f"{name}: one kernel for the whole update")
    if name != "adamw_torch":
        return not_applicable(f"{name} has its own kernels")
    share = _optimizer_share(plan)
    return to_gain(
        "adamw_torch launches a dozen kernels, each of which reads and writes the states",
        {"training.optim": "adamw_torch_fused"},
        memory_gib=0.0,
        gain="the same numbers"
        + ("" if share is None else f"; the update is at least {share:.1%} of a step at peak rates"),
    )


def optimizer_states(case: Case) -> Verdict:
    """Whether 8-bit states would buy what the plan pays for with time."""
    plan = case.plan
    name = plan.value("optimizer")
    takes = plan.memory.parts_gib.get("optimizer", 0.0)
    if name.endswith(("8bit", "4bit")) or optimizer_bytes_per_parameter(name) < 4:
        return ticked(
            f"{name} keeps {optimizer_bytes_per_parameter(name):g} bytes a trained parameter: {takes:.2f} GiB"
        )
    if plan.value("method") != Method.FULL:
        return ticked(f"adapters are few: their states take {takes:.2f} GiB")
    if not plan.machine.all_compute(Feature.BITSANDBYTES):
        return not_applicable(f"bitsandbytes does not run on {plan.machine.label}")
    other = case.anew({"training.optim": EIGHT_BIT})
    bought = [] if other is None else _bought(plan, other)
    if not bought or other is None:
        return ticked(f"{takes:.2f} GiB of fp32 states; 8-bit ones would change nothing else of the plan")
    alone = case.with_only({"training.optim": EIGHT_BIT})
    return to_gain(
        f"fp32 states take {takes:.1f} GiB a device"
        if takes
        else f"fp32 states are offloaded: {plan.memory.host_gib:.1f} GiB of the host's memory",
        {"training.optim": EIGHT_BIT},
        memory_gib=case.freed_gib(alone),
        gain=f"{'; '.join(bought)}. States of a byte train as fp32 ones do (Dettmers et al. 2022); needs bitsandbytes",
    )


def sharding(case: Case) -> Verdict:
    """Whether the strategy asked for divides more than it must."""
    plan, decision = case.plan, case.plan.values["distributed.strategy"]
    if plan.value("world_size") == 1 and Strategy(decision.value).zero_stage is None:
        return not_applicable("one process: nothing is divided")
    if decision.origin != "asked":
        return ticked(f"{decision.value}: {decision.reason}")
    free = case.anew(
        {"distributed.strategy": None, "offload": None} if _offloads(plan) else {"distributed.strategy": None}
    )
    if free is None or not free.memory.fits or _rank(free) >= _rank(plan):
        return ticked(f"{decision.value}, as asked: nothing cheaper fits")
    if plan.value("gradient_checkpointing") != free.value("gradient_checkpointing") and free.value(
        "gradient_checkpointing"
    ):
        return ticked(f"{decision.value}, as asked: what is cheaper to communicate computes activations anew")
    cheaper = free.value("distributed.strategy")
    alone = case.with_only({"distributed.strategy": cheaper})
    taken = alone if alone is not None and alone.memory.fits else free
    micro = taken.value("micro_batch_size")
    at = f" at {micro} samples a pass" if micro != plan.value("micro_batch_size") else ""
    return to_gain(
        f"{decision.value} was asked for, and {cheaper} fits{at}: {_of(taken)}",
        {"distributed.strategy": cheaper},
        memory_gib=case.freed_gib(taken),
        gain=f"{free.values['distributed.strategy'].reason}; the time depends on the links, which nobody knows here",
    )


def offload(case: Case) -> Verdict:
    """Whether what stands in the host's memory would fit on the device."""
    plan, decision = case.plan, case.plan.values["offload"]
    if not _offloads(plan):
        return ticked("everything stays on the device") if plan.memory.fits else not_applicable(decision.reason)
    if plan.machine.is_cpu:
        return to_gain(
            "on a CPU it saves nothing", {"offload": "none"}, memory_gib=0.0, gain="no copies from memory to memory"
        )
    here = case.with_only({"offload": "none"})
    if here is None or not here.memory.fits:
        needs = "" if here is None else f": on the device it needs {_of(here)}"
        return ticked(f"needed{needs}; 8-bit states, adapters or more devices would do without")
    return to_gain(
        f"on the device it all needs {_of(here)}: it fits",
        {"offload": "none"},
        memory_gib=case.freed_gib(here),
        gain="no step waits for the bus; how long it waits depends on the link, which nobody knows here",
    )


def _offloads(plan: Plan) -> bool:
    moved = plan.value("offload")
    return bool(moved["optimizer"] != OffloadDevice.NONE or moved["parameters"] != OffloadDevice.NONE)


def _rank(plan: Plan) -> int:
    """How much a strategy divides, and so communicates."""
    return Strategy(plan.value("distributed.strategy")).zero_stage or 0


def _bought(plan: Plan, other: Plan) -> list[str]:
    """Say what another plan does without, or more of, thanks to what it freed."""
    bought: list[str] = []
    if not other.memory.fits:
        return bought
    if not plan.memory.fits:
        bought.append("the plan fits")
    if _offloads(plan) and not _offloads(other):
        bought.append("nothing is offloaded")
    if plan.value("gradient_checkpointing") and not other.value("gradient_checkpointing"):
        bought.append("no gradient checkpointing")
    if _rank(other) < _rank(plan):
        bought.append(f"{other.value('distributed.strategy')} in place of {plan.value('distributed.strategy')}")
    if not bought and other.value("micro_batch_size") > plan.value("micro_batch_size"):
        bought.append(f"{other.value('micro_batch_size')} samples a pass in place of {plan.value('micro_batch_size')}")
    return bought


def _optimizer_share(plan: Plan) -> float | None:
    """Share of a step that a fused AdamW takes at the least: 28 bytes a weight of its shard at the bandwidth."""
    bandwidth, matmuls = bandwidth_gb_s(plan.machine), matmul_seconds(plan)
    if bandwidth is None or matmuls is None or plan.value("method") != Method.FULL:
        return None
    shard = plan.facts.parameters / (plan.value("world_size") if _rank(plan) else 1)
    update = 28 * shard / (bandwidth * 1e9)
    return update / (update + matmuls)


def _of(plan: Plan) -> str:
    capacity = plan.memory.capacity_gib
    return f"{plan.memory.peak_gib:.1f} GiB" + ("" if capacity is None else f" of {capacity:.1f}")
