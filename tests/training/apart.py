"""Whether documents in one row see one another: tiny models of any type, and what sharing a row does to their logits.

The tests hold it for some types; `scripts/attention_support.py` asks it of all.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from mpt.training.collation import BinCollator, FlattenedCollator
from mpt.training.packing import LENGTHS

VARLEN = "varlen_written_out"
# By every name that a configuration may have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "vocab_size"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    "head_dim": 16,
    "rotary_dim": 16,
    "qk_head_dim": 32,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 8,  # shorter than the documents
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
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


def register_varlen() -> None:
    """Let transformers know the written-out attention under a name that a model can ask for."""
    AttentionInterface.register(VARLEN, written_out)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)


def tiny(model_type: str, attention: str) -> Any:
    """A model whose weights are large enough for each token to tell of those before it."""
    known = AutoConfig.for_model(model_type)
    names = {*known.to_dict(), *known.attribute_map, "is_decoder"}
    sizes = SIZES | ({"num_key_value_heads": 4} if "kv_lora_rank" in names else {})
    config = AutoConfig.for_model(model_type, **{key: value for key, value in sizes.items() if key in names})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def packed(attention: str) -> dict[str, Any]:
    sample = {"input_ids": torch.cat(DOCUMENTS), LENGTHS: [len(document) for document in DOCUMENTS]}
    return (FlattenedCollator(0) if attention == VARLEN else BinCollator(0, multiple=8, limit=64))([sample])


def difference(model_type: str, attention: str) -> float:
    """The largest difference that sharing a row makes to a logit, over the largest logit."""
    model = tiny(model_type, attention)
    with torch.no_grad():
        together = model(**packed(attention), use_cache=False).logits[0]
        start, found = 0, []
        for document in DOCUMENTS:
            batch = (
                FlattenedCollator(0)([{"input_ids": document}])
                if attention == VARLEN
                else {"input_ids": document[None]}
            )
            alone = model(**batch, use_cache=False).logits[0]
            found.append((together[start : start + len(document)] - alone).abs().max() / alone.abs().max())
            start += len(document)
    return float(max(found))
