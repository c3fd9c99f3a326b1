"""Documents that share a row don't see one another: a model says the same of each as of that document alone."""

import pytest
import torch

from mpt.planning.attention_support import has_attention, keeps_documents_apart
from mpt.training.collation import PaddedCollator
from tests.training.apart import DOCUMENTS, VARLEN, difference, packed, register_varlen, tiny


@pytest.fixture(scope="module", autouse=True)
def _varlen() -> None:
    register_varlen()


APART = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "mixtral",
]


@pytest.mark.parametrize("attention", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("model_type", APART)
def test_the_logits_of_documents_in_one_row_are_those_of_each_alone(model_type: str, attention: str) -> None:
    if not has_attention(model_type, attention):
        pytest.skip(f"{model_type} has no {attention}")
    assert keeps_documents_apart(model_type, "flash_attention_2" if attention == VARLEN else attention)
    assert difference(model_type, attention) < 1e-5  # sums of other lengths, in fp32: 1e-6 was measured


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("bloom", "eager"), ("opt", "sdpa"), ("falcon", "sdpa"), ("gpt_oss", "eager"), ("mamba", "eager")],
)
def test_types_that_let_documents_see_one_another_stand_in_no_list(model_type: str, attention: str) -> None:
    assert not keeps_documents_apart(model_type, attention)
    assert difference(model_type, attention) > 0.1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("attention", ["eager", VARLEN])
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(model_type: str, attention: str) -> None:
    model = tiny(model_type, "eager").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    padded = PaddedCollator(0)([{"input_ids": document} for document in DOCUMENTS])
    expected = model(**padded).loss
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(attention)
    loss = model(**packed(attention), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-5)
