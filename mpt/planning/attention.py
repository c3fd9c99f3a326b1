"""Choose the attention implementation from device, dtype, the model's attention and the installed packages. Pure."""

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.attention_support import has_attention
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.model_facts import ModelFacts
from mpt.terms import Attention, DeviceKind, Feature, Precision

# What transformers 5.23 asks for each kernel (utils/import_utils.py: the name of the distribution decides, because
# flash-attn and flash-attn-4 share the folder flash_attn), and how to get it.
HUB = ("kernels", 'pip install "kernels>=0.18.2,<0.19"')
PACKAGES: dict[Attention, tuple[str, str]] = {
    Attention.FLASH_ATTENTION_4: ("flash-attn-4", "pip install flash-attn-4"),
    Attention.FLASH_ATTENTION_3: ("flash-attn-3", "build flash-attention's hopper/ folder"),
    Attention.FLASH_ATTENTION_2: ("flash-attn", "pip install flash-attn --no-build-isolation"),
    Attention.HUB_FLASH_ATTENTION_4: HUB,
    Attention.HUB_FLASH_ATTENTION_3: HUB,
    Attention.HUB_VLLM_FLASH_ATTENTION_3: HUB,
    Attention.HUB_FLASH_ATTENTION_2: HUB,
    Attention.HUB_AITER_FLASH_ATTENTION: HUB,
}
# Which kernel each one is. vLLM's version 3 has kernels for Ampere and Ada too (its CMakeLists.txt); AITER is AMD's.
KERNEL: dict[Attention, Feature] = {
    Attention.FLASH_ATTENTION_4: Feature.FLASH_ATTENTION_4,
    Attention.FLASH_ATTENTION_3: Feature.FLASH_ATTENTION_3,
    Attention.FLASH_ATTENTION_2: Feature.FLASH_ATTENTION_2,
    Attention.HUB_FLASH_ATTENTION_4: Feature.FLASH_ATTENTION_4,
    Attention.HUB_FLASH_ATTENTION_3: Feature.FLASH_ATTENTION_3,
    Attention.HUB_VLLM_FLASH_ATTENTION_3: Feature.FLASH_ATTENTION_3,
    Attention.HUB_FLASH_ATTENTION_2: Feature.FLASH_ATTENTION_2,
    Attention.HUB_AITER_FLASH_ATTENTION: Feature.FLASH_ATTENTION_2,
}
# transformers 5.23, FLASH_ATTN_KERNEL_DEVICES: what the hub has builds for.
HUB_DEVICES: dict[Attention, DeviceKind] = {
    Attention.HUB_FLASH_ATTENTION_4: DeviceKind.CUDA,
    Attention.HUB_FLASH_ATTENTION_3: DeviceKind.CUDA,
    Attention.HUB_VLLM_FLASH_ATTENTION_3: DeviceKind.CUDA,
    Attention.HUB_FLASH_ATTENTION_2: DeviceKind.CUDA,
    Attention.HUB_AITER_FLASH_ATTENTION: DeviceKind.ROCM,
}
# The largest head that a kernel trains. Dao-AILab/flash-attention: README (2), hopper/setup.py (3), and
# flash_attn/cute/interface.py, whose backward pass ends at 128 (4).
LARGEST_HEAD: dict[Feature, int] = {
    Feature.FLASH_ATTENTION_4: 128,
    Feature.FLASH_ATTENTION_3: 256,
    Feature.FLASH_ATTENTION_2: 256,
}
# In this order where nothing was asked for; version 4's backward pass is young.
PREFERRED = (Attention.FLASH_ATTENTION_3, Attention.FLASH_ATTENTION_2)
CONSIDERED = (Attention.FLASH_ATTENTION_4, *PREFERRED)
# transformers 5.23 warns and drops nothing out with version 3 and 4, and flex refuses.
WITHOUT_DROPOUT = (Feature.FLASH_ATTENTION_4, Feature.FLASH_ATTENTION_3)
SIXTEEN_BIT = (Precision.FP16, Precision.BF16, Precision.BF16_PURE, Precision.FP8, Precision.MXFP8)

# Forward and backward of 8 x 8 heads of 32 on one core of an EPYC with AVX512-BF16, torch 2.13, in ms: sdpa 126, eager
# 110 (compiled 79) at 512 tokens in bf16; at 1024, 8 heads of 64, 120 against 141; in fp32 sdpa is faster from 512 on.
FEW_TOKENS = 512
# Model types whose eager attention the audit recognises (tests/training/test_watching.py).
SEEN_EAGERLY = frozenset(
    ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3",
     "stablelm", "starcoder2")
)  # fmt: skip

SDPA_INSTEAD = "Ask for `attention: sdpa`, or leave it out."


def choose_attention(
    asked: Attention | None,
    machine: Machine,
    precision: Precision,
    packages: frozenset[str] | None,
    facts: ModelFacts | None = None,
    *,
    is_packed: bool = False,
    sequence_length: int | None = None,
) -> Decision[Attention]:
    """Choose the attention kernel; `asked` None means auto, `packages` None that nobody knows what is installed there.

    `is_packed`: samples hold several documents that don't see one another. Raises UnsupportedError where the device or
    the installation can't do what was asked, MptError where the precision or the model can't.
    """
    if asked is not None:
        _check(asked, machine, precision, packages, facts)
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    against = {kernel: _reason_against(kernel, machine, precision, packages, facts) for kernel in CONSIDERED}
    rejected = [Rejected(kernel.value, reason) for kernel, reason in against.items() if reason]
    rejected.append(Rejected(Attention.FLEX.value, _against_flex(machine, facts)))
    if facts is not None and not has_attention(facts.model_type, Attention.SDPA):
        other = next((kernel for kernel in PREFERRED if not against[kernel]), Attention.EAGER)
        rejected.append(Rejected(Attention.SDPA.value, f"{facts.model_type} has no such implementation"))
        return Decision(other, Origin.AUTO, f"{facts.model_type} runs with it, and not with sdpa", tuple(rejected))
    if _is_faster_eagerly(machine, precision, facts, sequence_length) and not is_packed:
        slow = "torch's kernel for CPUs takes a third longer for so few tokens: its backward pass in bf16 is slow"
        rejected.append(Rejected(Attention.SDPA.value, slow))
        reason = f"the scores of {sequence_length} tokens are few, and multiplied by the matrix units in bf16"
        return Decision(Attention.EAGER, Origin.AUTO, reason, tuple(rejected))
    rejected.append(Rejected(Attention.EAGER.value, "holds every score in memory; only for comparison"))
    for kernel in PREFERRED:
        if not against[kernel]:
            reason = "the device has its kernel, the package is installed and the step computes in 16 bits"
            if is_packed:
                reason += "; it takes the documents of a sample apart without a mask"
            rejected.append(Rejected(Attention.SDPA.value, "the second choice"))
            return Decision(kernel, Origin.AUTO, reason, tuple(rejected))
    return Decision(Attention.SDPA, Origin.AUTO, _sdpa_reason(machine, precision, is_packed), tuple(rejected))


def _check(
    asked: Attention,
    machine: Machine,
    precision: Precision,
    packages: frozenset[str] | None,
    facts: ModelFacts | None,
) -> None:
    """Raise where what was asked for can't run."""
    if asked is Attention.FLEX and machine.is_cpu:
        raise UnsupportedError(
            "attention flex_attention was asked for, and it has no backward pass on a CPU", remedy=SDPA_INSTEAD
        )
    if not _runs_on(asked, machine):
        raise UnsupportedError(
            f"attention {asked} was asked for, and {machine.label} has no kernel of it", remedy=SDPA_INSTEAD
        )
    if asked in KERNEL and precision not in SIXTEEN_BIT:
        raise MptError(
            f"attention {asked} computes in fp16 or bf16 only, and the precision is {precision}",
            remedy="Ask for `attention: sdpa`, or for a 16-bit precision.",
        )
    reason = _model_against(asked, facts)
    if reason is not None:
        has_sdpa = facts is None or has_attention(facts.model_type, Attention.SDPA)
        remedy = SDPA_INSTEAD if has_sdpa else "Ask for `attention: eager`, or leave it out."
        raise MptError(f"attention {asked} was asked for, and {reason}", remedy=remedy)
    if asked in PACKAGES and packages is not None and PACKAGES[asked][0] not in packages:
        package, install = PACKAGES[asked]
        raise UnsupportedError(
            f"attention {asked} was asked for, and the package {package} is not installed",
            remedy=f"Install it ({install}), or ask for `attention: sdpa`.",
        )


def _runs_on(asked: Attention, machine: Machine) -> bool:
    """Whether every device has the kernel; what torch or the model itself computes runs anywhere."""
    if machine.kind is not HUB_DEVICES.get(asked, machine.kind):
        return False
    if asked is Attention.HUB_VLLM_FLASH_ATTENTION_3 and machine.all_compute(Feature.FLASH_ATTENTION_2):
        return True
    return asked not in KERNEL or machine.all_compute(KERNEL[asked])


def _reason_against(
    kernel: Attention,
    machine: Machine,
    precision: Precision,
    packages: frozenset[str] | None,
    facts: ModelFacts | None,
) -> str | None:
    if not _runs_on(kernel, machine):
        return f"{machine.label} has no kernel of it"
    if precision not in SIXTEEN_BIT:
        return f"computes in fp16 or bf16 only, and the precision is {precision}"
    reason = _model_against(kernel, facts)
    if reason is not None:
        return reason
    if kernel is Attention.FLASH_ATTENTION_4:
        return "only when asked: its backward pass is young"
    package, install = PACKAGES[kernel]
    if packages is None:
        return f"nobody knows here whether {package} is installed there"
    if package not in packages:
        return f"the package {package} is not installed ({install})"
    return None


def _model_against(asked: Attention, facts: ModelFacts | None) -> str | None:
    """Say why a model can't train with an implementation; None where it can."""
    if facts is None:
        return None
    if not has_attention(facts.model_type, asked):
        return f"{facts.model_type} has no such implementation"
    kernel = KERNEL.get(asked)
    if kernel is not None and facts.head_dim > LARGEST_HEAD[kernel]:
        return f"it trains heads of at most {LARGEST_HEAD[kernel]} numbers; the model's have {facts.head_dim}"
    if (kernel in WITHOUT_DROPOUT or asked is Attention.FLEX) and facts.attention_dropout:
        return "it has no dropout, and the model drops attention weights out (attention_dropout)"
    return None


def _against_flex(machine: Machine, facts: ModelFacts | None) -> str:
    if machine.is_cpu:
        return "it has no backward pass on a CPU"
    return _model_against(Attention.FLEX, facts) or "only when asked: it compiles a kernel for each shape of batch"


def _is_faster_eagerly(
    machine: Machine, precision: Precision, facts: ModelFacts | None, sequence_length: int | None
) -> bool:
    """Whether a CPU multiplies the scores in bf16 faster than torch's kernel does (see FEW_TOKENS)."""
    return (
        machine.is_cpu
        and precision in (Precision.BF16, Precision.BF16_PURE)
        and machine.all_compute(Feature.BF16)
        and facts is not None
        and facts.model_type in SEEN_EAGERLY
        and not facts.attention_dropout
        and sequence_length is not None
        and sequence_length <= FEW_TOKENS
    )


def _sdpa_reason(machine: Machine, precision: Precision, is_packed: bool) -> str:
    if machine.kind is DeviceKind.CPU:
        return "torch's own kernel, and the one that trains on a CPU"
    if is_packed:
        return "torch's own kernel: memory-efficient attention, because documents that share a sample need a mask"
    if machine.all_compute(Feature.FLASH_ATTENTION_2) and precision in SIXTEEN_BIT:
        return "torch's own kernel: Flash Attention 2 is built into it for these devices"
    return "torch's own kernel: memory-efficient attention on these devices and this precision"
