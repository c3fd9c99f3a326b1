"""Choose how processes share the work: strategy, offload, checkpointing and batch, by what fits and costs least. Pure.

Everything that is left open is tried in the order of its price, and the first option that fits is taken:

1. Nothing: one process, or DDP.
2. ZeRO-2: divides gradients and optimizer states at DDP's communication volume (Rajbhandari et al. 2020, section
   7.2.1).
3. ZeRO-3: divides the weights too, for 1.5 times that volume (section 7.2.2).
4. Gradient checkpointing, with 1 to 3 in turn: about a third more compute (Chen et al. 2016; Korthikanti et al. 2022
   measure 30 to 40 %). Dearer than stage 3 wherever devices are linked well enough to be trained on together.
5. Optimizer states on the CPU (Ren et al. 2021, ZeRO-Offload), then the weights too: every step waits for the bus.

An option that fits only so small a micro batch that a pass holds fewer than 2048 tokens is passed over while a later
one of 1 to 4 has room: small passes leave the matrix units idle. Offload is tried only where nothing else fits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.adapters import check_strategy, trained_sizes
from mpt.planning.batching import AskedBatch, Batch, accumulation_for, choose_batch, possible_micro_batches
from mpt.planning.contradictions import (
    asked_offload,
    check_asked,
    choose_processes,
    deepspeed_computes_fp16,
    method_of,
    optimizer_of,
)
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.memory import MemoryEstimate, estimate_memory
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import ModuleShape
from mpt.planning.number_formats import TORCH_ADAMW, choose_number_formats
from mpt.planning.workload import Workload, with_micro_batch
from mpt.recipe.schema import OffloadSection, Recipe
from mpt.recipe.training_keys import training_arguments
from mpt.terms import Attention, DeviceKind, Method, OffloadDevice, Precision, Strategy

TOKENS_ENOUGH = 2048
NOTHING = OffloadSection()
STATES = OffloadSection(optimizer=OffloadDevice.CPU)
EVERYTHING = OffloadSection(optimizer=OffloadDevice.CPU, parameters=OffloadDevice.CPU)

STRATEGY_REASONS: dict[Strategy, str] = {
    Strategy.SINGLE: "one process: nothing to share",
    Strategy.DDP: "the whole model state fits on each device, and DDP communicates least",
    Strategy.ZERO1: "divides the optimizer states over the ranks",
    Strategy.ZERO2: "divides gradients and optimizer states over the ranks, at DDP's communication volume",
    Strategy.ZERO3: "divides the weights too over the ranks, for 1.5 times DDP's communication volume",
    Strategy.FSDP2: "divides weights, gradients and optimizer states over the ranks",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the processes share the work, every value with its reason, and what a rank then holds."""

    strategy: Decision[Strategy]
    offload: Decision[dict[str, Any]]
    gradient_checkpointing: Decision[bool]
    processes_per_node: Decision[int]
    world_size: Decision[int]
    micro_batch_size: Decision[int]
    gradient_accumulation_steps: Decision[int]
    global_batch_size: Decision[int]
    memory: MemoryEstimate


@dataclass(frozen=True, slots=True)
class Option:
    """One way to go, and its name in a list of rejected ones."""

    strategy: Strategy
    offload: OffloadSection
    checkpointing: bool

    @property
    def label(self) -> str:
        parts = [self.strategy.value]
        if self.checkpointing:
            parts.append("gradient checkpointing")
        if self.offload.parameters is not OffloadDevice.NONE:
            parts.append(
                "optimizer and parameters offloaded" if _moves_states(self.offload) else "parameters offloaded"
            )
        elif _moves_states(self.offload):
            parts.append("optimizer offloaded")
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Trial:
    """An option that was worked out: its best batch and what that needs."""

    option: Option
    batch: Batch
    memory: MemoryEstimate

    @property
    def reason_against(self) -> str:
        micro, memory = self.batch.micro.value, self.memory
        if memory.fits:
            return f"fits only micro batch {micro}: passes too small for the matrix units"
        needed = f"needs {memory.peak_gib:.1f} GiB of {memory.capacity_gib or 0:.1f} a rank at micro batch {micro}"
        if memory.host_gib:
            needed += f", and {memory.host_gib:.1f} GiB of host memory a node"
        return needed


def choose_layout(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    precision: Precision,
    attention: Attention,
    sequence_length: int,
    has_islands: bool = False,
    modules: Sequence[ModuleShape] | None = None,
    loss_of: Callable[[Strategy], str] = lambda strategy: "full",
) -> Layout:
    """Choose the layout; `memory.fits` is False where nothing that the recipe leaves open fits. `modules` are those of
    `mpt.planning.plan.resolve`; `loss_of` says how the loss is computed under a strategy (`mpt.planning.loss`).

    Raises MptError for wishes that contradict each other, UnsupportedError for those that the machine can't fulfil.
    """
    per_node, world = choose_processes(recipe, machine)
    check_asked(recipe, machine, precision, world.value)
    asked = AskedBatch(
        recipe.global_batch_size, recipe.asked_micro_batch_size, recipe.asked_gradient_accumulation_steps
    )
    possible = possible_micro_batches(asked, world.value)
    enough = min(possible[0], -(-TOKENS_ENOUGH // sequence_length))
    trained = trained_sizes(recipe, facts, modules)
    trials: list[Trial] = []
    taken: Trial | None = None
    impossible: dict[str, MptError] = {}
    for option in options(recipe, machine, precision, world.value):
        if _offloads_unasked(option, recipe) and any(trial.memory.fits for trial in trials):
            break
        try:
            work = _workload(
                option,
                recipe,
                machine,
                facts,
                precision,
                attention,
                sequence_length,
                per_node.value,
                has_islands,
                trained,
            )
            work = replace(work, loss=loss_of(option.strategy))
        except MptError as error:
            if option.strategy is Strategy.SINGLE:
                raise
            impossible[option.strategy.value] = error
            continue
        trials.append(_try(option, work, asked, machine))
        if trials[-1].memory.fits and trials[-1].batch.micro.value >= enough:
            taken = trials[-1]
            break
    if not trials:
        raise next(iter(impossible.values()))
    taken = taken or next((trial for trial in trials if trial.memory.fits), trials[-1])
    rest = [trial for trial in trials if trial is not taken]
    return Layout(
        strategy=_strategy_decision(recipe, taken, rest, impossible, machine, world.value),
        offload=_offload_decision(recipe, taken, rest, machine),
        gradient_checkpointing=_checkpointing_decision(recipe, taken, rest),
        processes_per_node=per_node,
        world_size=world,
        micro_batch_size=taken.batch.micro,
        gradient_accumulation_steps=taken.batch.accumulation,
        global_batch_size=taken.batch.global_size,
        memory=taken.memory,
    )


def formats_for(
    recipe: Recipe,
    precision: Precision,
    strategy: Strategy,
    checkpoint_dtype: str | None,
    *,
    has_islands: bool,
) -> dict[str, Decision[Any]]:
    """Decide the number formats that the recipe has under a strategy."""
    given, known = recipe.training_keys, training_arguments()
    beta1, beta2 = (float(given.get(key, known[key]["default"])) for key in ("adam_beta1", "adam_beta2"))
    return choose_number_formats(
        recipe.precision,
        precision,
        strategy,
        method_of(recipe),
        checkpoint_dtype,
        has_islands=has_islands,
        betas=(beta1, beta2),
        optimizer=optimizer_of(recipe),
        quantized="nf4" if recipe.quantization is None else recipe.quantization.dtype,
    )


def options(recipe: Recipe, machine: Machine, precision: Precision, world_size: int) -> Iterator[Option]:
    """List what the recipe leaves open, the cheapest first."""
    offload, checkpointing = asked_offload(recipe), recipe.asked_gradient_checkpointing
    strategies = _open_strategies(recipe, machine, precision, world_size, offload)
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        for strategy in strategies:
            yield Option(strategy, offload or NOTHING, recompute)
    if offload is not None or not _can_offload(recipe, machine, precision):
        return
    recompute = True if checkpointing is None else checkpointing
    stages = (Strategy.ZERO2, Strategy.ZERO3) if recipe.distributed.strategy == "auto" else strategies
    for strategy in stages:
        if strategy.zero_stage:
            yield Option(strategy, STATES, recompute)
    if Strategy.ZERO3 in stages:
        yield Option(Strategy.ZERO3, EVERYTHING, recompute)


def _open_strategies(
    recipe: Recipe, machine: Machine, precision: Precision, world_size: int, offload: OffloadSection | None
) -> tuple[Strategy, ...]:
    if recipe.distributed.strategy != "auto":
        return (Strategy(recipe.distributed.strategy),)
    if offload is not None and offload.parameters is not OffloadDevice.NONE:
        return (Strategy.ZERO3,)
    if offload is not None and _moves_states(offload):
        return (Strategy.ZERO2, Strategy.ZERO3)
    if world_size == 1:
        return (Strategy.SINGLE,)
    if method_of(recipe) is Method.QLORA or not _can_shard(machine, precision):
        return (Strategy.DDP,)
    return (Strategy.DDP, Strategy.ZERO2, Strategy.ZERO3)


def _can_shard(machine: Machine, precision: Precision) -> bool:
    if precision is Precision.FP16 and not deepspeed_computes_fp16(machine):
        return False
    return machine.kind is not DeviceKind.MPS


def _can_offload(recipe: Recipe, machine: Machine, precision: Precision) -> bool:
    """Whether offload may be tried unasked: it saves nothing on a CPU, and DeepSpeed's CPU optimizer is Adam."""
    return (
        not machine.is_cpu
        and precision is not Precision.BF16_PURE
        and _can_shard(machine, precision)
        and method_of(recipe) is not Method.QLORA
        and optimizer_of(recipe) in TORCH_ADAMW
        and recipe.distributed.strategy not in (Strategy.SINGLE, Strategy.DDP, Strategy.FSDP2)
    )


def _workload(
    option: Option,
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    precision: Precision,
    attention: Attention,
    sequence_length: int,
    processes_per_node: int,
    has_islands: bool,
    trained: Mapping[str, Any],
) -> Workload:
    method = method_of(recipe)
    check_strategy(recipe, facts, option.strategy, precision)
    formats = formats_for(recipe, precision, option.strategy, facts.checkpoint_dtype, has_islands=has_islands)
    stays = machine.is_cpu  # "offloaded" to the memory where it already is
    return Workload(
        facts=facts,
        method=method,
        task=recipe.model_task,
        strategy=option.strategy,
        world_size=processes_per_node * machine.nodes,
        processes_per_node=processes_per_node,
        on_cpu=machine.is_cpu,
        weights_dtype=formats["weights_dtype"].value,
        gradient_dtype=formats["gradient_dtype"].value,
        grad_accum_dtype=formats["grad_accum_dtype"].value,
        optimizer_state_dtype=formats["optimizer_state_dtype"].value,
        autocast_dtype=formats["autocast_dtype"].value,
        optimizer=optimizer_of(recipe),
        attention=attention,
        sequence_length=sequence_length,
        gradient_checkpointing=option.checkpointing,
        offload_optimizer=OffloadDevice.NONE if stays else option.offload.optimizer,
        offload_parameters=OffloadDevice.NONE if stays else option.offload.parameters,
        master_weights_dtype=formats["master_weights_dtype"].value,
        keeps_compensation=formats["rounding"].value == "kahan",
        **trained,
    )


def _try(option: Option, work: Workload, asked: AskedBatch, machine: Machine) -> Trial:
    host = machine.host_memory_gib
    shared = host or machine.memory_gib
    capacity = (shared / work.processes_per_node if shared else None) if machine.is_cpu else machine.memory_gib

    def need(micro: int) -> MemoryEstimate:
        accumulates = accumulation_for(asked, micro, work.world_size) > 1
        return estimate_memory(
            with_micro_batch(work, micro, accumulates), capacity_gib=capacity, host_capacity_gib=host
        )

    batch = choose_batch(asked, work.world_size, lambda micro: need(micro).fits)
    return Trial(option, batch, need(batch.micro.value))


def _offloads_unasked(option: Option, recipe: Recipe) -> bool:
    return option.offload != NOTHING and asked_offload(recipe) is None


def _strategy_decision(
    recipe: Recipe,
    taken: Trial,
    rest: list[Trial],
    impossible: dict[str, MptError],
    machine: Machine,
    world_size: int,
) -> Decision[Strategy]:
    chosen = taken.option.strategy
    against: dict[str, str] = {}
    for trial in rest:
        if trial.option.strategy is not chosen:
            against.setdefault(trial.option.strategy.value, trial.reason_against)
    against |= {name: error.problem for name, error in impossible.items()}
    if recipe.distributed.strategy != "auto":
        return Decision(chosen, Origin.ASKED, "the recipe asks for it")
    for strategy in Strategy:
        if strategy is not chosen and strategy.value not in against:
            against[strategy.value] = _reason_against(strategy, chosen, recipe, machine, world_size)
    rejected = tuple(Rejected(name, reason) for name, reason in against.items())
    reason = STRATEGY_REASONS[chosen]
    if chosen is not Strategy.SINGLE and world_size == 1:
        reason = "one process, and the optimizer on the CPU is DeepSpeed's"
    if not taken.memory.fits:
        reason += "; even so it does not fit"
    return Decision(chosen, Origin.AUTO, reason, rejected)


def _reason_against(strategy: Strategy, chosen: Strategy, recipe: Recipe, machine: Machine, world_size: int) -> str:
    if strategy is Strategy.SINGLE:
        return f"there are {world_size} processes" if world_size > 1 else "keeps everything on the device"
    if world_size == 1 and not (strategy.zero_stage and chosen.zero_stage):
        return "there is one process"
    if strategy is Strategy.FSDP2:
        return "only when asked" if not machine.is_cpu else "the Trainer has none on CPUs"
    if strategy is Strategy.ZERO1:
        return "zero2 divides the gradients too, at the same communication volume"
    if recipe.quantization is not None:
        return "quantised weights are not divided"
    if asked_offload(recipe) is not None and not strategy.zero_stage:
        return "has no offload"
    if chosen is Strategy.DDP:
        return "not needed: DDP fits"
    return (
        "not needed" if (strategy.zero_stage or 0) > (chosen.zero_stage or 0) else "does not go with the rest asked for"
    )


def _offload_decision(recipe: Recipe, taken: Trial, rest: list[Trial], machine: Machine) -> Decision[dict[str, Any]]:
    value = taken.option.offload.model_dump(mode="json")
    if asked_offload(recipe) is not None:
        reason = "the recipe asks for it"
        if machine.is_cpu and taken.option.offload != NOTHING:
            reason += "; on a CPU it saves nothing"
        return Decision(value, Origin.ASKED, reason)
    moved = taken.option.offload
    rejected = _differing(rest, taken, "offload")
    if moved == NOTHING:
        return Decision(value, Origin.AUTO, "everything stays on the device: nothing waits for the bus", rejected)
    what = "optimizer states and parameters" if moved == EVERYTHING else "optimizer states"
    reason = f"{what} on the CPU: {taken.memory.host_gib:.1f} GiB of host memory a node"
    if machine.host_memory_gib is None:
        reason += " (how much there is, nobody knows here)"
    if not taken.memory.fits:
        reason += "; even so it does not fit"
    return Decision(value, Origin.AUTO, reason, rejected)


def _checkpointing_decision(recipe: Recipe, taken: Trial, rest: list[Trial]) -> Decision[bool]:
    chosen = taken.option.checkpointing
    if recipe.asked_gradient_checkpointing is not None:
        return Decision(chosen, Origin.ASKED, "the recipe asks for it")
    if chosen:
        reason = "activations are computed anew in the backward pass: about a third more compute, and it fits"
        if not taken.memory.fits:
            reason = "activations are computed anew in the backward pass; even so it does not fit"
        return Decision(True, Origin.AUTO, reason, _differing(rest, taken, "checkpointing"))
    reason = "activations fit; computing them anew would cost about a third more compute"
    return Decision(False, Origin.AUTO, reason, (Rejected(True, "not needed"),))


def _differing(rest: list[Trial], taken: Trial, field: str) -> tuple[Rejected, ...]:
    """List the trials that said otherwise in one field, each with its estimate."""
    chosen = getattr(taken.option, field)
    return tuple(
        Rejected(trial.option.label, trial.reason_against) for trial in rest if getattr(trial.option, field) != chosen
    )


def _moves_states(offload: OffloadSection) -> bool:
    return offload.optimizer is not OffloadDevice.NONE
