"""The formulas for a model's size, held against the models that transformers builds and against its config defaults."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from mpt.planning.linear_shapes import block_linears
from mpt.planning.model_facts import facts_from_config
from mpt.planning.model_shapes import FAMILIES
from mpt.planning.modules import MATMULS
from mpt.terms import Task
from mpt.training.facts import learn_from_model, list_modules

SIZES = {
    "vocab_size": 515,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}
# Keys that change the count, by family, beyond the common sizes.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 20}),
    ("mistral", {"num_key_value_heads": 1}),
    ("mistral", {"num_key_value_heads": 2, "head_dim": 20}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("gpt_neox", {}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 70, "tie_word_embeddings": False}),
    ("bert", {}),
    ("bert", {"type_vocab_size": 5}),
]
GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions"}  # fmt: skip
HEADS = {
    Task.CAUSAL_LM: transformers.AutoModelForCausalLM,
    Task.MASKED_LM: transformers.AutoModelForMaskedLM,
    Task.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
}


def config_of(kind: str, keys: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in SIZES.items() if not (kind == "gpt2" and key == "intermediate_size")}
    renamed = {GPT2.get(key, key) if kind == "gpt2" else key: value for key, value in sizes.items()}
    return {"model_type": kind} | renamed | keys


def count(config: dict[str, Any], task: Task) -> int:
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = HEADS[task].from_config(AutoConfig.for_model(config["model_type"], **keys))
    return sum(parameter.numel() for parameter in model.parameters())


def tasks_of(kind: str) -> list[Task]:
    return [Task.MASKED_LM if kind == "bert" else Task.CAUSAL_LM, Task.SEQUENCE_CLASSIFICATION]


@pytest.mark.parametrize(
    ("kind", "keys", "task"), [(kind, keys, task) for kind, keys in VARIANTS for task in tasks_of(kind)]
)
def test_the_formula_counts_what_transformers_builds(kind: str, keys: dict[str, Any], task: Task) -> None:
    config = config_of(kind, keys)
    facts = facts_from_config(config, task=task)
    assert facts is not None
    assert facts.parameters == count(config, task)


@pytest.mark.parametrize("labels", [{"num_labels": 5}, {"id2label": {"0": "a", "1": "b", "2": "c"}}])
def test_a_classifier_counts_its_labels(labels: dict[str, Any]) -> None:
    config = config_of("bert", {})
    facts = facts_from_config(config | labels, task=Task.SEQUENCE_CLASSIFICATION)
    number = labels.get("num_labels") or len(labels["id2label"])
    assert facts is not None
    assert facts.parameters == count(config | {"num_labels": number}, Task.SEQUENCE_CLASSIFICATION)


@pytest.mark.parametrize(("kind", "keys"), VARIANTS)
def test_the_model_itself_says_the_same(kind: str, keys: dict[str, Any]) -> None:
    task = tasks_of(kind)[0]
    config = config_of(kind, keys)
    by_formula = facts_from_config(config, task=task, is_checkpoint=False)
    assert by_formula is not None
    by_model = learn_from_model({"config": config, "task": task.value})
    expected, found = by_formula.to_json(), by_model.to_json()
    for facts in (expected, found):
        facts.pop("source")
    if kind == "bert":  # its pooled positions and token types are no nn.Embedding of the vocabulary
        expected.pop("embedding_parameters"), found.pop("embedding_parameters")
    assert found == expected


@pytest.mark.parametrize(("kind", "keys"), [(kind, keys) for kind, keys in VARIANTS if kind != "bert"])
def test_a_block_has_the_linear_layers_of_the_formula(kind: str, keys: dict[str, Any]) -> None:
    config = config_of(kind, keys)
    facts = facts_from_config(config)
    assert facts is not None
    shapes, is_known = block_linears(facts)
    assert is_known
    listed = list_modules({"config": config, "task": "causal_lm"})
    linear = [entry for entry in listed if entry["kind"] in MATMULS and not entry["is_head"]]
    assert sorted((one["in_features"], one["out_features"]) for one in linear) == sorted(shapes * facts.layers)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_defaults_are_those_of_the_installed_transformers(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    family = FAMILIES[kind]
    for name, value in family.defaults.items():
        own = family.names.get(name, name)
        if hasattr(config, own):
            assert getattr(config, own) == value, name
        else:
            assert not value, f"{kind} has no {own}: its default must be off"


def test_a_family_without_a_formula_is_learnt_from_the_model() -> None:
    config = {"model_type": "opt", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 64}
    config |= {"word_embed_proj_dim": 32}
    request = {"config": config, "vocab_size": 300, "task": "causal_lm"}
    facts = learn_from_model(request)
    assert (facts.layers, facts.hidden_size, facts.intermediate_size, facts.vocab_size) == (2, 32, 64, 300)
    assert facts.linear_parameters == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert facts.parameters == count(config | {"vocab_size": 300}, Task.CAUSAL_LM)


def test_the_child_answers_on_stdout_and_complains_on_stderr() -> None:
    def ask(request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mpt.training.facts", json.dumps(request)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    answered = ask({"config": config_of("llama", {}), "task": "causal_lm"})
    assert answered.returncode == 0
    assert json.loads(answered.stdout)["layers"] == 3
    refused = ask({"config": {"model_type": "no_such_model"}, "task": "causal_lm"})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "transformers knows no model_type no_such_model" in refused.stderr
