"""Choose the number format of training from what the devices compute and what the checkpoint bears. Pure.

Capability is a set per feature, never an order: `torch.cuda.is_bf16_supported()` says True on a T4, because it counts
emulation, and an RTX 5090 (12.0) is no superset of a B200 (10.0).
"""

from dataclasses import dataclass

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Device, Machine
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.terms import FP8_MODES, DeviceKind, Feature, Precision

NEEDS: dict[Precision, Feature] = {
    Precision.FP32: Feature.FP32,
    Precision.TF32: Feature.TF32,
    Precision.FP16: Feature.FP16,
    Precision.BF16: Feature.BF16,
    Precision.BF16_PURE: Feature.BF16,
    Precision.FP8: Feature.FP8,
    Precision.MXFP8: Feature.MXFP8,
}


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What bears on fp16: the dtype of the weights on disk, and whether this family is known to overflow in it."""

    dtype: str | None
    overflows_in_fp16: bool


def choose_precision(
    asked: Precision | None,
    machine: Machine,
    *,
    allow_emulation: bool = False,
    checkpoint: CheckpointFacts | None = None,
    keeps_mlp_wide: bool = False,
) -> Decision[Precision]:
    """Choose a precision; `asked` None means auto. `keeps_mlp_wide`: the recipe keeps the layers out of fp16 that leave
    its range where a family of models does (`mpt.planning.layers.keeps_mlp_wide`).

    Raises UnsupportedError for an asked precision that a device can't compute natively, unless emulation is allowed;
    MptError for fp16 with a checkpoint that overflows in it.
    """
    if asked is None:
        return _automatic(machine, checkpoint)
    feature = NEEDS[asked]
    lacking = _lacking(machine, feature)
    if asked in FP8_MODES and _are_unlike(machine):
        raise UnsupportedError(
            f"precision {asked} was asked for on unlike devices: {machine.label}",
            remedy="fp8 scales must agree over ranks: train on identical devices, or ask for bf16.",
        )
    if asked is Precision.FP16 and checkpoint is not None and checkpoint.overflows_in_fp16 and not keeps_mlp_wide:
        instead = _automatic(machine, checkpoint).value
        raise MptError(
            "precision fp16 was asked for, and checkpoints of this family leave fp16's range (65504) in the forward "
            "pass, where no loss scale helps",
            remedy=f"Ask for `precision: {instead}`, or keep the layers that overflow in fp32: `precision: {{mode: "
            'fp16, layers: {"*.down_proj": fp32}}`.',
        )
    if not lacking:
        return Decision(asked, Origin.ASKED, f"{_everyone(machine)} {feature} natively", _rejected_for(asked, machine))
    names = _names(lacking)
    if not all(_can_emulate(device, feature) for device in lacking):
        has_fp8 = asked is Precision.MXFP8 and machine.all_compute(Feature.FP8)
        instead = Precision.FP8 if has_fp8 else _automatic(machine, checkpoint).value
        raise UnsupportedError(
            f"precision {asked} was asked for and {names} can't compute {feature}, not even emulated",
            remedy=f"Ask for `precision: {instead}`, or leave precision out.",
        )
    if not allow_emulation:
        raise UnsupportedError(
            f"precision {asked} was asked for and {names} would only emulate {feature}, slower than fp32",
            remedy=f"Ask for `precision: {_automatic(machine, checkpoint).value}`, or take the emulation with "
            f"`precision: {{mode: {asked}, allow_emulation: true}}`.",
        )
    return Decision(
        asked,
        Origin.ASKED,
        f"EMULATED on {names}, which has no {feature}: right numbers, slower than fp32 (allow_emulation)",
        _rejected_for(asked, machine),
    )


def require_fp8(machine: Machine) -> None:
    """Raise UnsupportedError where fp8 layers can't be computed, emulated or not: on unlike devices."""
    choose_precision(Precision.FP8, machine, allow_emulation=True)


def _can_emulate(device: Device, feature: Feature) -> bool:
    """fp8 is emulated by ordinary tensor arithmetic, which every device has (torchao, Float8LinearConfig.emulate)."""
    return feature in device.emulated or feature is Feature.FP8


def _automatic(machine: Machine, checkpoint: CheckpointFacts | None) -> Decision[Precision]:
    if machine.all_compute(Feature.BF16):
        reason = f"{_everyone(machine)} bf16 natively: fp32's exponent range at half the bytes, no loss scaling"
        chosen = Precision.BF16
    elif machine.is_cpu:
        reason = "this CPU has no native bf16 (neither AMX-BF16 nor AVX512-BF16): anything but fp32 would be emulated"
        chosen = Precision.FP32
    elif machine.all_compute(Feature.FP16_TENSOR_CORES):
        without = f"{_names(_lacking(machine, Feature.BF16))} has no native bf16"
        if checkpoint is not None and checkpoint.overflows_in_fp16:
            chosen = Precision.FP32
            reason = f"{without}, and this family of checkpoints overflows fp16 (65504) in the forward pass"
        else:
            chosen = Precision.FP16
            reason = f"{without}; its tensor cores compute fp16, with dynamic loss scaling"
            if checkpoint is not None and checkpoint.dtype == "bf16":
                reason += " (the checkpoint is bf16: watch for overflow; none is known of this family)"
    else:
        lacking = _names(_lacking(machine, Feature.FP16_TENSOR_CORES))
        reason = f"{lacking} has neither native bf16 nor fp16 tensor cores"
        chosen = Precision.FP32
    return Decision(chosen, Origin.AUTO, reason, _rejected_for(chosen, machine, checkpoint))


def _rejected_for(
    chosen: Precision, machine: Machine, checkpoint: CheckpointFacts | None = None
) -> tuple[Rejected, ...]:
    return tuple(
        Rejected(precision.value, _reason_against(precision, chosen, machine, checkpoint))
        for precision in Precision
        if precision is not chosen
    )


def _reason_against(
    precision: Precision, chosen: Precision, machine: Machine, checkpoint: CheckpointFacts | None
) -> str:
    feature = NEEDS[precision]
    lacking = _lacking(machine, feature)
    if lacking:
        emulated = all(feature in device.emulated for device in lacking)
        return f"{_names(lacking)} {'would only emulate' if emulated else 'has no'} {feature}"
    if _lacking(machine, NEEDS[chosen]):
        return "not asked for"  # what was asked for is emulated, and slower than any of these
    if precision is Precision.FP16 and checkpoint is not None and checkpoint.overflows_in_fp16:
        return "this family of checkpoints overflows fp16 in the forward pass, where loss scaling can't help"
    return {
        Precision.FP32: f"slower: {_speed(machine, 'fp32', chosen)}",
        Precision.TF32: "keeps every tensor in 32 bits; on anyway for what stays fp32",
        Precision.FP16: "needs loss scaling, and overflows beyond 65504",
        Precision.BF16: "not asked for",
        Precision.BF16_PURE: "loses small updates without stochastic or Kahan rounding: only when asked",
        Precision.FP8: "pays only for large matrices under torch.compile: only when asked",
        Precision.MXFP8: "only when asked",
    }[precision]


def _speed(machine: Machine, slower: str, chosen: Precision) -> str:
    peaks = machine.devices[0].peak_tflops
    fast = peaks.get("bf16" if chosen is Precision.BF16_PURE else chosen.value)
    if not fast or slower not in peaks:
        return "twice the bytes, and no use of the 16-bit matrix units"
    return f"{peaks[slower]:g} TFLOP/s at peak where {chosen} has {fast:g}"


def _lacking(machine: Machine, feature: Feature) -> tuple[Device, ...]:
    return tuple(device for device in machine.devices if not device.computes(feature))


def _are_unlike(machine: Machine) -> bool:
    return len({(device.compute_capability, device.architecture) for device in machine.devices}) > 1


def _names(devices: tuple[Device, ...]) -> str:
    return ", ".join(sorted({device.name for device in devices}))


def _everyone(machine: Machine) -> str:
    if machine.kind is DeviceKind.CPU:
        return "the CPU computes"
    return f"{_names(machine.devices)} computes" if machine.device_count == 1 else "every device computes"
