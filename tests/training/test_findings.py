"""What the audit reads from live objects, where a wrong reading would let a wrong run pass."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpt.training.findings import misaligned, multiplied_in


@pytest.mark.parametrize(
    ("source", "weight", "wanted", "found"),
    [
        ("fp8", "fp8", "fp8", "fp8"),
        ("fp32", "fp8", "fp8", "fp32"),
        ("bf16", "fp8", "fp8", "bf16"),
        ("fp8", "bf16", "fp8", "bf16"),
        ("fp32", "bf16", "bf16", "fp32"),
        (None, "bf16", "bf16", None),
        ("bf16", "bf16", "fp16", "bf16"),
    ],
)
def test_a_multiplication_is_as_planned_only_with_both_operands(
    source: str | None, weight: str, wanted: str, found: str | None
) -> None:
    assert multiplied_in({"a": {"input": source, "weight": weight, "output": "fp32"}}, {"a": wanted}) == {"a": found}


@pytest.mark.parametrize(
    ("width", "multiple", "odd"),
    [(64, 8, []), (64, 16, []), (72, 16, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])],
)
def test_gpt2s_transposed_layers_are_measured_too(width: int, multiple: int, odd: list[str]) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=width, n_head=4, n_layer=1, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {name: (rows, columns) for name, rows, columns in misaligned(model, multiple)}
    assert [name.removeprefix("transformer.h.0.") for name in found if name != "lm_head"] == odd
    if odd:
        assert found["transformer.h.0.attn.c_attn"] == (3 * width, width)
