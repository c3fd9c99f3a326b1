"""Which layers get an adapter, how much is trained, and which wishes contradict each other."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.adapters import choose_adapters
from mpt.planning.model_facts import ModelFacts, facts_from_config, learn_model_facts
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import LoraSection, Recipe
from mpt.recipe.schema_errors import validate
from tests.unit.module_lists import GPT2, LLAMA, gpt2_modules, llama_modules

# rank x (in + out) of a block of the small Llama, and its layers' outputs.
ATTENTION = (64 + 64) + 2 * (64 + 32) + (64 + 64)
MLP = 2 * (64 + 128) + (128 + 64)
OUTPUTS = 64 + 32 + 32 + 64 + 128 + 128 + 64
VOCAB = 320 * 64


def facts_of(config: dict[str, Any] = LLAMA) -> ModelFacts:
    facts = facts_from_config(config)
    assert facts is not None
    return facts


def adapters(
    modules: tuple[ModuleShape, ...] | None = None, facts: ModelFacts | None = None, **lora: Any
) -> dict[str, Any]:
    recipe = Recipe.model_validate({"model": "m", "data": "a.txt", "lora": {"rank": 4} | lora})
    decision = choose_adapters(recipe, facts or facts_of(), modules or llama_modules())
    assert decision.reason
    return dict(decision.value or {})


@pytest.mark.parametrize(
    ("lora", "layers", "parameters"),
    [
        ({}, 21, 3 * 4 * (ATTENTION + MLP)),
        ({"dora": True}, 21, 3 * (4 * (ATTENTION + MLP) + OUTPUTS)),
        ({"target_modules": ["q_proj", "v_proj"]}, 6, 3 * 4 * (128 + 96)),
        ({"target_modules": ["self_attn"]}, 12, 3 * 4 * ATTENTION),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, 1, 4 * 192),
        ({"target_modules": ["*.1.mlp.*", "layers.0.*.q_*"]}, 4, 4 * (MLP + 128)),
        ({"target_modules": r".*\.[02]\.mlp\..*"}, 6, 2 * 4 * MLP),
        ({"target_modules": "q_proj"}, 3, 3 * 4 * 128),
        ({"target_modules": ["q_proj", "lm_head"]}, 4, 4 * (3 * 128 + 64 + 320)),
        ({"exclude_modules": ["mlp", "*.k_proj"]}, 9, 3 * 4 * (ATTENTION - 96)),
        ({"exclude_modules": r".*\.mlp\..*"}, 12, 3 * 4 * ATTENTION),
        ({"layers_to_transform": [0, 2]}, 14, 2 * 4 * (ATTENTION + MLP)),
        ({"target_modules": ".*proj", "layers_to_transform": [1]}, 7, 4 * (ATTENTION + MLP)),
        ({"rank_pattern": {"down_proj": 8}}, 21, 3 * 4 * (ATTENTION + MLP + 192)),
        ({"rank_pattern": {r".*\.0\.mlp\..*": 8}}, 21, 4 * (3 * (ATTENTION + MLP) + MLP)),
        ({"modules_to_save": ["lm_head"]}, 21, 3 * 4 * (ATTENTION + MLP) + VOCAB),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 21, 3 * 4 * (ATTENTION + MLP) + 2 * VOCAB),
        ({"modules_to_save": ["down_proj"]}, 18, 3 * (4 * (ATTENTION + MLP - 192) + 64 * 128)),
    ],
)
def test_what_is_trained_is_counted_exactly(lora: dict[str, Any], layers: int, parameters: int) -> None:
    value = adapters(**lora)
    assert (value["layers"], value["trainable_parameters"], value["is_exact"]) == (layers, parameters, True)


def test_all_linear_of_a_common_family_needs_no_names() -> None:
    for config, modules in ((LLAMA, llama_modules()), (GPT2, gpt2_modules())):
        recipe = Recipe.model_validate({"model": "m", "data": "a.txt", "lora": {"rank": 4}})
        assert not recipe.needs_modules
        by_formula = choose_adapters(recipe, facts_of(config), None).value
        assert by_formula == choose_adapters(recipe, facts_of(config), modules).value
        assert by_formula is not None and by_formula["target_modules"] == "all-linear"


def test_names_that_nobody_knows_are_an_estimate_and_said_to_be_one() -> None:
    recipe = Recipe.model_validate({"model": "m", "data": "a.txt", "lora": {"target_modules": ["q_proj"]}})
    assert recipe.needs_modules
    decision = choose_adapters(recipe, facts_of(), None)
    assert decision.value is not None and not decision.value["is_exact"] and decision.value["layers"] is None
    assert "about" in decision.reason


def test_biases_are_counted_where_they_are_those_of_adapted_layers() -> None:
    value = adapters(gpt2_modules(), facts_of(GPT2), target_modules=["c_fc"], bias="lora_only")
    assert (value["trainable_parameters"], value["is_exact"]) == (2 * (4 * (32 + 128) + 128), True)
    assert not adapters(gpt2_modules(), facts_of(GPT2), bias="all")["is_exact"]


def test_tied_weights_are_trained_whole_once_and_stay_tied() -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    for words in (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]):
        value = adapters(llama_modules(tied), facts_of(tied), modules_to_save=words)
        assert (value["modules_to_save"], value["ties_weights"]) == (["embed_tokens"], True)
        assert value["trainable_parameters"] == 3 * 4 * (ATTENTION + MLP) + VOCAB
    with pytest.raises(MptError, match="lm_head is its wte"):
        adapters(gpt2_modules(), facts_of(GPT2), modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    ("lora", "problem", "remedy"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: v_porj means no linear layer", "v_proj"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens means no linear layer", "down_proj, gate_proj"),
        ({"target_modules": "layers.0"}, "", ""),
        ({"target_modules": "no_such"}, "a regular expression for whole names", "q_proj"),
        ({"exclude_modules": ["xyz"]}, "exclude_modules: xyz", "q_proj"),
        ({"exclude_modules": ".*proj"}, "leave no layer", "lm_head"),
        ({"layers_to_transform": [3]}, "no block 3", "3 blocks are counted from 0"),
        ({"modules_to_save": ["head"]}, "modules_to_save: head means no module", "lm_head"),
        ({"rank_pattern": {"c_fc": 2}}, "rank_pattern: c_fc", "down_proj"),
        ({"alpha_pattern": {"c_fc": 2}}, "alpha_pattern: c_fc", "down_proj"),
    ],
)
def test_a_word_that_means_nothing_is_refused_with_those_that_do(
    lora: dict[str, Any], problem: str, remedy: str
) -> None:
    if not problem:
        assert adapters(**lora)["layers"] == 7
        return
    with pytest.raises(MptError) as caught:
        adapters(**lora)
    assert problem in caught.value.problem and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"init": "eva"}, "drawn from activations"),
        ({"init": "loftq"}, "on a GPU alone"),
        ({"init": "zeros"}, "write default, gaussian"),
        ({"init": "orthogonal", "rank": 3}, "even ranks"),
        ({"init": "pissa", "dora": True}, "leave one of them out"),
        ({"init": "olora", "rslora": True, "alpha_pattern": {"q": 1}}, "leave one out"),
        ({"target_modules": "*.q_proj"}, "no regular expression"),
        ({"target_modules": []}, "nothing to train"),
        ({"adapter": "a", "rank": 4, "merge": True}, "adapter brings its own rank"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], words: str) -> None:
    _, flaws = validate({"model": "a", "data": "b.txt", "lora": keys})
    assert any(words in f"{flaw.problem} {flaw.suggestion}" for flaw in flaws), flaws


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"merge": True}, "merged weights"),
        ({"init": "pissa"}, "are quantised"),
        ({"bias": "all"}, "casts to 16 bits"),
        ({"dora": True}, "set bits: 4"),
    ],
)
def test_what_would_change_quantized_weights_is_refused(lora: dict[str, Any], words: str) -> None:
    _, flaws = validate({"model": "a", "data": "b.txt", "lora": lora, "quantization": {"bits": 8}})
    assert any(words in f"{flaw.problem} {flaw.suggestion}" for flaw in flaws), flaws


def test_a_layer_is_not_both_quantized_and_trained_whole() -> None:
    def plan(**quantization: Any) -> Plan:
        recipe = Recipe.model_validate(
            {
                "model": "m",
                "data": {"source": "a.txt", "sequence_length": 64},
                "lora": {"modules_to_save": ["down_proj"]},
                "quantization": quantization,
            }
        )
        return resolve(recipe, parse_machine("A100"), facts_of(), name="a", modules=llama_modules())

    with pytest.raises(MptError, match="down_proj is quantised"):
        plan()
    assert plan(skip_modules=["down_proj"]).value("quantization")["layers"] == 18


def test_the_update_is_scaled_by_two_unless_alpha_is_given() -> None:
    assert LoraSection(rank=64).scaling_alpha / 64 == 2
    assert LoraSection(rank=64, rslora=True).scaling_alpha / 8 == 2
    assert LoraSection(rank=64, alpha=16).scaling_alpha == 16


@pytest.mark.parametrize(
    ("lora", "precision", "problem"),
    [
        ({"init": "pissa"}, "fp32", "no rank has a whole one"),
        ({"merge": True}, "fp32", "merge needs whole weights"),
        ({"modules_to_save": ["lm_head"]}, "bf16", "modules_to_save trains weights"),
        ({"bias": "all"}, "bf16", "lora.bias trains"),
        ({"modules_to_save": ["lm_head"]}, "fp32", ""),
        ({"dora": True}, "bf16", ""),
    ],
)
def test_what_zero3_can_not_do_with_adapters_is_refused(lora: dict[str, Any], precision: str, problem: str) -> None:
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "data": {"source": "a.txt", "sequence_length": 64},
            "lora": lora,
            "precision": precision,
            "distributed": {"strategy": "zero3"},
        }
    )
    if not problem:
        assert resolve(recipe, parse_machine("8xA100"), facts_of(), name="a", modules=llama_modules())
        return
    with pytest.raises(MptError, match=problem):
        resolve(recipe, parse_machine("8xA100"), facts_of(), name="a", modules=llama_modules())


# --- going on from an adapter


def write_adapter(folder: Path, base: str, into: int = 64, layer: str = "model.layers.0.mlp.up_proj") -> Path:
    """Write what peft does: the configuration, and a file with a header and numbers."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base, "modules_to_save": ["lm_head"]}
    folder.joinpath("adapter_config.json").write_text(json.dumps(config))
    shapes = {f"{layer}.lora_A.weight": [4, into], f"{layer}.lora_B.weight": [128, 4], "lm_head.weight": [320, 64]}
    header = {
        f"base_model.model.{name}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    folder.joinpath("adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def continued(model: Path, adapter: Path) -> dict[str, Any]:
    recipe = Recipe.model_validate({"model": str(model), "data": "a.txt", "lora": {"adapter": str(adapter)}})
    facts = ModelFacts.from_json(learn_model_facts(recipe).to_json())
    return dict(choose_adapters(recipe, facts, llama_modules()).value or {})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "small-llama"
    folder.mkdir()
    folder.joinpath("config.json").write_text(json.dumps(LLAMA))
    return folder


def test_an_adapter_on_disk_brings_its_layers_and_its_size(model: Path, tmp_path: Path) -> None:
    value = continued(model, write_adapter(tmp_path / "adapter", "somebody/small-llama"))
    assert (value["layers"], value["trainable_parameters"]) == (1, 4 * (64 + 128) + VOCAB)
    assert value["is_exact"] and value["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"base": "somebody/mistral"}, "was made for somebody/mistral"),
        ({"base": "small-llama", "into": 32}, "up_proj is for 32 x 128, and here it is 64 x 128"),
        ({"base": "small-llama", "layer": "model.layers.9.mlp.up_proj"}, "layers.9.mlp.up_proj, which this model has"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    model: Path, tmp_path: Path, written: dict[str, Any], words: str
) -> None:
    with pytest.raises(MptError, match=words) as caught:
        continued(model, write_adapter(tmp_path / "adapter", **written))
    assert caught.value.exit_code == 2 and caught.value.remedy


def test_what_is_no_adapter_is_refused_with_what_is_missing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MptError, match="is no directory"):
        continued(model, tmp_path / "nowhere")
    with pytest.raises(MptError, match=r"has no adapter_config\.json"):
        continued(model, model)
    adapter = write_adapter(tmp_path / "adapter", "small-llama")
    adapter.joinpath("adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(MptError, match=r"no adapter_model\.safetensors that can be read"):
        continued(model, adapter)
    adapter.joinpath("adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(MptError, match="IA3"):
        continued(model, adapter)
    adapter.joinpath("adapter_config.json").write_text("{")
    with pytest.raises(MptError, match="can't be read"):
        continued(model, adapter)
