"""The choice of the attention kernel."""

from dataclasses import replace

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.packages import numbers
from mpt.hardware.specs import parse_machine
from mpt.planning.attention import KERNEL, PACKAGES, choose_attention
from mpt.planning.attention_support import has_attention, is_flash
from mpt.planning.model_facts import ModelFacts, facts_from_config
from mpt.terms import Attention, Feature, Precision

BOTH = frozenset({"flash-attn", "flash-attn-3"})
ALL = BOTH | {"flash-attn-4", "kernels"}


def facts(model_type: str = "llama", **changes: object) -> ModelFacts:
    config = {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 1000}
    known = facts_from_config({"model_type": "llama", "intermediate_size": 4096, **config})
    assert known is not None
    return replace(known, model_type=model_type, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "precision", "packages", "chosen"),
    [
        ("H100", "bf16", BOTH, "flash_attention_3"),
        ("H100", "bf16", frozenset({"flash-attn"}), "flash_attention_2"),
        ("H100", "bf16", frozenset({"flash-attn-4"}), "sdpa"),
        ("H100", "bf16", frozenset(), "sdpa"),
        ("H100", "bf16", None, "sdpa"),
        ("H100:3g.40gb", "bf16", BOTH, "flash_attention_3"),
        ("A100-80GB", "bf16", BOTH, "flash_attention_2"),
        ("RTX4090", "bf16", BOTH, "flash_attention_2"),
        ("L40S", "bf16", BOTH, "flash_attention_2"),
        ("B200", "bf16", ALL, "flash_attention_2"),
        ("MI300X", "bf16", BOTH, "flash_attention_2"),
        ("V100", "fp16", BOTH, "sdpa"),
        ("T4", "fp16", BOTH, "sdpa"),
        ("A100-80GB", "fp32", BOTH, "sdpa"),
        ("4xV100+4xA100", "fp16", BOTH, "sdpa"),
        ("cpu", "bf16", BOTH, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_device_precision_and_installation_allow(
    machine: str, precision: str, packages: frozenset[str] | None, chosen: str
) -> None:
    decision = choose_attention(None, parse_machine(machine), Precision(precision), packages, facts())
    assert decision.value == chosen
    assert all(option.reason and option.value != chosen for option in decision.rejected)


@pytest.mark.parametrize(
    ("model", "machine", "chosen", "against", "reason"),
    [
        (facts(head_dim=256), "H100", "flash_attention_3", "flash_attention_4", "at most 128"),
        (facts(head_dim=512), "A100-80GB", "sdpa", "flash_attention_2", "at most 256"),
        (facts("gpt2", attention_dropout=True), "H100", "flash_attention_2", "flash_attention_3", "no dropout"),
        (facts("gemma2"), "A100-80GB", "flash_attention_2", "sdpa", "no such implementation"),
        (facts("gemma2"), "T4", "eager", "sdpa", "no such implementation"),
        (facts("llama4_text"), "A100-80GB", "sdpa", "flash_attention_2", "no such implementation"),
        (facts("somebodys_own"), "A100-80GB", "flash_attention_2", "sdpa", "second choice"),
    ],
)
def test_auto_minds_the_models_heads_dropout_and_implementations(
    model: ModelFacts, machine: str, chosen: str, against: str, reason: str
) -> None:
    decision = choose_attention(None, parse_machine(machine), Precision.FP16, BOTH, model)
    assert decision.value == chosen
    assert reason in next(option.reason for option in decision.rejected if option.value == against)


def test_documents_that_share_a_sample_take_sdpa_off_its_flash_kernel_and_the_reason_says_so() -> None:
    where, packages = parse_machine("A100-80GB"), frozenset[str]()
    for is_packed, text in ((True, "need a mask"), (False, "Flash Attention 2 is built into it")):
        decision = choose_attention(None, where, Precision.BF16, packages, facts(), is_packed=is_packed)
        assert decision.value == "sdpa" and text in decision.reason
    kernel = choose_attention(None, where, Precision.BF16, BOTH, facts(), is_packed=True)
    assert kernel.value == "flash_attention_2" and "without a mask" in kernel.reason


@pytest.mark.parametrize(
    ("asked", "machine", "precision", "packages", "error", "text"),
    [
        ("flash_attention_2", "T4", "fp16", BOTH, UnsupportedError, "no kernel"),
        ("flash_attention_3", "A100-80GB", "bf16", ALL, UnsupportedError, "no kernel"),
        ("flash_attention_4", "A100-80GB", "bf16", ALL, UnsupportedError, "no kernel"),
        ("flash_attention_2", "A100-80GB", "fp32", BOTH, MptError, "fp16 or bf16 only"),
        ("flash_attention_2", "A100-80GB", "bf16", frozenset(), UnsupportedError, "flash-attn is not installed"),
        ("flash_attention_4", "B200", "bf16", BOTH, UnsupportedError, "flash-attn-4 is not installed"),
        ("flex_attention", "cpu", "bf16", BOTH, UnsupportedError, "backward"),
        ("kernels-community/flash-attn2", "A100-80GB", "bf16", BOTH, UnsupportedError, "kernels is not installed"),
        ("kernels-community/flash-attn2", "cpu", "bf16", ALL, UnsupportedError, "no kernel"),
        ("kernels-community/flash-attn2", "T4", "fp16", ALL, UnsupportedError, "no kernel"),
        ("kernels-community/flash-attn3", "A100-80GB", "bf16", ALL, UnsupportedError, "no kernel"),
        ("kernels-community/aiter-flash-attn", "H100", "bf16", ALL, UnsupportedError, "no kernel"),
        ("kernels-community/flash-attn2", "A100-80GB", "fp32", ALL, MptError, "fp16 or bf16 only"),
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
    with pytest.raises(error, match=text) as caught:
        choose_attention(Attention(asked), parse_machine(machine), Precision(precision), packages, facts())
    if "not installed" in text:
        assert PACKAGES[Attention(asked)][1] in caught.value.remedy
    else:
        assert "sdpa" in caught.value.remedy


@pytest.mark.parametrize(
    ("asked", "model", "text", "remedy"),
    [
        ("flash_attention_4", facts(head_dim=256), "at most 128 numbers; the model's have 256", "sdpa"),
        ("kernels-community/flash-attn4", facts(head_dim=256), "at most 128", "sdpa"),
        ("flash_attention_3", facts("gpt2", attention_dropout=True), "no dropout", "sdpa"),
        ("flex_attention", facts("gemma3_text", attention_dropout=True), "no dropout", "sdpa"),
        ("flex_attention", facts("gpt2"), "gpt2 has no such implementation", "sdpa"),
        ("sdpa", facts("gemma2"), "gemma2 has no such implementation", "eager"),
    ],
)
def test_an_asked_kernel_that_the_model_cannot_use_is_an_error(
    asked: str, model: ModelFacts, text: str, remedy: str
) -> None:
    with pytest.raises(MptError, match=text) as caught:
        choose_attention(Attention(asked), parse_machine("H100"), Precision.BF16, ALL, model)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("asked", "machine"),
    [
        ("kernels-community/flash-attn2", "RTX4090"),
        ("kernels-community/flash-attn3", "H100"),
        ("kernels-community/vllm-flash-attn3", "A100-80GB"),
        ("kernels-community/flash-attn4", "B200"),
        ("kernels-community/aiter-flash-attn", "MI300X"),
        ("flash_attention_4", "B200"),
        ("flex_attention", "T4"),
        ("eager", "cpu"),
    ],
)
def test_an_asked_kernel_that_device_and_installation_have_is_taken(asked: str, machine: str) -> None:
    decision = choose_attention(Attention(asked), parse_machine(machine), Precision.FP16, ALL, facts())
    assert (decision.value, decision.origin) == (asked, "asked")


def test_an_asked_kernel_is_planned_for_a_machine_whose_installation_is_unknown() -> None:
    decision = choose_attention(Attention.FLASH_ATTENTION_2, parse_machine("8xH100"), Precision.BF16, None)
    assert (decision.value, decision.origin) == ("flash_attention_2", "asked")


def test_every_kernel_of_flash_attention_has_its_package_and_feature() -> None:
    flash = {attention for attention in Attention if is_flash(attention)}
    assert flash == set(KERNEL) == set(PACKAGES)


def test_a_model_type_that_nobody_knows_is_taken_at_its_word() -> None:
    assert all(has_attention("somebodys_own", attention) for attention in Attention)


@pytest.mark.parametrize(
    ("text", "is_of_use"), [("0.18.1", False), ("0.18.2", True), ("0.18.3.dev0", True), ("0.19.0", False), ("", False)]
)
def test_a_version_is_read_as_numbers(text: str, is_of_use: bool) -> None:
    assert ((0, 18, 2) <= numbers(text) < (0, 19)) == is_of_use


@pytest.mark.parametrize(
    ("machine", "precision", "tokens", "model", "is_packed", "chosen"),
    [
        ("cpu", "bf16", 512, facts(), False, "eager"),
        ("cpu", "bf16_pure", 64, facts("gpt2"), False, "eager"),
        ("cpu", "bf16", 513, facts(), False, "sdpa"),
        ("cpu", "bf16", None, facts(), False, "sdpa"),
        ("cpu", "fp32", 64, facts(), False, "sdpa"),
        ("cpu", "bf16", 64, facts(), True, "sdpa"),
        ("cpu", "bf16", 64, facts("mixtral"), False, "sdpa"),
        ("cpu", "bf16", 64, facts(attention_dropout=True), False, "sdpa"),
        ("A100-80GB", "bf16", 64, facts(), False, "sdpa"),
    ],
)
def test_few_tokens_in_bf16_attend_eagerly_on_a_cpu(
    machine: str, precision: str, tokens: int | None, model: ModelFacts, is_packed: bool, chosen: str
) -> None:
    """The table is of CPUs that compute bf16; where it is emulated, torch's kernel stays."""
    where = parse_machine(machine)
    if where.is_cpu and not where.all_compute(Feature.BF16):
        chosen = "sdpa"
    decision = choose_attention(
        None, where, Precision(precision), frozenset(), model, is_packed=is_packed, sequence_length=tokens
    )
    assert decision.value == chosen
