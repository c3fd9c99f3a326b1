"""The modules of small models as the planner learns them, without torch; test_modules.py holds them against the models
themselves."""

from collections.abc import Mapping
from typing import Any

from mpt.planning.modules import ModuleShape

# Sizes that every fp8 kernel takes, mxfp8's too.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 320,
}


def llama_modules(config: Mapping[str, Any] = LLAMA) -> tuple[ModuleShape, ...]:
    """List a Llama's modules in the model's order; `tie_word_embeddings` in the configuration ties its head."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found = [ModuleShape("model.embed_tokens", "embedding", 0, 0, vocab * hidden)]
    for block in range(config["num_hidden_layers"]):
        found += [
            linear(f"model.layers.{block}.{name}", *sizes)
            for name, sizes in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (hidden, key_value),
                "self_attn.v_proj": (hidden, key_value),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (hidden, inner),
                "mlp.up_proj": (hidden, inner),
                "mlp.down_proj": (inner, hidden),
            }.items()
        ]
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [ModuleShape(f"model.layers.{block}.{name}", "other", 0, 0, hidden) for name in norms]
    found.append(ModuleShape("model.norm", "other", 0, 0, hidden))
    tied_to = "model.embed_tokens" if config.get("tie_word_embeddings") else None
    return (*found, ModuleShape("lm_head", "linear", hidden, vocab, hidden * vocab, is_head=True, tied_to=tied_to))


def gpt2_modules(config: Mapping[str, Any] = GPT2) -> tuple[ModuleShape, ...]:
    """List a GPT-2's modules: its blocks hold Conv1D layers, its head the embedding's weight."""
    width, vocab = config["n_embd"], config["vocab_size"]
    found = [
        ModuleShape("transformer.wte", "embedding", 0, 0, vocab * width),
        ModuleShape("transformer.wpe", "embedding", 0, 0, config["n_positions"] * width),
    ]
    for block in range(config["n_layer"]):
        for name, out in {
            "ln_1": 0,
            "attn.c_attn": 3,
            "attn.c_proj": 1,
            "ln_2": 0,
            "mlp.c_fc": 4,
            "mlp.c_proj": -4,
        }.items():
            into, out = (4 * width, width) if out < 0 else (width, out * width)
            whole = f"transformer.h.{block}.{name}"
            found.append(
                ModuleShape(whole, "conv1d", into, out, into * out + out)
                if out
                else ModuleShape(whole, "other", 0, 0, 2 * width)
            )
    found.append(ModuleShape("transformer.ln_f", "other", 0, 0, 2 * width))
    head = ModuleShape("lm_head", "linear", width, vocab, width * vocab, is_head=True, tied_to="transformer.wte")
    return (*found, head)


def linear(name: str, into: int = 64, out: int = 64) -> ModuleShape:
    """Give a linear layer without a bias."""
    return ModuleShape(name, "linear", into, out, into * out)
