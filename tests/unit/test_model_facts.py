"""What a model is: by formula, from files, the table, the hub cache, or a child process that is asked once."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.planning.model_facts import (
    ModelFacts,
    facts_from_config,
    find_snapshot,
    known_models,
    learn_model_facts,
    run_facts_child,
    stored_dtype,
)
from mpt.recipe.schema import Recipe
from mpt.terms import Task

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}
# Two tables of 1000 x 64; blocks of 64 x (64 + 32 + 32) + 64 x 64, 3 x 64 x 128 and 2 norms; a norm.
TINY_PARAMETERS = 2 * 64_000 + 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def recipe_of(model: Any, **keys: Any) -> Recipe:
    return Recipe.model_validate({"model": model, "data": "text.txt"} | keys)


def never(request: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError(f"asked the child for {request}")


class Child:
    """Stands for the process: answers with the tiny model, or fails as it does without a network."""

    def __init__(self, failure: str | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._failure = failure

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        if self._failure:
            raise MptError(self._failure, remedy="none")
        facts = facts_from_config(TINY, source="the child")
        assert facts is not None
        return facts.to_json()


def write_model(directory: Path, config: Any = TINY, dtype: str | None = "F16") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text, encoding="utf-8")
    if dtype is not None:
        tensors = {
            "big": {"dtype": dtype, "shape": [8], "data_offsets": [0, 32]},
            "small": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]},
            "__metadata__": {"format": "pt"},
        }
        header = json.dumps(tensors).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(36))
    return directory


@pytest.mark.parametrize("name", sorted(known_models()))
def test_the_formulas_give_the_published_count_of_every_known_model(name: str) -> None:
    entry = known_models()[name]
    # BERT's count is that of the pretrained model with its language-modelling head.
    task = Task.MASKED_LM if entry["config"]["model_type"] == "bert" else Task.CAUSAL_LM
    facts = facts_from_config(entry["config"], task=task)
    assert facts is not None
    assert facts.parameters == entry["parameters"]
    assert entry["dtype"] in ("fp32", "fp16", "bf16")


def test_a_model_from_scratch_is_sized_by_formula() -> None:
    facts = learn_model_facts(
        recipe_of({"config": TINY}, tokenizer={"train": "byte_level_bpe", "vocab_size": 1000}), run_child=never
    )
    assert facts.parameters == TINY_PARAMETERS
    assert facts.largest_layer_parameters == 64_000
    assert facts.linear_parameters == 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128)
    assert (facts.layers, facts.head_dim, facts.key_value_heads, facts.max_positions) == (2, 16, 2, 128)
    assert (facts.checkpoint_dtype, facts.overflows_in_fp16) == (None, False)
    assert ModelFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer", "expected"),
    [
        (None, None, 4096),
        (None, {"train": "byte_level_bpe", "vocab_size": 512}, 512),
        (5000, None, 5000),
        (4096, None, 4096),
    ],
)
def test_the_vocabulary_is_the_tokenizers_where_the_config_leaves_it_out(
    vocab_size: int | None, tokenizer: Any, expected: int
) -> None:
    config = {key: value for key, value in TINY.items() if key != "vocab_size"}
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    facts = learn_model_facts(recipe_of({"config": config}, tokenizer=tokenizer), run_child=never)
    assert facts.vocab_size == expected


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(MptError, match=r"vocab_size is 1000, and the tokenizer has 4096 tokens") as raised:
        learn_model_facts(recipe_of({"config": TINY}))
    assert raised.value.exit_code == 2


def test_an_existing_tokenizer_is_counted_with_its_added_tokens(tmp_path: Path) -> None:
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<end>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    config = {key: value for key, value in TINY.items() if key != "vocab_size"}
    recipe = recipe_of({"config": config}, tokenizer=str(tmp_path))
    assert learn_model_facts(recipe, run_child=never).vocab_size == 8
    with pytest.raises(MptError, match=r"no tokenizer\.json here"):
        learn_model_facts(
            recipe_of({"config": config}, tokenizer="some/hub-tokenizer"), environ={"HF_HOME": str(tmp_path)}
        )


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"vocab_size": [5000]},
        {"hidden_size": -64},
        {"num_hidden_layers": 0},
    ],
)
def test_sizes_that_make_no_model_are_the_users_error(sizes: dict[str, Any]) -> None:
    with pytest.raises(MptError) as raised:
        learn_model_facts(recipe_of({"config": TINY | {"vocab_size": 5000} | sizes}))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("keys", "stored", "expected"),
    [
        ({"dtype": "bfloat16"}, "F16", "bf16"),
        ({"torch_dtype": "float32"}, "F16", "fp32"),
        ({}, "BF16", "bf16"),
        ({}, "F16", "fp16"),
        ({}, "F8_E4M3", None),
        ({}, None, None),
    ],
)
def test_a_directory_tells_its_dtype_from_the_config_or_the_weights(
    tmp_path: Path, keys: dict[str, Any], stored: str | None, expected: str | None
) -> None:
    directory = write_model(tmp_path / "model", TINY | keys, stored)
    facts = learn_model_facts(recipe_of(str(directory)), run_child=never)
    assert (facts.parameters, facts.checkpoint_dtype) == (TINY_PARAMETERS, expected)


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{not json}......", b"\xff" * 8])
def test_a_damaged_weights_file_tells_no_dtype(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    assert stored_dtype(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        ("{broken", "can't be read"),
        ("[]", "names no model_type"),
        ("{}", "no model_type"),
    ],
)
def test_a_directory_that_is_no_model_is_the_users_error(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        write_model(tmp_path, content)
    with pytest.raises(MptError, match=said) as raised:
        learn_model_facts(recipe_of(str(tmp_path)))
    assert raised.value.exit_code == 2
    assert raised.value.remedy


def test_a_missing_directory_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    for path in (str(tmp_path / "not-there"), "./not-there", "../not/there"):
        with pytest.raises(MptError, match="there is no directory"):
            learn_model_facts(recipe_of(path), run_child=never)


@pytest.mark.parametrize(
    ("name", "dtype", "overflows"),
    [
        ("meta-llama/Llama-2-7b-hf", "fp16", False),
        ("Qwen/Qwen2.5-0.5B", "bf16", True),
        ("google/gemma-2b", "bf16", True),
        ("gpt2", "fp32", False),
    ],
)
def test_a_known_hub_model_needs_neither_network_nor_child(
    name: str, dtype: str, overflows: bool, tmp_path: Path
) -> None:
    facts = learn_model_facts(recipe_of(name), run_child=never, environ={"HF_HOME": str(tmp_path)})
    assert facts.parameters == known_models()[name]["parameters"]
    assert (facts.checkpoint_dtype, facts.overflows_in_fp16) == (dtype, overflows)


def hub_model(home: Path, commit: str = "a" * 40, branch: str = "main", **keys: Any) -> None:
    repository = home / "hub" / "models--someone--tiny"
    write_model(repository / "snapshots" / commit, TINY | keys)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit, encoding="utf-8")


def test_the_hub_cache_answers_for_the_revision_that_is_asked(tmp_path: Path) -> None:
    hub_model(tmp_path)
    hub_model(tmp_path, "b" * 40, "wide", hidden_size=128)
    environ = {"HF_HOME": str(tmp_path)}

    def hidden(revision: str | None) -> int:
        model = {"name_or_path": "someone/tiny"} | ({"revision": revision} if revision else {})
        return learn_model_facts(recipe_of(model), run_child=never, environ=environ).hidden_size

    assert (hidden(None), hidden("wide"), hidden("a" * 40)) == (64, 128, 64)
    assert find_snapshot("someone/tiny", "other", environ) is None
    assert find_snapshot("someone/else", None, environ) is None


def test_an_unknown_family_is_asked_of_the_model_once(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", {"model_type": "something_new", "hidden_size": 8})
    child = Child()
    for _ in range(2):
        facts = learn_model_facts(recipe_of(str(directory)), cache=tmp_path / "facts", run_child=child)
        assert facts.source == "the child"
    assert len(child.requests) == 1
    write_model(directory, {"model_type": "something_new", "hidden_size": 16})
    learn_model_facts(recipe_of(str(directory)), cache=tmp_path / "facts", run_child=child)
    assert len(child.requests) == 2


def test_a_damaged_cache_entry_is_learnt_again(tmp_path: Path) -> None:
    child, recipe = Child(), recipe_of({"config": {"model_type": "something_new"}})
    learn_model_facts(recipe, cache=tmp_path, run_child=child)
    (entry,) = tmp_path.iterdir()
    entry.write_text('{"model_type": "cut off', encoding="utf-8")
    learn_model_facts(recipe, cache=tmp_path, run_child=child)
    assert len(child.requests) == 2
    assert ModelFacts.from_json(json.loads(entry.read_text(encoding="utf-8"))).source == "the child"


def test_a_hub_branch_is_not_remembered_and_a_commit_is(tmp_path: Path) -> None:
    child, environ = Child(), {"HF_HOME": str(tmp_path / "hf")}
    for revision, asked in ((None, 2), ("main", 4), ("c" * 40, 5)):
        model = {"name_or_path": "someone/new"} | ({"revision": revision} if revision else {})
        for _ in range(2):
            learn_model_facts(recipe_of(model), cache=tmp_path / "facts", run_child=child, environ=environ)
        assert len(child.requests) == asked


def test_what_can_not_be_learnt_says_so_and_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MptError, match=r"what someone/new is could not be learnt.*no network") as raised:
        learn_model_facts(
            recipe_of("someone/new"), cache=tmp_path, run_child=Child("no network"), environ={"HF_HOME": str(tmp_path)}
        )
    assert "local directory" in raised.value.remedy
    assert raised.value.exit_code == 2


def test_a_cache_that_can_not_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    recipe = recipe_of({"config": {"model_type": "something_new"}})
    assert learn_model_facts(recipe, cache=tmp_path / "file" / "facts", run_child=Child()).source == "the child"


def test_a_child_that_fails_hands_on_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho noise >&2\necho the reason >&2\nexit 2\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(MptError, match=r"^the reason$"):
        run_facts_child({})


def test_learning_imports_no_torch() -> None:
    code = (
        "import sys; from mpt.recipe.schema import Recipe\n"
        "from mpt.planning.model_facts import learn_model_facts as learn\n"
        "learn(Recipe.model_validate({'model': 'gpt2', 'data': 'x'}))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
