"""THE memory formulas: what one rank holds while it trains, and what the host holds under offload. Pure.

Sources: model states by ZeRO stage, Rajbhandari et al. 2020 (arXiv:1910.02054), sections 3.1 and 5; buffers, the fields
of deepspeed/runtime/zero/config.py and torch's DistributedDataParallel; activations, `mpt.planning.activations`.
`tests/training/test_memory_against_torch.py` holds the whole against torch's own accounting of real training steps.

A step has three peaks, and the estimate is the highest: the turn from forward to backward (all activations and logits,
and gradients only where they accumulate), the last block of the backward pass (all gradients, one block's
activations), and the optimizer step. So the parts, each at its own height, may add up to more than the peak.
GiB is 2**30 bytes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mpt.planning.activations import (
    activation_bytes,
    autocast_cache_bytes,
    block_bytes_per_token,
    logits_bytes,
    passing_bytes,
)
from mpt.planning.workload import BYTES, Workload, trainable_parameters
from mpt.terms import Method, OffloadDevice, Strategy

GIB = 2**30

# DeepSpeed's defaults, which `mpt.planning.deepspeed` leaves or writes (deepspeed/runtime/zero/config.py, 0.19.8).
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP_SIZE = 1_000_000_000
SWAP_BUFFERS = 4

# What a process holds before any tensor: a CUDA context with the kernels of torch and cuBLAS, NCCL's channels, and on
# a CPU the Python process itself. Orders of magnitude from practice; they decide only the last half GiB.
CUDA_CONTEXT = 0.6 * GIB
NCCL = 0.5 * GIB
CPU_PROCESS = 0.6 * GIB
# The allocators hold more than the tensors: CUDA's caching allocator rounds and fragments; on a CPU the resident
# high-water of real runs stood 20 to 33 % above the tensors (malloc, oneDNN scratch).
ALLOCATOR_SHARE_CUDA = 0.05
ALLOCATOR_SHARE_CPU = 0.25
# A plan fits when its peak stays under this share of the memory: the driver and the operating system take theirs.
USABLE_SHARE_GPU = 0.95
USABLE_SHARE_CPU = 0.85


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a plan needs: a rank, and with `host_gib` a node for what is offloaded.

    A capacity of None is unknown, and taken to be enough.
    """

    parts_gib: Mapping[str, float]
    peak_gib: float
    host_gib: float = 0.0
    capacity_gib: float | None = None
    host_capacity_gib: float | None = None
    fits: bool = True

    def to_json(self) -> dict[str, Any]:
        """Give the estimate as JSON values, rounded to 0.001 GiB."""
        data = asdict(self)
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in data.items()}
        return rounded | {"parts_gib": {key: round(value, 3) for key, value in self.parts_gib.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MemoryEstimate":
        """Read what `to_json` wrote."""
        return cls(**data)


def estimate_memory(
    work: Workload, *, capacity_gib: float | None = None, host_capacity_gib: float | None = None
) -> MemoryEstimate:
    """Estimate a rank's peak and compare it with `capacity_gib`, a rank's share of device (or host) memory."""
    weights = weights_bytes(work)
    gradients = gradients_bytes(work)
    optimizer = optimizer_bytes(work)
    communication = communication_bytes(work)
    cache = autocast_cache_bytes(work)
    kept, recomputed = activation_bytes(work)
    passing = passing_bytes(work)
    logits = logits_bytes(work)
    resident = weights + optimizer + communication
    turn = resident + cache + kept + max(logits, recomputed + passing) + (gradients if work.accumulates else 0)
    last_block = resident + gradients + work.tokens * block_bytes_per_token(work) + passing
    step = resident + gradients + step_bytes(work)
    tensors = max(turn, last_block, step)
    if work.on_cpu:
        overhead = CPU_PROCESS + ALLOCATOR_SHARE_CPU * tensors
    else:
        overhead = CUDA_CONTEXT + (NCCL if work.world_size > 1 else 0) + ALLOCATOR_SHARE_CUDA * tensors
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": kept + recomputed + passing,
        "logits": logits,
        "autocast_cache": cache,
        "communication": communication,
        "overhead": overhead,
    }
    peak, host = (tensors + overhead) / GIB, host_bytes(work) / GIB
    usable = USABLE_SHARE_CPU if work.on_cpu else USABLE_SHARE_GPU
    fits = capacity_gib is None or peak <= usable * capacity_gib
    host_fits = host_capacity_gib is None or host <= USABLE_SHARE_CPU * host_capacity_gib
    gib = {key: value / GIB for key, value in parts.items() if value}
    return MemoryEstimate(gib, peak, host, capacity_gib, host_capacity_gib if host else None, fits and host_fits)


def optimizer_bytes_per_parameter(optimizer: str, state_dtype: str = "fp32") -> float:
    """Bytes of state a trained parameter, less any master copy, for a name of TrainingArguments.optim.

    Two moments for the Adam family; one for lion, adagrad and rmsprop; a row and a column for adafactor (its share is
    small and counted as 0.1); none for sgd without momentum. Block-wise quantised states are a byte (Dettmers et al.
    2022, arXiv:2110.02861) or half a one. A name not known here counts as Adam.

    >>> optimizer_bytes_per_parameter("adamw_torch_fused"), optimizer_bytes_per_parameter("adamw_8bit")
    (8.0, 2.0)
    >>> optimizer_bytes_per_parameter("lion_32bit"), optimizer_bytes_per_parameter("sgd")
    (4.0, 0.0)
    """
    name = optimizer.removeprefix("paged_")
    if name in ("sgd", "lomo"):
        return 0.0
    if name == "adafactor":
        return 0.1
    states = 1 if name.startswith(("lion", "adagrad", "rmsprop")) else 3 if name.startswith(("ademamix", "grok")) else 2
    if name.endswith("8bit"):
        return states * 1.0
    return states * (0.5 if name.endswith("4bit") else BYTES[state_dtype])


def weights_bytes(work: Workload) -> float:
    """Parameters as they stand on the device between their uses."""
    if work.method is Method.FULL:
        stored = work.facts.parameters * BYTES[work.weights_dtype]
    elif work.method is Method.LORA:
        stored = work.facts.parameters * BYTES[work.weights_dtype] + trainable_parameters(work) * 4
    else:
        # peft's prepare_model_for_kbit_training casts everything that is not quantised to fp32; a 16-bit engine of
        # DeepSpeed casts it as it casts the adapters.
        rest = work.facts.parameters - work.quantized_parameters + trainable_parameters(work)
        stored = work.quantized_parameters * BYTES[work.weights_dtype] + rest * BYTES[work.gradient_dtype]
    if work.offload_parameters is not OffloadDevice.NONE:
        return 0.0
    return stored / _shards(work, 3)


def gradients_bytes(work: Workload) -> float:
    """Gradients at their fullest, at the end of a backward pass."""
    trained = trainable_parameters(work)
    own, accumulated = BYTES[work.gradient_dtype], BYTES[work.grad_accum_dtype]
    if work.strategy is Strategy.ZERO1:
        # Whole gradients, and beside them a whole accumulator where its dtype is another.
        return trained * (own + (accumulated if accumulated != own else 0))
    if work.strategy.zero_stage:
        on_device = 0 if work.offload_optimizer is not OffloadDevice.NONE else accumulated
        return trained * on_device / work.world_size
    return trained * max(own, accumulated) / _shards(work, 3)


def optimizer_bytes(work: Workload) -> float:
    """Optimizer states, and a master copy: DeepSpeed's, which every stage divides over the ranks, or bf16_pure's."""
    trained = trainable_parameters(work)
    states = trained * optimizer_bytes_per_parameter(work.optimizer, work.optimizer_state_dtype)
    states += 2 * trained if work.keeps_compensation else 0
    master = BYTES[work.master_weights_dtype]
    if work.strategy.zero_stage is None:
        has_copy = work.method is Method.FULL and master > BYTES[work.weights_dtype]
        return (states + (master * trained if has_copy else 0)) / _shards(work, 3)
    if work.offload_optimizer is not OffloadDevice.NONE:
        return 0.0
    return (states + master * trained) / work.world_size


def step_bytes(work: Workload) -> float:
    """What the optimizer step holds on top: ZeRO's copy of its gradients in the master weights' format."""
    if work.strategy.zero_stage and work.offload_optimizer is OffloadDevice.NONE:
        return BYTES[work.master_weights_dtype] * min(trainable_parameters(work) / work.world_size, SUB_GROUP_SIZE)
    return 0.0


def communication_bytes(work: Workload) -> float:
    """Buffers of the engine: DDP's buckets hold a second copy of all gradients (`gradient_as_bucket_view` is off in the
    Trainer), ZeRO double-buffers a bucket of hidden_size**2 elements and sums it in fp32, stage 3 and FSDP gather
    weights.
    """
    facts, trained = work.facts, trainable_parameters(work)
    if work.strategy is Strategy.DDP:
        return trained * BYTES[work.gradient_dtype]
    if work.strategy is Strategy.FSDP2:
        return 2 * facts.largest_layer_parameters * BYTES[work.autocast_dtype or work.weights_dtype]
    if work.strategy.zero_stage is None:
        return 0.0
    bucket = min(facts.hidden_size**2, trained) * (2 * BYTES[work.gradient_dtype] + 4)
    if work.strategy is Strategy.ZERO3:
        # stage3_max_live_parameters and stage3_max_reuse_distance let this many stay gathered.
        live = min(facts.parameters, MAX_LIVE_PARAMETERS + facts.largest_layer_parameters)
        stands_whole = work.world_size == 1 and work.offload_parameters is OffloadDevice.NONE
        bucket += 0 if stands_whole else live * BYTES[work.weights_dtype]
    return bucket


def host_bytes(work: Workload) -> float:
    """Host memory a node for what is offloaded to the CPU, or for the swap buffers of what is offloaded to NVMe."""
    trained, ranks = trainable_parameters(work), work.processes_per_node
    shard = trained / work.world_size
    states = 4 + 4 + optimizer_bytes_per_parameter(work.optimizer, work.optimizer_state_dtype)  # master and gradients
    host = 0.0
    if work.offload_optimizer is OffloadDevice.CPU:
        host += ranks * shard * states
    elif work.offload_optimizer is OffloadDevice.NVME:
        host += ranks * min(shard, SUB_GROUP_SIZE) * 4 * SWAP_BUFFERS
    if work.offload_parameters is OffloadDevice.CPU:
        host += ranks * work.facts.parameters / work.world_size * BYTES[work.weights_dtype]
    elif work.offload_parameters is OffloadDevice.NVME:
        host += ranks * 5 * 1e8 * BYTES[work.weights_dtype]  # buffer_count x buffer_size of offload_param
    return host


def _shards(work: Workload, stage: int) -> int:
    """Over how many ranks a tensor is divided that ZeRO divides from `stage` on; FSDP divides everything."""
    reached = work.strategy is Strategy.FSDP2 or (work.strategy.zero_stage or 0) >= stage
    return work.world_size if reached else 1
