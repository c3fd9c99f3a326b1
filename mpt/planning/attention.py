"""Choose the attention implementation from device, dtype and installed packages. Pure."""

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.terms import Attention, DeviceKind, Feature, Precision

# What transformers 5.23 imports for each kernel (transformers/modeling_flash_attention_utils.py), and how to get it.
PACKAGES: dict[Attention, tuple[str, str]] = {
    Attention.FLASH_ATTENTION_4: ("flash_attn.cute", "pip install flash-attn-4"),
    Attention.FLASH_ATTENTION_3: ("flash_attn_interface", "build flash-attention's hopper/ folder"),
    Attention.FLASH_ATTENTION_2: ("flash_attn", "pip install flash-attn --no-build-isolation"),
}
FEATURES: dict[Attention, Feature] = {
    Attention.FLASH_ATTENTION_4: Feature.FLASH_ATTENTION_4,
    Attention.FLASH_ATTENTION_3: Feature.FLASH_ATTENTION_3,
    Attention.FLASH_ATTENTION_2: Feature.FLASH_ATTENTION_2,
}
SIXTEEN_BIT = (Precision.FP16, Precision.BF16, Precision.BF16_PURE, Precision.FP8, Precision.MXFP8)


def choose_attention(
    asked: Attention | None, machine: Machine, precision: Precision, packages: frozenset[str] | None
) -> Decision[Attention]:
    """Choose the attention kernel; `asked` None means auto, `packages` None that nobody knows what is installed there.

    Raises UnsupportedError where the device or the installation can't do what was asked, MptError where the precision
    can't.
    """
    if asked is not None:
        return _asked(asked, machine, precision, packages)
    against = {kernel: _reason_against(kernel, machine, precision, packages) for kernel in FEATURES}
    rejected = [Rejected(kernel.value, reason) for kernel, reason in against.items() if reason]
    rejected.append(Rejected(Attention.EAGER.value, "holds every score in memory; only for comparison"))
    for kernel in (Attention.FLASH_ATTENTION_3, Attention.FLASH_ATTENTION_2):
        if not against[kernel]:
            reason = "the device has its kernel, the package is installed and the step computes in 16 bits"
            rejected.append(Rejected(Attention.SDPA.value, "the second choice"))
            return Decision(kernel, Origin.AUTO, reason, tuple(rejected))
    return Decision(Attention.SDPA, Origin.AUTO, _sdpa_reason(machine, precision), tuple(rejected))


def _asked(
    asked: Attention, machine: Machine, precision: Precision, packages: frozenset[str] | None
) -> Decision[Attention]:
    if asked is Attention.FLEX and machine.is_cpu:
        raise UnsupportedError(
            "attention flex_attention was asked for, and it has no backward pass on a CPU",
            remedy="Ask for `attention: sdpa`, or leave it out.",
        )
    if asked in FEATURES:
        if not machine.all_compute(FEATURES[asked]):
            raise UnsupportedError(
                f"attention {asked} was asked for, and {machine.label} has no kernel of it",
                remedy="Ask for `attention: sdpa`, or leave it out.",
            )
        if precision not in SIXTEEN_BIT:
            raise MptError(
                f"attention {asked} computes in fp16 or bf16 only, and the precision is {precision}",
                remedy="Ask for `attention: sdpa`, or for a 16-bit precision.",
            )
        package, install = PACKAGES[asked]
        if packages is not None and package.partition(".")[0] not in packages:
            raise UnsupportedError(
                f"attention {asked} was asked for, and the package {package} is not installed",
                remedy=f"Install it ({install}), or ask for `attention: sdpa`.",
            )
    return Decision(asked, Origin.ASKED, "the recipe asks for it")


def _reason_against(
    kernel: Attention, machine: Machine, precision: Precision, packages: frozenset[str] | None
) -> str | None:
    if not machine.all_compute(FEATURES[kernel]):
        return f"{machine.label} has no kernel of it"
    if precision not in SIXTEEN_BIT:
        return f"computes in fp16 or bf16 only, and the precision is {precision}"
    if kernel is Attention.FLASH_ATTENTION_4:
        return "only when asked: its backward pass is young"
    package, install = PACKAGES[kernel]
    if packages is None:
        return f"nobody knows here whether {package} is installed there"
    if package not in packages:
        return f"the package {package} is not installed ({install})"
    return None


def _sdpa_reason(machine: Machine, precision: Precision) -> str:
    if machine.kind is DeviceKind.CPU:
        return "torch's own kernel, and the one that trains on a CPU"
    if machine.all_compute(Feature.FLASH_ATTENTION_2) and precision in SIXTEEN_BIT:
        return "torch's own kernel: Flash Attention 2 is built into it for these devices"
    return "torch's own kernel: memory-efficient attention on these devices and this precision"
