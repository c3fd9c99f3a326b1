"""From a model's configuration to its size, for the common families, without torch. Pure.

`shape_of` counts every parameter of the model that transformers would build, exactly; the formulas and the defaults
are held against the installed transformers by `tests/training/test_model_shapes.py`. A family or a variant that is not
known here gives None: then the model itself is asked (`mpt.training.facts`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpt.terms import Task


@dataclass(frozen=True, slots=True)
class Family:
    """What the models of one type have in common.

    `defaults` are those of the type's config class in transformers 5.23, under the names that the formulas read;
    `names` maps such a name to the type's own. `norms` counts the norms of a block.
    """

    defaults: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    gated_mlp: bool = True
    layer_norm: bool = False
    norms: int = 2
    query_bias: bool = False
    query_key_norm: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a model that planning needs; `ModelFacts` says what they mean."""

    parameters: int
    embedding_parameters: int
    tied_embeddings: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    largest_layer_parameters: int
    linear_parameters: int
    gated_mlp: bool
    layer_norm: bool
    activation: str
    query_key_norm: bool
    attention_dropout: bool
    hidden_dropout: bool


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_MISTRAL = _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_GEMMA = _LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_GPT_NEOX = _LLAMA | {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "attention_bias": True,
    "hidden_act": "gelu",
}
_GPT2 = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "intermediate_size": None,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_new",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "attention_dropout": "attn_pdrop",
    "hidden_dropout": "resid_pdrop",
}
_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
_BERT_NAMES = {"attention_dropout": "attention_probs_dropout_prob", "hidden_dropout": "hidden_dropout_prob"}

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_MISTRAL),
    "qwen2": Family(_QWEN, query_bias=True),
    "qwen3": Family(_QWEN | {"head_dim": 128}, query_key_norm=True),
    "gemma": Family(_GEMMA),
    "gemma2": Family(_GEMMA2, names={"hidden_act": "hidden_activation"}, norms=4),
    "phi3": Family(
        _LLAMA | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096}
    ),
    "gpt_neox": Family(_GPT_NEOX, gated_mlp=False, layer_norm=True),
    "gpt2": Family(_GPT2, names=_GPT2_NAMES, gated_mlp=False, layer_norm=True),
    "bert": Family(_BERT, names=_BERT_NAMES, gated_mlp=False, layer_norm=True),
}
# Keys that would add modules or parameters which the formulas do not count.
UNCOUNTED = ("add_cross_attention", "is_encoder_decoder", "num_experts", "num_local_experts", "text_config")


def shape_of(config: Mapping[str, Any], task: Task, vocab_size: int | None = None) -> Shape | None:
    """Size the model that `config` describes, with the head that `task` needs; None where no formula is known.

    `vocab_size` stands in for one that the config leaves out.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or any(config.get(key) for key in UNCOUNTED):
        return None

    def read(name: str) -> Any:
        own = family.names.get(name, name)
        for key in (own, name):
            if config.get(key) is not None:
                return config[key]
        if name == "vocab_size" and vocab_size is not None:
            return vocab_size
        return family.defaults.get(name)

    hidden, heads = int(read("hidden_size")), int(read("num_attention_heads"))
    key_value_heads = int(read("num_key_value_heads") or heads)
    if not read("head_dim") and hidden % heads:
        raise ValueError(f"{heads} attention heads do not divide the hidden size {hidden}")
    if heads % key_value_heads:
        raise ValueError(f"{key_value_heads} key-value heads do not divide {heads} attention heads")
    head_dim = int(read("head_dim") or hidden // heads)
    inner = int(read("intermediate_size") or 4 * hidden)
    layers, vocab = int(read("num_hidden_layers")), int(read("vocab_size"))
    kind, tied = str(config["model_type"]), bool(read("tie_word_embeddings"))
    query, key_value = heads * head_dim, key_value_heads * head_dim
    weights = hidden * (query + 2 * key_value) + query * hidden + (3 if family.gated_mlp else 2) * hidden * inner
    rest = _biases(kind, family, read, query, key_value, hidden, inner)
    rest += family.norms * (2 if family.layer_norm else 1) * hidden + (2 * head_dim if family.query_key_norm else 0)
    block = weights + rest
    embeddings, around = _around_the_blocks(kind, read, task, hidden, vocab, tied, config)
    return Shape(
        parameters=layers * block + embeddings + around,
        embedding_parameters=embeddings,
        tied_embeddings=tied,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        attention_heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=read("max_position_embeddings"),
        largest_layer_parameters=max(block, vocab * hidden),
        linear_parameters=layers * weights,
        gated_mlp=family.gated_mlp,
        layer_norm=family.layer_norm,
        activation=str(read("hidden_act")),
        query_key_norm=family.query_key_norm,
        attention_dropout=bool(read("attention_dropout")),
        hidden_dropout=bool(read("hidden_dropout")),
    )


def _biases(kind: str, family: Family, read: Any, query: int, key_value: int, hidden: int, inner: int) -> int:
    """Biases of a block's linear layers."""
    of_attention = query + 2 * key_value + hidden
    if kind in ("gpt2", "bert"):
        return int(of_attention + inner + hidden)
    if kind == "gpt_neox":
        return int((of_attention if read("attention_bias") else 0) + inner + hidden)
    biases = query + 2 * key_value if family.query_bias else 0
    if kind in ("llama", "qwen3", "gemma", "gemma2") and read("attention_bias"):
        biases += of_attention
    if kind == "llama" and read("mlp_bias"):
        biases += 2 * inner + hidden
    return int(biases)


def _around_the_blocks(
    kind: str, read: Any, task: Task, hidden: int, vocab: int, tied: bool, config: Mapping[str, Any]
) -> tuple[int, int]:
    """Count the embeddings (the output's too, where it is its own), and the norms and heads around the blocks."""
    labels = len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))
    classifies = task is Task.SEQUENCE_CLASSIFICATION
    embeddings = vocab * hidden
    if kind == "bert":
        embeddings += (read("max_position_embeddings") + read("type_vocab_size")) * hidden
        around = 2 * hidden  # the embeddings' norm
        if classifies:
            return embeddings, around + hidden * hidden + hidden + labels * hidden + labels
        transform = hidden * hidden + hidden + 2 * hidden
        return embeddings + (0 if tied else vocab * hidden), around + transform + vocab
    if kind == "gpt2":
        embeddings += read("max_position_embeddings") * hidden
    around = hidden * (2 if FAMILIES[kind].layer_norm else 1)
    if classifies:
        return embeddings, around + labels * hidden
    return embeddings + (0 if tied else vocab * hidden), around
