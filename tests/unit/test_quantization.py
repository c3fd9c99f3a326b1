"""What is quantised, in what it computes, and where it can't be."""

from typing import Any

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Device, Machine
from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import facts_from_config, known_models, learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.planning.quantization import quantized_parameters
from mpt.recipe.catalog import find_recipe
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe
from mpt.recipe.schema_errors import validate
from mpt.reporting.plan_table import print_plan
from mpt.terms import DeviceKind, Feature
from tests.unit.module_lists import LLAMA, llama_modules

LLAMA_7B = "meta-llama/Llama-2-7b-hf"


MAC = Machine((Device("Apple M2", DeviceKind.MPS, "M2", 32.0, (Feature.FP32, Feature.FP16)),))


def plan_of(machine: str | Machine = "A100-80GB", packages: frozenset[str] | None = None, **keys: Any) -> Plan:
    recipe = Recipe.model_validate(
        {"model": LLAMA_7B, "data": {"source": "a.txt", "sequence_length": 512}, "lora": {}, "quantization": {}} | keys
    )
    where = parse_machine(machine) if isinstance(machine, str) else machine
    return resolve(recipe, where, learn_model_facts(recipe), name="q", packages=packages)


def small_plan(**keys: Any) -> Plan:
    """Plan a small Llama whose modules are known."""
    recipe = Recipe.model_validate(
        {"model": "small", "data": {"source": "a.txt", "sequence_length": 64}, "lora": {}, "quantization": {}} | keys
    )
    facts = facts_from_config(LLAMA)
    assert facts is not None
    return resolve(recipe, parse_machine("A100"), facts, name="q", modules=llama_modules())


@pytest.mark.parametrize(
    ("machine", "precision", "compute"),
    [("RTX 4090", "auto", "bf16"), ("T4", "auto", "fp16"), ("A100", "tf32", "fp32"), ("cpu", "fp32", "fp32")],
)
def test_quantized_layers_multiply_in_the_format_of_the_precision(machine: str, precision: str, compute: str) -> None:
    value = plan_of(machine, precision=precision).value("quantization")
    assert value == {
        "bits": 4,
        "type": "nf4",
        "compute_dtype": compute,
        "double_quantization": True,
        "storage_dtype": "uint8",
        "skipped": None,
        "layers": 7 * 32,
    }


def test_eight_bits_have_a_threshold_and_no_4_bit_keys() -> None:
    plan = plan_of(quantization={"bits": 8})
    assert plan.value("weights_dtype") == "int8"
    assert plan.value("quantization") == {
        "bits": 8,
        "type": "int8",
        "compute_dtype": "bf16",
        "threshold": 6.0,
        "skipped": None,
        "layers": 224,
    }
    assert plan_of().memory.parts_gib["weights"] < plan.memory.parts_gib["weights"]


def test_a_machine_without_kernels_and_an_installation_without_the_package_are_exit_3() -> None:
    with pytest.raises(UnsupportedError, match="no kernels for") as caught:
        plan_of(MAC, precision="fp32")
    assert caught.value.exit_code == 3
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        plan_of("cpu", frozenset({"peft"}))
    assert caught.value.remedy == "pip install 'bitsandbytes>=0.50.2'"
    assert plan_of("cpu", frozenset({"peft", "bitsandbytes"})).value("quantization")["bits"] == 4


def test_what_is_skipped_is_named_whole_with_the_head() -> None:
    plan = small_plan(quantization={"skip_modules": ["down_proj", "model.layers.0"]})
    value = plan.value("quantization")
    assert value["layers"] == 21 - 3 - 6
    assert value["skipped"][-1] == "lm_head" and len(value["skipped"]) == 3 + 6 + 1
    whole = 3 * 64 * 128 + sum(
        module.in_features * module.out_features
        for module in llama_modules()
        if module.name.startswith("model.layers.0.") and not module.name.endswith("down_proj")
    )
    facts, section = plan.facts, plan.recipe.quantization
    assert section is not None
    assert quantized_parameters(facts, section, llama_modules()) == facts.linear_parameters - whole


def test_a_layer_to_skip_that_is_none_is_refused_with_the_near_ones() -> None:
    with pytest.raises(MptError, match="down_porj is no linear layer") as caught:
        small_plan(quantization={"skip_modules": ["down_porj"]})
    assert "down_proj" in caught.value.remedy
    with pytest.raises(MptError) as caught:
        small_plan(quantization={"skip_modules": ["xyz"]})
    assert "down_proj, gate_proj, k_proj" in caught.value.remedy


def test_a_quantized_layer_has_no_format_of_its_own() -> None:
    layers = {"precision": {"mode": "bf16", "layers": {"model.layers.0.mlp.up_proj": "fp32"}}}
    with pytest.raises(MptError, match="up_proj compute in fp32, and it is quantised"):
        small_plan(**layers)
    assert small_plan(**layers, quantization={"skip_modules": ["up_proj"]})
    assert small_plan(precision={"mode": "bf16", "layers": {"lm_head": "fp32"}})


def test_the_7b_recipe_fits_one_24_gb_card_and_a_t4() -> None:
    recipe = load_recipe(find_recipe("llama2-7b-qlora"))
    for card, precision, gib in (("RTX 4090", "bf16", 24), ("T4", "fp16", 15)):
        plan = resolve(recipe, parse_machine(card), learn_model_facts(recipe), name="a")
        assert plan.memory.fits and plan.memory.peak_gib < gib
        assert (plan.value("precision"), plan.value("quantization")["compute_dtype"]) == (precision, precision)
        assert plan.value("adapters")["trainable_parameters"] == 159_907_840
        assert plan.training_arguments["activation_checkpointing_kwargs"] == {"use_reentrant": False}


def test_a_plan_shows_listed_layers_gathered(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(small_plan(lora={"target_modules": ["q_proj"]}, quantization={"skip_modules": ["mlp"]}))
    shown = "".join(capsys.readouterr().out.split())
    assert '"target_modules":["model.layers.{0..2}.self_attn.q_proj"]' in shown
    assert '"skipped":["model.layers.{0..2}.mlp.gate_proj"' in shown


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"bits": 8, "type": "fp4"}, "type is for 4-bit"),
        ({"bits": 8, "double_quantization": True}, "double_quantization is for 4-bit"),
        ({"bits": 4, "int8_threshold": 6}, "for 8-bit weights"),
        ({"bits": 2}, "must be 4, 8"),
    ],
)
def test_keys_of_the_other_width_are_refused(section: dict[str, Any], words: str) -> None:
    values = {"model": "a", "data": "b.txt", "lora": {}, "quantization": section}
    _, flaws = validate(values)
    assert any(words in f"{flaw.problem} {flaw.suggestion}" for flaw in flaws), flaws


def test_the_table_of_known_models_has_families_whose_layers_are_counted() -> None:
    counted = {name: plan_of(model=name).value("quantization")["layers"] for name in known_models() if "lama" in name}
    assert counted[LLAMA_7B] == 224 and None not in counted.values()
