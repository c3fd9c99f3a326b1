"""How long the parts of a step take at the least, by the rates of the hardware table. Pure.

A lower bound a device: the matrix multiplications at their peak rate, the optimizer at the memory's bandwidth. Real
steps reach 30 to 60 % of the peak, so what is told from here are ratios, and never a time.
"""

from mpt.hardware.machine import Machine
from mpt.planning.plan import Plan
from mpt.terms import FP8_MODES, DeviceKind, Method, Precision, Task

# Which rate of the table a precision's matrix multiplications run at.
RATES: dict[Precision, str] = {
    Precision.FP32: "fp32",
    Precision.TF32: "tf32",
    Precision.FP16: "fp16",
    Precision.BF16: "bf16",
    Precision.BF16_PURE: "bf16",
    Precision.FP8: "fp8",
    Precision.MXFP8: "fp8",
}


def peak_tflops(machine: Machine, precision: Precision) -> float | None:
    """The rate of the slowest device, which paces the others; None where the table has none."""
    rates = [device.peak_tflops.get(RATES[precision]) for device in machine.devices]
    return None if any(rate is None for rate in rates) else min(rate for rate in rates if rate is not None)


def bandwidth_gb_s(machine: Machine) -> float | None:
    """The bandwidth of the slowest device's memory; None where the table has none."""
    rates = [device.bandwidth_gb_s for device in machine.devices]
    return None if any(rate is None for rate in rates) else min(rate for rate in rates if rate is not None)


def tokens_to_be_busy(machine: Machine, precision: Precision) -> float | None:
    """Tokens a pass above which computing takes longer than reading the weights (Williams et al. 2009, the roofline).

    A multiplication with a weight of K x N in 16 bits does 2 x tokens x K x N operations and reads 2 x K x N bytes: so
    many operations a byte as there are tokens. The device does rate / bandwidth of them in the time of a byte.
    """
    rate, bandwidth = peak_tflops(machine, precision), bandwidth_gb_s(machine)
    return None if rate is None or bandwidth is None else rate * 1000 / bandwidth


def linear_flops(plan: Plan) -> float:
    """Operations a token of a forward pass in the blocks' linear layers: two a weight (Kaplan et al. 2020, table 1)."""
    return 2.0 * plan.facts.linear_parameters


def head_flops(plan: Plan) -> float:
    """Operations a token of a forward pass in the output head."""
    if plan.value("task") == Task.SEQUENCE_CLASSIFICATION:
        return 0.0
    return 2.0 * plan.facts.vocab_size * plan.facts.hidden_size


def attention_flops(plan: Plan) -> float:
    """Operations a token of a forward pass in scores and their sums: 4 x length x width, half where it is causal."""
    facts = plan.facts
    is_causal = plan.value("task") in (Task.CAUSAL_LM, Task.SFT)
    whole: float = 4.0 * plan.value("sequence_length") * facts.attention_heads * facts.head_dim * facts.layers
    return whole / 2 if is_causal else whole


def attention_share(plan: Plan) -> float:
    """Share of a forward pass's operations that attention kernels do."""
    scores = attention_flops(plan)
    return scores / (linear_flops(plan) + head_flops(plan) + scores)


def passes(plan: Plan) -> float:
    """Forward passes that a step's matrix multiplications are worth: 3 with all gradients, 2 where the weights are
    frozen and only activations have one; one more where activations are computed anew."""
    worth = 3.0 if plan.value("method") == Method.FULL else 2.0
    return worth + (1.0 if plan.value("gradient_checkpointing") else 0.0)


def matmul_seconds(plan: Plan, precision: Precision | None = None) -> float | None:
    """Seconds of a device for a step's matrix multiplications at the peak rate, as planned or in another precision.

    fp8 takes the blocks' linear layers; the head and attention stay in bf16.
    """
    mode = precision or Precision(plan.value("precision"))
    tokens: int = (
        plan.value("micro_batch_size") * plan.value("gradient_accumulation_steps") * plan.value("sequence_length")
    )
    rest_mode = Precision.BF16 if mode in FP8_MODES else mode
    rate, rest_rate = peak_tflops(plan.machine, mode), peak_tflops(plan.machine, rest_mode)
    if rate is None or rest_rate is None:
        return None
    seconds = linear_flops(plan) / rate + (head_flops(plan) + attention_flops(plan)) / rest_rate
    return float(tokens * passes(plan) * seconds / 1e12)


def has_tensor_cores(machine: Machine) -> bool:
    """Whether multiples of 8 and 16 matter: matrix units of a GPU."""
    return machine.kind in (DeviceKind.CUDA, DeviceKind.ROCM, DeviceKind.XPU)
