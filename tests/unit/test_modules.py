"""The modules of a model by name: what the model itself lists, who is asked for them and when, what a pattern means."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.planning.model_facts import known_models
from mpt.planning.modules import ModuleShape, learn_modules, matches
from mpt.recipe.schema import Recipe
from tests.unit.module_lists import GPT2, LLAMA, gpt2_modules, llama_modules

LISTED = [
    {"name": "lm_head", "kind": "linear", "in_features": 64, "out_features": 320, "parameters": 20480,
     "is_head": True, "tied_to": None}
]  # fmt: skip


def recipe_of(model: Any = None, precision: Any = "fp8", **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": model or {"config": LLAMA}, "data": "text.txt", "precision": precision}
        | {"tokenizer": {"train": "byte_level_bpe", "vocab_size": 320}}
        | keys
    )


class Child:
    """Stands for the process that builds the model: remembers what it was asked, and may fail."""

    def __init__(self, failure: str | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._failure = failure

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        if self._failure:
            raise MptError(self._failure, remedy="none")
        return {"modules": LISTED}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, llama_modules()),
        (LLAMA | {"tie_word_embeddings": True}, llama_modules(LLAMA | {"tie_word_embeddings": True})),
        (GPT2, gpt2_modules()),
    ],
    ids=["llama", "tied", "gpt2"],
)
def test_the_model_itself_lists_its_modules_with_kinds_sizes_head_and_ties(
    config: dict[str, Any], expected: tuple[ModuleShape, ...]
) -> None:
    facts = pytest.importorskip("mpt.training.facts", reason="transformers is not installed")
    listed = facts.list_modules({"config": config, "task": "causal_lm"})
    assert tuple(ModuleShape(**entry) for entry in listed) == expected
    assert json.loads(json.dumps(listed)) == listed


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "mixtral"}, {"mlp.experts": "experts", "mlp.gate": "other"}),
        (
            {"model_type": "llama4_text", "intermediate_size_mlp": 128},
            {"feed_forward.experts": "experts", "feed_forward.router": "linear subclass"},
        ),
    ],
)
def test_fused_experts_and_subclasses_of_linear_layers_are_told_from_linear_layers(
    config: dict[str, Any], kinds: dict[str, str]
) -> None:
    facts = pytest.importorskip("mpt.training.facts", reason="transformers is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    mixture = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 320}
    listed = facts.list_modules({"config": sizes | mixture | config, "task": "causal_lm"})
    found = {entry["name"]: entry["kind"] for entry in listed}
    assert {name: found[f"model.layers.0.{name}"] for name in kinds} == kinds
    assert found["model.layers.0.self_attn.q_proj"] == "linear"


@pytest.mark.parametrize(
    ("precision", "asks"),
    [
        ("auto", False),
        ("bf16", False),
        ("bf16_pure", False),
        ("fp8", True),
        ("mxfp8", True),
        ({"mode": "fp8", "allow_emulation": True}, True),
        ({"layers": {"lm_head": "fp32"}}, True),
        ({"mode": "bf16", "layers": {"*.mlp": "fp8"}}, True),
    ],
    ids=str,
)
def test_the_model_is_built_only_for_a_recipe_that_speaks_of_layers(precision: Any, asks: bool, tmp_path: Path) -> None:
    child = Child()
    found = learn_modules(recipe_of(precision=precision), cache=tmp_path, run_child=child)
    assert found == ((ModuleShape("lm_head", "linear", 64, 320, 20480, is_head=True),) if asks else None)
    assert len(child.requests) == asks


def test_the_answer_is_remembered_for_the_model_and_not_for_another(tmp_path: Path) -> None:
    child = Child()
    for _ in range(2):
        learn_modules(recipe_of(), cache=tmp_path, run_child=child)
        # The patterns are the plan's affair, not the model's.
        learn_modules(recipe_of(precision={"layers": {"lm_head": "fp32"}}), cache=tmp_path, run_child=child)
    assert len(child.requests) == 1
    learn_modules(recipe_of({"config": LLAMA | {"num_hidden_layers": 4}}), cache=tmp_path, run_child=child)
    learn_modules(recipe_of(task="sequence_classification"), cache=tmp_path, run_child=child)
    assert len(child.requests) == 3


def test_a_changed_config_of_a_local_model_is_learnt_anew(tmp_path: Path) -> None:
    child, directory = Child(), tmp_path / "model"
    directory.mkdir()
    for layers in (2, 2, 3):
        directory.joinpath("config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))
        learn_modules(recipe_of(str(directory), tokenizer=None), cache=tmp_path / "facts", run_child=child)
    assert len(child.requests) == 2
    assert child.requests[0]["name_or_path"] == str(directory)


def test_a_model_of_the_table_is_built_from_its_configuration_without_a_network(tmp_path: Path) -> None:
    child = Child()
    learn_modules(recipe_of("gpt2", tokenizer=None), cache=tmp_path, run_child=child)
    (request,) = child.requests
    assert (request["config"], request["name_or_path"]) == (known_models()["gpt2"]["config"], None)


def test_a_model_that_could_not_be_built_is_an_error_with_the_childs_word(tmp_path: Path) -> None:
    for _ in range(2):  # a failure is not remembered
        child = Child("no network")
        with pytest.raises(MptError, match="no network"):
            learn_modules(
                recipe_of("someone/new", tokenizer=None),
                cache=tmp_path,
                run_child=child,
                environ={"HF_HOME": str(tmp_path)},
            )
        assert len(child.requests) == 1


@pytest.mark.parametrize(
    ("name", "pattern", "does"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "lm_*", True),
        ("lm_head", "head", False),
        ("lm_head", "LM_HEAD", False),
        ("model.layers.1.mlp.up_proj", "*.up_proj", True),
        ("model.layers.1.mlp.up_proj", "up_proj", False),
        ("model.layers.1.mlp.up_proj", "*.mlp", True),
        ("model.layers.1.mlp.up_proj", "*.mlp.*", True),
        ("model.layers.1.mlp.up_proj", "model.layers.1", True),
        ("model.layers.11.mlp.up_proj", "model.layers.1", False),
        ("model.layers.11.mlp.up_proj", "model.layers.1*", True),
        ("model.layers.11.mlp.up_proj", "model.layers.1[01]", True),
        ("model.layers.11.mlp.up_proj", "model.layers.?", False),
        ("model.layers.1.mlp.up_proj", "model", True),
        ("model.layers.1.mlp.up_proj", "*", True),
        ("model.layers.1.mlp.up_proj", "", False),
        ("model.norm", "model.norm.", False),
    ],
)
def test_a_pattern_means_a_module_by_its_name_or_by_that_of_what_holds_it(name: str, pattern: str, does: bool) -> None:
    assert matches(name, pattern) is does
