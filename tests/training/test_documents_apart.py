"""Documents that share a row don't see one another: a model says the same of each as of that document alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from mpt.planning.attention_support import has_attention, keeps_documents_apart
from mpt.training.collation import BinCollator, FlattenedCollator, PaddedCollator
from mpt.training.packing import LENGTHS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "sliding_window": 8,  # shorter than the documents
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
}
DOCUMENTS = [
    torch.arange(3 + 7 * number, 3 + 7 * number + length) % 125 for number, length in enumerate((14, 18, 2, 9))
]


def written_out(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """What Flash Attention computes for documents of varying lengths: by their ends alone, without a mask."""
    assert cu_seq_lens_q is not None and attention_mask is None
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    ends, parts = cu_seq_lens_q.tolist(), []
    for start, end in pairwise(ends):
        one, others, values = (part[:, :, start:end] for part in (query, key, value))
        scores = one @ others.transpose(-1, -2) * (one.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & (behind < (sliding_window or end))
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        parts.append(scores.softmax(-1)[..., : end - start] @ values)
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module", autouse=True)
def _varlen() -> None:
    AttentionInterface.register("varlen_written_out", written_out)
    AttentionMaskInterface.register("varlen_written_out", flash_attention_mask)


def tiny(model_type: str, attention: str) -> Any:
    """A model whose weights are large enough for each token to tell of those before it."""
    known = AutoConfig.for_model(model_type)
    names = {*known.to_dict(), *known.attribute_map}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in SIZES.items() if key in names})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def packed(attention: str) -> dict[str, Any]:
    sample = {"input_ids": torch.cat(DOCUMENTS), LENGTHS: [len(document) for document in DOCUMENTS]}
    return (FlattenedCollator(0) if "varlen" in attention else BinCollator(0, multiple=8, limit=64))([sample])


def difference(model_type: str, attention: str) -> float:
    """The largest difference that sharing a row makes to a logit, over the largest logit."""
    model = tiny(model_type, attention)
    with torch.no_grad():
        together = model(**packed(attention), use_cache=False).logits[0]
        start, found = 0, []
        for document in DOCUMENTS:
            batch = (
                FlattenedCollator(0)([{"input_ids": document}])
                if "varlen" in attention
                else {"input_ids": document[None]}
            )
            alone = model(**batch, use_cache=False).logits[0]
            found.append((together[start : start + len(document)] - alone).abs().max() / alone.abs().max())
            start += len(document)
    return float(max(found))


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


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen_written_out"])
@pytest.mark.parametrize("model_type", APART)
def test_the_logits_of_documents_in_one_row_are_those_of_each_alone(model_type: str, attention: str) -> None:
    if not has_attention(model_type, attention):
        pytest.skip(f"{model_type} has no {attention}")
    assert keeps_documents_apart(model_type, "flash_attention_2" if "varlen" in attention else attention)
    assert difference(model_type, attention) < 1e-5  # sums of other lengths, in fp32: 1e-6 was measured


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("bloom", "eager"), ("opt", "sdpa"), ("falcon", "sdpa"), ("gpt_oss", "eager"), ("mamba", "eager")],
)
def test_types_that_let_documents_see_one_another_stand_in_no_list(model_type: str, attention: str) -> None:
    assert not keeps_documents_apart(model_type, attention)
    assert difference(model_type, attention) > 0.1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("attention", ["eager", "varlen_written_out"])
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
