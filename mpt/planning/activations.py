"""THE activation formulas: what a forward pass keeps for the backward pass, and what the loss needs. Pure.

The method of Korthikanti et al. 2022 (arXiv:2205.05198), section 4: count the tensors that each operation saves.
Counted here on the modules of transformers 5.23, and held against torch's own accounting of real training steps by
`tests/training/test_memory_against_torch.py`.
"""

from mpt.planning.loss import chunk_tokens
from mpt.planning.workload import BYTES, Workload
from mpt.terms import Attention, Method, Strategy, Task


def autocast_cache_bytes(work: Workload) -> float:
    """16-bit copies of fp32 weights, kept by autocast for a forward pass (ATen/autocast_mode.cpp, cached_cast)."""
    if work.autocast_dtype is None or work.weights_dtype != "fp32":
        return 0.0
    if work.strategy is Strategy.FSDP2:
        return 0.0  # its mixed-precision policy gathers the 16-bit weights themselves
    head = 0 if work.task is Task.SEQUENCE_CLASSIFICATION else work.facts.vocab_size * work.facts.hidden_size
    return BYTES[work.autocast_dtype] * (work.facts.linear_parameters + head)


def activation_bytes(work: Workload) -> tuple[float, float]:
    """Bytes kept from forward to backward, and bytes that checkpointing computes anew, one block at a time."""
    block = work.tokens * block_bytes_per_token(work)
    residual = work.tokens * work.facts.hidden_size * (4 if work.residual_is_fp32 else 2)
    if work.gradient_checkpointing:
        return work.facts.layers * residual + residual, block
    return work.facts.layers * block + residual, 0.0


def block_bytes_per_token(work: Workload) -> float:
    """Bytes a token that one block saves for its backward pass.

    Counted on transformers' modules: a norm saves its input, its normed value and its output; under autocast every
    linear layer saves a 16-bit copy of its input of its own, for only weights are cached; attention saves q, k, v, its
    output and, unless it is fused, the scores of every head.
    """
    facts = work.facts
    compute = 2 if work.computes_in_half else 4
    hidden, inner = facts.hidden_size, facts.intermediate_size
    query, key_value = work.query_width, work.key_value_width
    inputs = (3 if facts.gated_mlp or not facts.layer_norm else 1) + (2 if facts.gated_mlp else 1)
    saved: float
    if work.method is not Method.FULL:
        saved = _frozen_block_bytes(work)
    elif work.autocast_dtype is not None and work.residual_is_fp32:
        saved = 2 * (4 if facts.layer_norm else 8) * hidden + inputs * 2 * hidden
    elif work.computes_in_half:
        saved = 2 * (4 if facts.layer_norm else 8) * hidden
    else:
        saved = 2 * (8 if facts.layer_norm else 12) * hidden
    if facts.query_key_norm:
        saved += (6 if work.computes_in_half else 8) * (query + key_value)
    if facts.hidden_dropout:
        saved += 2 * hidden * (4 if work.on_cpu else 1)  # masks: bytes on a GPU, numbers on a CPU
    saved += compute * (2 * query + 2 * key_value) + _score_bytes(work)
    feed_forward = _feed_forward_tensors(work)
    if work.method is not Method.FULL and work.autocast_dtype is not None:
        feed_forward -= 1  # what the last layer reads: its adapter's 16-bit copy is counted
    if work.method is Method.QLORA and work.residual_is_fp32:
        compute = 4  # a 4-bit layer hands on the format that it was given
    return saved + feed_forward * compute * inner


def _frozen_block_bytes(work: Workload) -> float:
    """What norms and linear layers save whose weights are frozen: no input for a weight's gradient.

    A norm saves its input in fp32. An adapter saves its own input: without autocast it is the norm's output, one tensor
    for all that read it; under autocast peft casts it to the adapter's fp32 and autocast back, a 16-bit copy for each.
    DoRA saves the two results that its sizes multiply (peft 0.21, tuners/lora/layer.py and dora.py).
    """
    compute, hidden = 2 if work.computes_in_half else 4, work.facts.hidden_size
    saved: float = 2 * (compute if work.facts.layer_norm else 4) * hidden
    if work.autocast_dtype is not None:
        saved += compute * work.adapter_inputs / work.facts.layers
    else:
        saved += 2 * compute * hidden
    return saved + (2 * compute * work.adapter_outputs / work.facts.layers if work.has_dora else 0)


def _feed_forward_tensors(work: Workload) -> float:
    """Tensors of the inner width that a feed-forward saves."""
    if work.facts.gated_mlp:
        return 4  # gate, its activation, up, and their product
    if work.facts.activation == "gelu_new":
        # NewGELUActivation is made of single operations; pow, and what follows it, is fp32 under CUDA's autocast.
        return 8 if work.autocast_dtype is not None and not work.on_cpu else 5
    return 2


def _score_bytes(work: Workload) -> float:
    """Bytes a token of saved attention scores: none with a fused kernel; with dropout a CPU has no fused one."""
    scores = work.facts.attention_heads * work.sequence_length
    if work.attention is Attention.EAGER:
        # The softmax in fp32, and its cast; with dropout the mask and the dropped scores too.
        return scores * (4 + (2 if work.computes_in_half else 0) + (8 if work.facts.attention_dropout else 0))
    return scores * 12 if work.on_cpu and work.facts.attention_dropout else 0


def passing_bytes(work: Workload) -> float:
    """Gradients of activations on their way through one block: those of its widest tensors, two or three at once."""
    compute = 2 if work.computes_in_half else 4
    of_feed_forward = (3 if work.facts.gated_mlp else 2) * compute * work.facts.intermediate_size
    scores = 8 * work.facts.attention_heads * work.sequence_length if _score_bytes(work) else 0
    return work.tokens * max(of_feed_forward, scores) + _dora_bytes(work)


def _dora_bytes(work: Workload) -> float:
    """What DoRA makes of a layer's weight to know its norm: an identity, the update, and their sum with the weight."""
    if not work.has_dora:
        return 0.0
    into, out = work.facts.intermediate_size, work.facts.hidden_size
    return 4 * (into * into + 3 * into * out)


def logits_bytes(work: Workload) -> float:
    """Logits on their way into the loss and their gradients on the way out.

    The loss is taken in fp32 (transformers/loss/loss_utils.py, ForCausalLMLoss): at the turn a token holds the
    log-softmax and two gradients of the width of the vocabulary. In chunks (mpt/training/precision/chunked_loss.py) as
    many stand for one chunk, and the gradients of all hidden states and of a trained head in fp32, with one chunk's
    share of it; as in Liger's kernel, whose chunks are smaller.
    """
    if work.task is Task.SEQUENCE_CLASSIFICATION:
        return 0.0
    facts = work.facts
    if work.loss == "full":
        return work.tokens * facts.vocab_size * 12
    at_once = min(work.tokens, chunk_tokens(facts.vocab_size, on_cpu=work.on_cpu))
    head = facts.vocab_size * facts.hidden_size * (8 if work.method is Method.FULL else 0)
    hidden = work.tokens * facts.hidden_size * (2 if work.computes_in_half else 4)
    return at_once * facts.vocab_size * 12 + hidden + head
