"""The linear layers of the common families, by size and without their names: what adapters and quantisation count where
nothing is named. Pure; held against the models themselves by `tests/training/test_model_shapes.py`."""

from mpt.planning.model_facts import ModelFacts

Shape = tuple[int, int]
SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")


def block_linears(facts: ModelFacts) -> tuple[tuple[Shape, ...], bool]:
    """List the (in, out) of a block's linear layers; False: the family is not known here, and the list is what such a
    block usually has."""
    hidden, inner = facts.hidden_size, facts.intermediate_size
    query, key_value = facts.attention_heads * facts.head_dim, facts.key_value_heads * facts.head_dim
    output = (query, hidden)
    if facts.model_type == "phi3":
        return ((hidden, query + 2 * key_value), output, (hidden, 2 * inner), (inner, hidden)), True
    if facts.model_type in ("gpt2", "gpt_neox"):
        return ((hidden, 3 * query), output, (hidden, inner), (inner, hidden)), True
    attention = ((hidden, query), output, (hidden, key_value), (hidden, key_value))
    into = ((hidden, inner),) * (2 if facts.gated_mlp else 1)
    return (*attention, *into, (inner, hidden)), facts.model_type in SEPARATE
