"""The optimisation checklist: what it says of a recipe on named machines, and that its advice can be taken."""

from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.checklist import POINTS, check_list
from mpt.planning.checklist.point import Case, Point, Status
from mpt.planning.model_facts import known_models, learn_model_facts
from mpt.planning.plan import resolve
from mpt.planning.repair import with_keys
from mpt.recipe.catalog import find_recipe
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe
from mpt.terms import Precision

SEVEN_B: dict[str, Any] = {"model": "meta-llama/Llama-2-7b-hf", "data": {"source": "a.txt", "sequence_length": 2048}}
LORA: dict[str, Any] = SEVEN_B | {"lora": {"rank": 16}}
SMALL: dict[str, Any] = {
    "model": {"config": {"model_type": "gpt2", "n_embd": 768, "n_layer": 4, "n_head": 12, "vocab_size": 50257}},
    "data": {"source": "a.txt", "sequence_length": 1024},
    "tokenizer": {"train": "byte_level_bpe", "vocab_size": 4096},
}
EIGHT_B_ON_TWO_NODES = {"model": "meta-llama/Meta-Llama-3-8B", "data": {"source": "a.txt", "sequence_length": 8192}}


def case_of(machine: str, recipe: dict[str, Any], packages: frozenset[str] | None = None) -> Case:
    read = Recipe.model_validate(recipe)
    plan = resolve(read, parse_machine(machine), learn_model_facts(read), name="a", packages=packages)
    return Case(plan, packages)


def point(code: str, machine: str, recipe: dict[str, Any], packages: frozenset[str] | None = None) -> Point:
    return next(found for found in check_list(case_of(machine, recipe, packages)) if found.code == code)


TICKED, GAIN, NOT_APPLICABLE = Status.TICKED, Status.GAIN, Status.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("code", "machine", "recipe", "status", "advised"),
    [
        ("sixteen_bit", "A100-80GB", SMALL, TICKED, {}),
        ("sixteen_bit", "A100-80GB", SMALL | {"precision": "fp32"}, GAIN, {"precision": "bf16"}),
        ("sixteen_bit", "T4", SMALL | {"precision": "fp32"}, GAIN, {"precision": "fp16"}),
        ("sixteen_bit", "P100", SMALL, NOT_APPLICABLE, {}),
        ("sixteen_bit", "T4", SMALL | {"precision": {"mode": "bf16", "allow_emulation": True}}, GAIN,
         {"precision.mode": "fp16"}),
        ("tf32", "RTX 4090", SMALL, TICKED, {}),
        ("tf32", "RTX 4090", SMALL | {"precision": "fp32"}, GAIN, {"precision": "tf32"}),
        ("tf32", "T4", SMALL, NOT_APPLICABLE, {}),
        ("fp8", "A100-80GB", SEVEN_B, NOT_APPLICABLE, {}),
        ("fp8", "8xH100", SEVEN_B, GAIN, {"precision": "fp8"}),
        ("fp8", "8xB200", SEVEN_B, GAIN, {"precision": "fp8"}),
        ("fp8", "8xMI300X", SEVEN_B, GAIN, {"precision": "fp8"}),
        ("fp8", "H100", LORA, NOT_APPLICABLE, {}),
        ("fp8", "H100", SMALL, NOT_APPLICABLE, {}),  # matrices of 768 x 3072
        ("loss_scale", "T4", SMALL, TICKED, {}),
        ("loss_scale", "T4", SMALL | {"precision": {"mode": "fp16", "loss_scale": {"static": 128}}}, GAIN,
         {"precision": "fp16"}),
        ("loss_scale", "A100-80GB", SMALL, NOT_APPLICABLE, {}),
        ("master_weights", "A100-80GB", SMALL, TICKED, {}),
        ("master_weights", "A100-80GB", SMALL | {"precision": "bf16_pure"}, TICKED, {}),
        ("master_weights", "A100-80GB", SMALL | {"precision": {"mode": "bf16_pure", "rounding": "nearest"}}, GAIN,
         {"precision.rounding": "stochastic"}),
        ("master_weights", "RTX 4090", LORA, TICKED, {}),
        ("batch", "A100-80GB", SMALL | {"global_batch_size": 64, "micro_batch_size": 2}, GAIN,
         {"micro_batch_size": 64}),
        ("batch", "A100-80GB", SMALL | {"micro_batch_size": 2, "gradient_accumulation_steps": 8}, GAIN,
         {"micro_batch_size": 16, "gradient_accumulation_steps": 1}),
        ("batch", "A100-80GB",
         SMALL | {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 96}}, GAIN,
         {"training.per_device_train_batch_size": 64, "training.gradient_accumulation_steps": 3}),
        ("batch", "A100-80GB", SMALL | {"micro_batch_size": 1}, GAIN, {"micro_batch_size": 2}),
        ("batch", "A100-80GB", SMALL | {"global_batch_size": 1}, GAIN, {"global_batch_size": 2}),
        ("batch", "A100-80GB", SMALL | {"global_batch_size": 64}, TICKED, {}),
        ("batch", "cpu", SMALL, NOT_APPLICABLE, {}),
        ("dimensions", "A100-80GB", SMALL, GAIN, {"model.config.vocab_size": 50264}),
        ("dimensions", "A100-80GB", SMALL | {"data": {"source": "a.txt", "sequence_length": 1001}}, GAIN,
         {"model.config.vocab_size": 50264, "data.sequence_length": 1000}),
        ("dimensions", "A100-80GB", SEVEN_B, TICKED, {}),
        ("dimensions", "A100-80GB", SMALL | {"precision": "fp32"}, NOT_APPLICABLE, {}),
        ("dimensions", "A100-80GB", {"model": "gpt2", "data": "a.txt"}, NOT_APPLICABLE, {}),  # a checkpoint of 50257
        ("dimensions", "GTX-1660", SMALL, NOT_APPLICABLE, {}),
        ("attention", "A100-80GB", SEVEN_B, TICKED, {}),
        ("attention", "RTX 4090", SEVEN_B | {"lora": {}, "attention": "eager"}, GAIN, {"attention": "sdpa"}),
        ("attention", "8xH100", EIGHT_B_ON_TWO_NODES, GAIN, {"attention": "flash_attention_3"}),
        ("compile", "RTX 4090", SMALL, GAIN, {"compile": "regional"}),
        ("compile", "RTX 4090", SMALL | {"training": {"torch_compile": True}}, TICKED, {}),
        ("gradient_checkpointing", "RTX 4090", SMALL | {"gradient_checkpointing": True}, GAIN,
         {"gradient_checkpointing": False}),
        ("gradient_checkpointing", "RTX 4090", SMALL | {"training": {"gradient_checkpointing": True}}, GAIN,
         {"training.gradient_checkpointing": False}),
        ("gradient_checkpointing", "RTX 4090", SMALL, TICKED, {}),
        ("gradient_checkpointing", "RTX 4090", LORA | {"micro_batch_size": 4, "gradient_checkpointing": False}, GAIN,
         {"gradient_checkpointing": True}),
        ("fused_optimizer", "RTX 4090", SMALL, TICKED, {}),
        ("fused_optimizer", "RTX 4090", SMALL | {"training": {"optim": "adamw_torch"}}, GAIN,
         {"training.optim": "adamw_torch_fused"}),
        ("fused_optimizer", "RTX 4090", SMALL | {"training": {"optim": "adafactor"}}, NOT_APPLICABLE, {}),
        ("optimizer_states", "RTX 4090", SMALL, TICKED, {}),
        ("optimizer_states", "RTX 4090", LORA, TICKED, {}),
        ("sharding", "RTX 4090", SMALL, NOT_APPLICABLE, {}),
        ("sharding", "8xA100-80GB", SMALL, TICKED, {}),
        ("sharding", "8xA100-80GB", SMALL | {"distributed": {"strategy": "zero3"}}, GAIN,
         {"distributed.strategy": "ddp"}),
        ("sharding", "4xV100", SEVEN_B | {"distributed": {"strategy": "zero3"}}, TICKED, {}),
        ("offload", "A100-80GB", SMALL, TICKED, {}),
        ("offload", "A100-80GB", SMALL | {"distributed": {"strategy": "zero2"}, "offload": "cpu"}, GAIN,
         {"offload": "none"}),
        ("offload", "A100-80GB", SEVEN_B, TICKED, {}),
        ("communication", "RTX 4090", SMALL, NOT_APPLICABLE, {}),
        ("communication", "2x8xH100", SEVEN_B | {"global_batch_size": 16}, GAIN, {"precision.reduce_dtype": "bf16"}),
        ("communication", "8xH100", LORA, TICKED, {}),
        ("loader", "A100-80GB", SMALL, TICKED, {}),
        ("loader", "A100-80GB", SMALL | {"training": {"dataloader_pin_memory": False}}, GAIN,
         {"training.dataloader_pin_memory": True}),
        ("loader", "cpu", SMALL, NOT_APPLICABLE, {}),
        ("evaluation", "cpu", SMALL, GAIN, {"training.eval_strategy": "epoch"}),
        ("evaluation", "cpu", SMALL | {"training": {"max_steps": 500}}, GAIN,
         {"training.eval_strategy": "steps", "training.eval_steps": 50}),
        ("evaluation", "cpu", SMALL | {"training": {"eval_strategy": "epoch"}}, TICKED, {}),
        ("evaluation", "cpu", SMALL | {"data": {"source": "a.txt", "eval_fraction": 0}}, GAIN,
         {"data.eval_fraction": 0.05, "training.eval_strategy": "epoch"}),
        ("saving", "cpu", SMALL | {"training": {"max_steps": 400}}, GAIN, {"training.save_steps": 40}),
        ("saving", "cpu", SMALL | {"training": {"save_strategy": "no"}}, GAIN,
         {"training.save_strategy": "steps", "training.save_steps": 0.1}),
        ("saving", "cpu", SMALL | {"training": {"max_steps": 4000, "save_steps": 2}}, GAIN,
         {"training.save_steps": 400}),
        ("saving", "cpu", SMALL, TICKED, {}),
        ("health", "cpu", SMALL, TICKED, {}),
        ("health", "cpu", SMALL | {"health": {"spikes": False}}, GAIN, {"health.spikes": True}),
    ],
)  # fmt: skip
def test_a_point_is_ticked_not_applicable_or_to_gain_with_the_line_to_write(
    code: str, machine: str, recipe: dict[str, Any], status: Status, advised: dict[str, Any]
) -> None:
    found = point(code, machine, recipe)
    assert (found.status, dict(found.recipe)) == (status, advised), found
    assert found.reason
    assert bool(found.gain) == (status is GAIN)
    if status is GAIN and code != "fp8":  # to plan fp8 takes the model's modules
        again = point(code, machine, with_keys(Recipe.model_validate(recipe), advised).model_dump(exclude_unset=True))
        assert again.status is not GAIN, again


@pytest.mark.parametrize("machine", ["T4", "A100-80GB", "RTX 4090", "8xH100", "B200", "MI300X", "cpu", "P100"])
@pytest.mark.parametrize(
    "recipe", ["quickstart", "gpt2-pretrain", "llama2-7b-qlora", "llama3-8b-zero3", "bert-glue-mrpc"]
)
def test_every_line_that_the_checklist_would_write_can_be_planned_and_ends_its_point(machine: str, recipe: str) -> None:
    read = load_recipe(find_recipe(recipe))
    where, facts = parse_machine(machine), learn_model_facts(read)
    case = Case(resolve(read, where, facts, name="a"))
    for found in check_list(case):
        if found.status is not GAIN or "fp8" in found.recipe.values():  # which wants to know the modules
            continue
        changed = with_keys(read, found.recipe)
        again = check_list(Case(resolve(changed, where, learn_model_facts(changed), name="a")))
        assert next(other for other in again if other.code == found.code).status is not GAIN, found


def test_what_a_change_frees_is_what_planning_it_says() -> None:
    recipe = SMALL | {"micro_batch_size": 32, "gradient_checkpointing": True}
    found = point("gradient_checkpointing", "A100-80GB", recipe)
    with_it = case_of("A100-80GB", recipe).plan.memory.peak_gib
    without = case_of("A100-80GB", recipe | {"gradient_checkpointing": False}).plan.memory.peak_gib
    assert found.memory_gib == pytest.approx(with_it - without)
    assert found.memory_gib is not None and found.memory_gib < 0
    assert found.speed == pytest.approx(4 / 3)  # four passes' worth of multiplications become three


def test_a_speed_up_is_the_ratio_of_the_tables_rates_and_unknown_without_them() -> None:
    found = point("sixteen_bit", "A100-80GB", SMALL | {"precision": "fp32"})
    assert found.speed == pytest.approx(312 / 19.5)
    assert point("sixteen_bit", "RTX-3080", SMALL | {"precision": "fp32"}).speed is None
    fp8 = point("fp8", "8xH100", SEVEN_B).speed
    assert fp8 is not None and 1.5 < fp8 < 2  # the head and attention stay in bf16


def test_eight_bit_states_are_advised_where_they_buy_something_and_say_what() -> None:
    one_b = {"model": "meta-llama/Llama-3.2-1B", "data": {"source": "a.txt", "sequence_length": 2048}}
    found = point("optimizer_states", "T4", one_b | {"gradient_checkpointing": True, "micro_batch_size": 1})
    assert (found.status, dict(found.recipe)) == (GAIN, {"training.optim": "adamw_8bit"})
    assert "offloaded" in found.gain or "fits" in found.gain


def test_the_newest_kernel_is_advised_with_its_install_line_where_it_is_known_to_be_missing() -> None:
    found = point("attention", "8xH100", EIGHT_B_ON_TWO_NODES, frozenset({"torch"}))
    assert "hopper" in found.gain
    having = point("attention", "8xH100", EIGHT_B_ON_TWO_NODES, frozenset({"flash-attn-3"}))
    assert having.status is TICKED


def test_a_plan_that_does_not_fit_is_told_what_would_make_it_fit() -> None:
    found = point("gradient_checkpointing", "RTX 4090", LORA | {"micro_batch_size": 4, "gradient_checkpointing": False})
    assert "does not fit" in found.reason and "it fits then" in found.gain


def test_codes_are_unique_and_every_model_of_the_table_is_gone_through() -> None:
    codes = [code for code, _, _ in POINTS]
    assert len(set(codes)) == len(codes)
    for name in list(known_models())[::9]:
        points = check_list(case_of("RTX 4090", {"model": name, "data": "a.txt", "lora": {}}))
        assert [found.code for found in points] == codes


def test_the_speed_of_fp8_needs_both_rates() -> None:
    from mpt.planning.speed import matmul_seconds

    plan = case_of("H200", SEVEN_B | {"lora": {}}).plan
    assert matmul_seconds(plan) is not None
    half = matmul_seconds(plan, Precision.FP8)
    assert half is not None and half < (matmul_seconds(plan) or 0)
    assert matmul_seconds(case_of("A30", LORA).plan, Precision.FP8) is None
