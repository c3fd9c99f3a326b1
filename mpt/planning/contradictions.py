"""Wishes about processes, sharding and offload that contradict each other or the machine; and what was asked. Pure.

Called by `mpt.planning.sharding` before anything is chosen. A wish that can't be met is an error, never changed
silently.
"""

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.number_formats import TORCH_ADAMW
from mpt.recipe.schema import OffloadSection, Recipe
from mpt.recipe.training_keys import training_arguments
from mpt.terms import FP8_MODES, DeviceKind, Feature, Method, OffloadDevice, Precision, Strategy


def method_of(recipe: Recipe) -> Method:
    """What is trained: adapters on quantised weights, adapters, or every weight."""
    if recipe.quantization is not None:
        return Method.QLORA
    return Method.FULL if recipe.lora is None else Method.LORA


def optimizer_of(recipe: Recipe) -> str:
    """Name of the optimizer in TrainingArguments' words."""
    return str(recipe.training_keys.get("optim", training_arguments()["optim"]["default"]))


def asked_offload(recipe: Recipe) -> OffloadSection | None:
    """Spell out the offload that the recipe asks for; None where it leaves the choice.

    The short form `offload: cpu` moves all that the strategy can move: optimizer states, and parameters unless the
    recipe asks for zero1 or zero2. Raises MptError for `offload: nvme`, which lacks the directory.
    """
    asked = recipe.offload
    if asked == "auto":
        return None
    if isinstance(asked, OffloadSection):
        return asked
    if asked is OffloadDevice.NVME:
        raise MptError(
            "offload: nvme does not say where the drive is",
            remedy="Write `offload: {optimizer: nvme, parameters: nvme, nvme_path: /a/directory/on/it}`.",
        )
    keeps_parameters = recipe.distributed.strategy in (Strategy.ZERO1, Strategy.ZERO2)
    return OffloadSection(
        optimizer=OffloadDevice(asked), parameters=OffloadDevice.NONE if keeps_parameters else OffloadDevice(asked)
    )


def choose_processes(recipe: Recipe, machine: Machine) -> tuple[Decision[int], Decision[int]]:
    """Decide the processes a node and in all.

    Raises UnsupportedError for more processes than devices, MptError for `single` with several.
    """
    asked, strategy = recipe.distributed.processes_per_node, recipe.distributed.strategy
    devices = len(machine.devices)
    has_mig = any(device.is_mig for device in machine.devices)
    if strategy == Strategy.SINGLE and ((asked or 1) > 1 or machine.nodes > 1):
        raise MptError(
            f"distributed.strategy single was asked for with {(asked or 1) * machine.nodes} processes",
            remedy="Leave processes_per_node out, or ask for another strategy.",
        )
    if asked is not None and not machine.is_cpu and asked > (1 if has_mig else devices):
        raise UnsupportedError(
            f"distributed.processes_per_node is {asked}, and {machine.label} has "
            + ("MIG instances, of which NCCL joins no two" if has_mig else f"{devices} a node"),
            remedy="Leave processes_per_node out: there is one process a device.",
        )
    if asked is not None:
        per_node = Decision(asked, Origin.ASKED, "the recipe asks for it")
    elif strategy == Strategy.SINGLE:
        per_node = Decision(1, Origin.DERIVED, "single was asked for")
    elif machine.is_cpu and devices == 1:
        per_node = Decision(1, Origin.AUTO, "one process uses every core of a CPU")
    elif has_mig:
        per_node = Decision(1, Origin.AUTO, "a process sees one MIG instance, and NCCL joins no two of a GPU")
    else:
        per_node = Decision(devices, Origin.AUTO, "one process a device")
    nodes = "node" if machine.nodes == 1 else "nodes"
    world = Decision(
        per_node.value * machine.nodes, Origin.DERIVED, f"{per_node.value} a node x {machine.nodes} {nodes}"
    )
    return per_node, world


def check_asked(recipe: Recipe, machine: Machine, precision: Precision, world_size: int) -> None:
    """Raise MptError or UnsupportedError for the first wish that contradicts another one or the machine."""
    offload = asked_offload(recipe)
    if recipe.quantization is not None and (
        precision in FP8_MODES or "fp8" in (recipe.precision.layers or {}).values()
    ):
        raise MptError(
            "precision fp8 was asked for with quantization, whose weights are 4 or 8 bits already",
            remedy="Ask for `precision: bf16`, or remove the quantization block.",
        )
    if recipe.distributed.strategy != "auto":
        _check_strategy(Strategy(recipe.distributed.strategy), recipe, machine, precision, world_size)
    if offload is not None and offload != OffloadSection():
        _check_offload(offload, recipe, machine, precision)


def deepspeed_computes_fp16(machine: Machine) -> bool:
    """Whether DeepSpeed takes fp16 there: not on a CPU that would emulate it, and not before Volta.

    deepspeed 0.19.8, accelerator/cpu_accelerator.py and cuda_accelerator.py, `is_fp16_supported`.
    """
    if machine.is_cpu:
        return machine.all_compute(Feature.FP16)
    return all((device.compute_capability or (7, 0)) >= (7, 0) for device in machine.devices)


def _check_strategy(
    strategy: Strategy, recipe: Recipe, machine: Machine, precision: Precision, world_size: int
) -> None:
    problem = f"distributed.strategy {strategy} was asked for"
    if strategy is Strategy.FSDP2 and machine.is_cpu:
        raise UnsupportedError(
            f"{problem} on a CPU, where transformers' Trainer would silently run plain DDP",
            remedy="Ask for ddp, zero2 or zero3, which run on CPUs.",
        )
    if strategy in (Strategy.DDP, Strategy.FSDP2) and world_size == 1:
        raise MptError(
            f"{problem}, and there is one process on {machine.label}",
            remedy="Leave the strategy out, or ask for more with `distributed: {processes_per_node: 2}`.",
        )
    if strategy.zero_stage and machine.kind is DeviceKind.MPS:
        raise UnsupportedError(f"{problem}, and DeepSpeed does not run on MPS", remedy="Leave the strategy out.")
    if strategy.zero_stage and precision is Precision.FP16 and not deepspeed_computes_fp16(machine):
        raise UnsupportedError(
            f"{problem} in fp16, and DeepSpeed has no fp16 on {machine.label}, which would only emulate it",
            remedy="Ask for `precision: bf16` or fp32, or for `distributed: {strategy: ddp}`.",
        )
    if recipe.quantization is not None and strategy in (Strategy.ZERO3, Strategy.FSDP2):
        raise MptError(
            f"{problem} with quantization, and quantised weights can't be divided over ranks",
            remedy="Ask for ddp or zero2, or leave the strategy out.",
        )


def _check_offload(offload: OffloadSection, recipe: Recipe, machine: Machine, precision: Precision) -> None:
    strategy = recipe.distributed.strategy
    moves_parameters = offload.parameters is not OffloadDevice.NONE
    if strategy != "auto" and not Strategy(strategy).zero_stage:
        raise MptError(
            f"offload was asked for with distributed.strategy {strategy}, and only ZeRO offloads",
            remedy="Ask for zero2 or zero3, or leave the strategy out.",
        )
    if moves_parameters and strategy in (Strategy.ZERO1, Strategy.ZERO2):
        raise MptError(
            f"offload.parameters was asked for with {strategy}, and only zero3 divides and moves parameters",
            remedy="Ask for zero3, or for `offload: {optimizer: cpu}` alone.",
        )
    if recipe.quantization is not None:
        raise MptError(
            "offload was asked for with quantization, whose weights and optimizer states ZeRO can't move",
            remedy="Remove one of the two.",
        )
    if precision is Precision.BF16_PURE:
        raise MptError(
            "offload was asked for with precision bf16_pure, whose rounding is not that of DeepSpeed's CPU optimizer",
            remedy="Ask for `precision: bf16`.",
        )
    if machine.kind is DeviceKind.MPS:
        raise UnsupportedError("offload was asked for, and DeepSpeed does not run on MPS", remedy="Leave it out.")
    if offload.optimizer is not OffloadDevice.NONE and optimizer_of(recipe) not in TORCH_ADAMW:
        raise MptError(
            f"offload.optimizer was asked for with training.optim {optimizer_of(recipe)}, and DeepSpeed's CPU "
            "optimizer is AdamW",
            remedy="Leave training.optim out, or the offload.",
        )
