"""The choice of the precision, for named machines."""

import pytest

from mpt.errors import ExitCode, MptError, UnsupportedError
from mpt.hardware.machine import Device, Machine
from mpt.hardware.specs import parse_machine
from mpt.planning.precision import CheckpointFacts, choose_precision
from mpt.terms import DeviceKind, Feature, Precision


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        ("T4", "fp16"),
        ("4xV100", "fp16"),
        ("RTX 2080 Ti", "fp16"),
        ("A100-80GB", "bf16"),
        ("A10G", "bf16"),
        ("RTX 4090", "bf16"),
        ("L40S", "bf16"),
        ("8xH100", "bf16"),
        ("2x8xA100-80GB", "bf16"),
        ("B200", "bf16"),
        ("RTX 5090", "bf16"),
        ("8xMI300X", "bf16"),
        ("P100", "fp32"),
        ("4xV100+4xA100", "fp16"),
        ("P100+A100", "fp32"),
    ],
)
def test_auto_takes_the_best_format_that_every_device_computes_natively(machine: str, precision: str) -> None:
    decision = choose_precision(None, parse_machine(machine))
    assert decision.value == precision
    assert decision.origin == "auto"
    assert {option.value for option in decision.rejected} == set(Precision) - {precision}
    assert all(option.reason for option in decision.rejected)


def test_a_mixed_node_says_which_card_lowers_the_precision() -> None:
    decision = choose_precision(None, parse_machine("4xV100+4xA100"))
    assert "V100" in decision.reason
    assert "A100" not in decision.reason


@pytest.mark.parametrize(
    ("checkpoint", "precision"),
    [
        (CheckpointFacts("bf16", overflows_in_fp16=True), "fp32"),
        (CheckpointFacts("fp32", overflows_in_fp16=True), "fp32"),
        (CheckpointFacts("bf16", overflows_in_fp16=False), "fp16"),
        (CheckpointFacts(None, overflows_in_fp16=False), "fp16"),
    ],
)
def test_a_card_without_bf16_takes_fp32_for_a_family_that_overflows_fp16(
    checkpoint: CheckpointFacts, precision: str
) -> None:
    decision = choose_precision(None, parse_machine("T4"), checkpoint=checkpoint)
    assert decision.value == precision
    assert ("overflow" in decision.reason) == (checkpoint.dtype is not None)


@pytest.mark.parametrize("machine", ["T4", "V100", "H100", "cpu"])
def test_fp16_with_a_checkpoint_known_to_overflow_is_refused_before_it_is_tried(machine: str) -> None:
    checkpoint = CheckpointFacts("bf16", overflows_in_fp16=True)
    where = parse_machine(machine)
    with pytest.raises(MptError, match="65504") as caught:
        choose_precision(Precision.FP16, where, checkpoint=checkpoint, allow_emulation=True)
    assert caught.value.exit_code == ExitCode.USAGE
    assert f"precision: {choose_precision(None, where, checkpoint=checkpoint).value}" in caught.value.remedy
    assert "layers" in caught.value.remedy
    # Islands may hold what overflows, and another family may not overflow.
    for keys in ({"keeps_mlp_wide": True, "checkpoint": checkpoint}, {"checkpoint": CheckpointFacts("bf16", False)}):
        assert choose_precision(Precision.FP16, where, allow_emulation=True, **keys).value == "fp16"


@pytest.mark.parametrize(
    ("asked", "machine"),
    [
        (Precision.BF16, "T4"),
        (Precision.BF16, "4xV100+4xA100"),
        (Precision.BF16_PURE, "V100"),
        (Precision.TF32, "T4"),
        (Precision.FP8, "A100-80GB"),
        (Precision.FP8, "T4"),
        (Precision.MXFP8, "H100"),
        (Precision.MXFP8, "RTX 5090"),
    ],
)
def test_an_asked_precision_that_a_device_lacks_is_an_error_with_a_remedy(asked: Precision, machine: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        choose_precision(asked, parse_machine(machine))
    assert caught.value.exit_code == ExitCode.UNSUPPORTED
    assert str(asked) in caught.value.problem
    assert "precision" in caught.value.remedy


def test_emulation_is_taken_only_when_it_is_allowed_and_is_said_loudly() -> None:
    decision = choose_precision(Precision.BF16, parse_machine("T4"), allow_emulation=True)
    assert decision.value == "bf16"
    assert "EMULATED" in decision.reason
    # fp32 would be faster than what was asked for.
    assert not any("slower" in option.reason for option in decision.rejected)


@pytest.mark.parametrize(
    ("asked", "machine"),
    [(Precision.FP8, "H100"), (Precision.FP8, "L4"), (Precision.MXFP8, "B200"), (Precision.FP16, "A100-40GB")],
)
def test_an_asked_precision_that_the_device_has_is_taken(asked: Precision, machine: str) -> None:
    decision = choose_precision(asked, parse_machine(machine))
    assert (decision.value, decision.origin) == (asked, "asked")


def test_fp8_on_unlike_cards_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="unlike"):
        choose_precision(Precision.FP8, parse_machine("4xH100+4xL40S"))


@pytest.mark.parametrize(
    ("native", "precision"),
    [((Feature.FP32, Feature.BF16), "bf16"), ((Feature.FP32,), "fp32"), ((Feature.FP32, Feature.FP16), "fp32")],
)
def test_a_cpu_takes_bf16_where_it_is_native_and_fp32_otherwise(native: tuple[Feature, ...], precision: str) -> None:
    cpu = Device(name="CPU", kind=DeviceKind.CPU, generation="x86", memory_gib=16.0, native=native)
    assert choose_precision(None, Machine((cpu,))).value == precision
