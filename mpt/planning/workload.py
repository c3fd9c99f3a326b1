"""What the memory of a rank depends on, as one frozen value. Pure."""

from dataclasses import dataclass, replace

from mpt.planning.model_facts import ModelFacts
from mpt.terms import Attention, Method, OffloadDevice, Strategy, Task

# Bytes an element. 4-bit weights carry a constant for each block of 64; with double quantisation these are 8-bit, with
# an fp32 constant for each 256 of them: 0.127 bits a weight (Dettmers et al. 2023, arXiv:2305.14314, section 3).
BYTES: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "int8": 1.0,
    "nf4": 0.5 + 0.127 / 8,
    "fp4": 0.5 + 0.127 / 8,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that the memory of a rank depends on. Dtypes are "fp32", "bf16", "fp16", and "nf4", "fp4", "int8" for
    frozen weights; `weights_dtype` is that of the base under adapters. `accumulates`: more than one micro batch a step.
    """

    facts: ModelFacts
    method: Method
    task: Task
    strategy: Strategy
    world_size: int
    processes_per_node: int
    on_cpu: bool
    weights_dtype: str
    gradient_dtype: str
    grad_accum_dtype: str
    optimizer_state_dtype: str
    autocast_dtype: str | None
    optimizer: str
    attention: Attention
    sequence_length: int
    micro_batch_size: int = 1
    accumulates: bool = False
    gradient_checkpointing: bool = False
    offload_optimizer: OffloadDevice = OffloadDevice.NONE
    offload_parameters: OffloadDevice = OffloadDevice.NONE
    adapter_parameters: int = 0  # all that is trained beside the frozen model, modules trained whole included
    adapter_inputs: int = 0  # widths of the inputs of all layers with an adapter, summed
    adapter_outputs: int = 0
    has_dora: bool = False
    quantized_parameters: int = 0
    loss: str = "full"  # as `mpt.planning.loss` has it
    master_weights_dtype: str = "fp32"
    keeps_compensation: bool = False  # Kahan summation: a second 16-bit number a weight

    @property
    def tokens(self) -> int:
        """Tokens a forward pass."""
        return self.micro_batch_size * self.sequence_length

    @property
    def query_width(self) -> int:
        return self.facts.attention_heads * self.facts.head_dim

    @property
    def key_value_width(self) -> int:
        return self.facts.key_value_heads * self.facts.head_dim

    @property
    def computes_in_half(self) -> bool:
        return self.autocast_dtype is not None or self.weights_dtype in ("bf16", "fp16")

    @property
    def residual_is_fp32(self) -> bool:
        """16-bit embeddings begin a 16-bit residual stream; peft casts those of a quantised model to fp32."""
        return self.weights_dtype not in ("bf16", "fp16")


def trainable_parameters(work: Workload) -> int:
    """Parameters with a gradient: all of them, or the adapters' (`mpt.planning.adapters`)."""
    return work.facts.parameters if work.method is Method.FULL else work.adapter_parameters


def with_micro_batch(work: Workload, micro_batch_size: int, accumulates: bool) -> Workload:
    """Ask about the same work with other batches."""
    return replace(work, micro_batch_size=micro_batch_size, accumulates=accumulates)
