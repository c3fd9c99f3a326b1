"""The choice of the attention kernel."""

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.specs import parse_machine
from mpt.planning.attention import choose_attention
from mpt.terms import Attention, Precision

BOTH = frozenset({"flash_attn", "flash_attn_interface"})


@pytest.mark.parametrize(
    ("machine", "precision", "packages", "chosen"),
    [
        ("H100", "bf16", BOTH, "flash_attention_3"),
        ("H100", "bf16", frozenset({"flash_attn"}), "flash_attention_2"),
        ("H100", "bf16", frozenset(), "sdpa"),
        ("H100", "bf16", None, "sdpa"),
        ("A100-80GB", "bf16", BOTH, "flash_attention_2"),
        ("T4", "fp16", BOTH, "sdpa"),
        ("A100-80GB", "fp32", BOTH, "sdpa"),
        ("4xV100+4xA100", "fp16", BOTH, "sdpa"),
        ("cpu", "bf16", BOTH, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_device_precision_and_installation_allow(
    machine: str, precision: str, packages: frozenset[str] | None, chosen: str
) -> None:
    decision = choose_attention(None, parse_machine(machine), Precision(precision), packages)
    assert decision.value == chosen
    assert all(option.reason and option.value != chosen for option in decision.rejected)


@pytest.mark.parametrize(
    ("asked", "machine", "precision", "packages", "error", "text"),
    [
        ("flash_attention_2", "T4", "fp16", BOTH, UnsupportedError, "no kernel"),
        ("flash_attention_2", "A100-80GB", "fp32", BOTH, MptError, "fp16 or bf16 only"),
        ("flash_attention_2", "A100-80GB", "bf16", frozenset(), UnsupportedError, "not installed"),
        ("flex_attention", "cpu", "bf16", BOTH, UnsupportedError, "backward"),
    ],
)
def test_an_asked_kernel_that_cannot_run_is_an_error_and_never_another_kernel(
    asked: str,
    machine: str,
    precision: str,
    packages: frozenset[str],
    error: type[MptError],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        choose_attention(Attention(asked), parse_machine(machine), Precision(precision), packages)


def test_an_asked_kernel_is_planned_for_a_machine_whose_installation_is_unknown() -> None:
    decision = choose_attention(Attention.FLASH_ATTENTION_2, parse_machine("8xH100"), Precision.BF16, None)
    assert (decision.value, decision.origin) == ("flash_attention_2", "asked")
