"""A recipe resolved for a machine: nothing is automatic any more, and everything has a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.specs import parse_machine
from mpt.planning.engines import check_trainable, without_engine
from mpt.planning.explain import explain_short
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.catalog import find_recipe, list_recipes
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe
from mpt.reporting.plan_table import group_layers, print_plan
from tests.unit.module_lists import LLAMA, llama_modules

KEYS = {
    "precision",
    "attention",
    "distributed.strategy",
    "offload",
    "gradient_checkpointing",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "world_size",
    "optimizer",
}
TINY: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 128}},
    "data": {"source": "builtin:python-reference", "sequence_length": 64},
}  # fmt: skip


def plan_of(machine: str, name: str = "a-plan", **keys: Any) -> Plan:
    recipe = Recipe.model_validate(TINY | keys)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name=name)


def built_in(name: str, machine: str) -> Plan:
    recipe = load_recipe(find_recipe(name))
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name=name)


@pytest.mark.parametrize("machine", ["T4", "8xH100", "2x8xA100-80GB", "cpu"])
@pytest.mark.parametrize("name", [entry.name for entry in list_recipes()])
def test_every_built_in_recipe_is_planned_without_an_auto_and_with_reasons(name: str, machine: str) -> None:
    plan = built_in(name, machine)
    assert set(plan.values) >= KEYS
    for key, decision in plan.values.items():
        assert decision.value != "auto", key
        assert decision.reason, key
        assert decision.origin in ("asked", "derived", "auto")
    batch = plan.value("micro_batch_size") * plan.value("gradient_accumulation_steps") * plan.value("world_size")
    assert batch == plan.value("global_batch_size")
    assert '"auto"' not in json.dumps(plan.deepspeed)


@pytest.mark.parametrize("machine", ["cpu", "4xV100"])
def test_a_plan_read_back_equals_the_plan_written(machine: str) -> None:
    plan = plan_of(machine, distributed={"strategy": "zero2"}, training={"max_steps": 10})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).to_json() == plan.to_json()


def test_a_plan_of_another_version_is_refused() -> None:
    with pytest.raises(MptError, match="version 99"):
        Plan.from_json(plan_of("cpu").to_json() | {"version": 99})


@pytest.mark.parametrize(
    ("machine", "keys", "formats"),
    [
        ("A100-80GB", {}, ("bf16", "bf16", "fp32", "fp32", "fp32")),
        ("A100-80GB", {"precision": "fp32"}, ("fp32", None, "fp32", "fp32", "fp32")),
        ("T4", {}, ("fp16", "fp16", "fp32", "fp32", "fp32")),
        ("8xA100-80GB", {"distributed": {"strategy": "zero2"}}, ("bf16", None, "bf16", "fp32", "fp32")),
        # With the default beta2 of 0.999 a bf16 second moment would never move.
        ("A100-80GB", {"precision": "bf16_pure"}, ("bf16_pure", None, "bf16", "bf16", "fp32")),
        (
            "A100-80GB",
            {"precision": "bf16_pure", "training": {"adam_beta2": 0.95}},
            ("bf16_pure", None, "bf16", "bf16", "bf16"),
        ),
        (
            "8xA100-80GB",
            {"precision": "bf16_pure", "distributed": {"strategy": "zero3"}, "training": {"adam_beta2": 0.95}},
            ("bf16_pure", None, "bf16", "bf16", "bf16"),
        ),
        (
            "A100-80GB",
            {"precision": {"mode": "bf16_pure", "master_weights": "fp32"}, "training": {"adam_beta2": 0.95}},
            ("bf16_pure", None, "bf16", "fp32", "fp32"),
        ),
    ],
)
def test_the_plan_says_which_format_holds_what(machine: str, keys: dict[str, Any], formats: tuple[Any, ...]) -> None:
    plan = plan_of(machine, **keys)
    names = ("precision", "autocast_dtype", "weights_dtype", "master_weights_dtype", "optimizer_state_dtype")
    assert tuple(plan.value(name) for name in names) == formats


def test_a_checkpoint_in_bf16_is_still_trained_with_fp32_master_weights() -> None:
    plan = built_in("llama2-7b-full", "8xH100")
    assert plan.value("master_weights_dtype") == "fp32"


def test_a_training_key_reaches_the_keywords_under_its_own_name() -> None:
    keys = {"learning_rate": 3e-4, "warmup_steps": 0.1, "eval_strategy": "no", "adam_beta2": 0.95, "seed": 7}
    keywords = plan_of("cpu", training=keys).training_arguments
    assert {key: keywords[key] for key in keys} == keys


@pytest.mark.parametrize(
    ("precision", "machine", "flags"),
    [
        ("bf16", "A100-80GB", (True, False)),
        ("fp16", "T4", (False, True)),
        ("fp32", "T4", (False, False)),
        ("tf32", "A100-80GB", (False, False)),
        ("bf16_pure", "A100-80GB", (False, False)),
    ],
)
def test_the_precision_becomes_the_trainers_flags(precision: str, machine: str, flags: tuple[bool, bool]) -> None:
    keywords = plan_of(machine, precision=precision).training_arguments
    assert (keywords["bf16"], keywords["fp16"]) == flags
    assert keywords["logging_nan_inf_filter"] is False


def test_a_loss_scale_for_a_precision_that_has_none_is_refused() -> None:
    with pytest.raises(MptError, match="loss_scale"):
        plan_of("A100-80GB", precision={"loss_scale": {"initial": 1024}})


def test_a_sequence_longer_than_the_models_positions_is_refused() -> None:
    with pytest.raises(MptError, match="128 positions"):
        plan_of("cpu", data={"source": "builtin:python-reference", "sequence_length": 256})


def test_a_default_sequence_length_bows_to_the_models_positions() -> None:
    assert plan_of("cpu", data="builtin:python-reference").value("sequence_length") == 128


def test_what_has_no_engine_yet_is_planned_and_refused_by_training() -> None:
    plan = plan_of("2xH100", distributed={"strategy": "fsdp2"})
    assert without_engine(plan) == ["distributed.strategy: fsdp2"]
    with pytest.raises(MptError, match="not yet"):
        check_trainable(plan)


def test_a_classifier_trains_on_single_rows_and_is_judged_by_accuracy_and_f1() -> None:
    plan = built_in("bert-glue-mrpc", "T4")
    check_trainable(plan)
    assert (plan.value("packing"), plan.value("metrics")) == ("none", ["accuracy", "f1"])


def test_a_plan_that_does_not_fit_is_refused_by_training_with_the_sizes() -> None:
    plan = plan_of("T4", model="meta-llama/Llama-2-70b-hf", offload="none")
    assert not plan.memory.fits
    with pytest.raises(UnsupportedError, match="GiB"):
        check_trainable(plan)


def test_the_short_form_names_the_precision_and_its_reason() -> None:
    lines = dict(explain_short(plan_of("T4")))
    assert lines["precision"].startswith("fp16 (auto)")
    assert "no native bf16" in lines["precision"]


def fp8_plan(machine: str, **precision: Any) -> Plan:
    recipe = Recipe.model_validate(
        TINY | {"precision": {"mode": "fp8", "fp8": {"auto_filter": False}, "allow_emulation": True} | precision}
    )
    modules = llama_modules(LLAMA | TINY["model"]["config"])
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan", modules=modules)


@pytest.mark.parametrize(
    ("machine", "precision", "sentence"),
    [
        ("H100", {}, "12 in fp8, 3 in bf16; fp8 by torchao, tensorwise, compiled"),
        (
            "H100",
            {"fp8": {"backend": "transformer_engine", "recipe": "delayed"}},
            "12 in fp8, 3 in bf16; fp8 by Transformer Engine, delayed",
        ),
        (
            "cpu",
            {"layers": {"lm_head": "fp32"}},
            "12 in fp8, 2 in bf16, 1 in fp32; fp8 is EMULATED: right numbers, slower than bf16",
        ),
        ("A100", {"mode": "bf16", "fp8": None, "layers": {"lm_head": "fp32"}}, "14 in bf16, 1 in fp32"),
    ],
)
def test_the_short_form_counts_the_layers_and_says_how_fp8_is_computed(
    machine: str, precision: dict[str, Any], sentence: str
) -> None:
    assert dict(explain_short(fp8_plan(machine, **precision)))["layers"] == sentence


def test_the_short_form_of_a_plan_without_layers_says_nothing_of_them() -> None:
    assert "layers" not in dict(explain_short(plan_of("A100-80GB")))


def test_the_long_form_gathers_layers_that_differ_in_their_block_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(fp8_plan("cpu", layers={"*.1.mlp.up_proj": "bf16", "model.norm": "fp32"}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    start = lines.index("layers: 11 in fp8, 4 in bf16, 1 in fp32  (asked)")
    rows = [line.split() for line in lines[start + 1 :] if " x  " in line]
    assert sum(int(row[1]) for row in rows) == 16
    assert ["fp8", "2", "x", "model.layers.{0,1}.self_attn.o_proj", "K=64,", "N=64"] in rows
    assert ["bf16", "1", "x", "model.layers.1.mlp.up_proj", "precision.layers:"] in rows
    assert not any('"name"' in line for line in lines)
    assert sum("EMULATED" in line for line in lines) == 2  # of the precision and of fp8


def test_layers_of_two_numbers_are_gathered_by_both() -> None:
    listed = [
        {"name": f"model.layers.{block}.experts.{expert}.up", "precision": "fp8", "reason": "large"}
        for block in range(3)
        for expert in range(8)
        if (block, expert) != (0, 0)
    ]
    assert group_layers(listed) == [
        ("model.layers.0.experts.{1..7}.up", "fp8", "large", 7),
        ("model.layers.{1,2}.experts.{0..7}.up", "fp8", "large", 16),
    ]
    assert group_layers([]) == []


def test_recipes_stay_short(tmp_path: Path) -> None:
    for entry in list_recipes():
        assert len(Path(entry.path).read_text(encoding="utf-8").splitlines()) <= 35, entry.name
