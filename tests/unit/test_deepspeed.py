"""DeepSpeed's configuration: every number written out, no "auto", and what DeepSpeed can't do refused."""

import json
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.deepspeed import exact_power_of_two
from mpt.planning.deepspeed_plan import read_offload, resolve_for_deepspeed
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan
from mpt.recipe.schema import OffloadSection, Recipe
from mpt.terms import OffloadDevice
from tests.unit.module_lists import LLAMA, llama_modules

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 2048}
MODEL = {"config": LLAMA | SIZES | {"vocab_size": 4096}}
FP8 = {"mode": "fp8", "fp8": {"auto_filter": False}}  # the layers are too small to gain


def plan_of(machine: str = "8xH100", **keys: Any) -> tuple[Plan, tuple[str, ...]]:
    options = {key: keys.pop(key) for key in ("stage", "offloaded") if key in keys}
    recipe = Recipe.model_validate({"model": MODEL, "data": "text.txt", "global_batch_size": 64} | keys)
    return resolve_for_deepspeed(
        recipe,
        parse_machine(machine),
        learn_model_facts(recipe),
        name="a-plan",
        stage=options.get("stage"),
        offload=options.get("offloaded"),
        modules=llama_modules(MODEL["config"]),
    )


def config_of(machine: str = "8xH100", **keys: Any) -> dict[str, Any]:
    plan, _ = plan_of(machine, **keys)
    assert plan.deepspeed is not None
    return dict(plan.deepspeed)


def every_value(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in every_value(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in every_value(inner)]
    return [value]


@pytest.mark.parametrize("machine", ["T4", "4xV100", "8xH100", "2x8xA100-80GB", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_left_automatic(machine: str, stage: int) -> None:
    config = config_of(machine, stage=stage)
    leaves = every_value(config)
    assert "auto" not in leaves and None not in leaves
    assert config["zero_optimization"]["stage"] == stage
    world = parse_machine(machine).device_count
    assert (
        config["train_batch_size"]
        == 64
        == (config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * world)
    )
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(
    ("machine", "precision", "block"),
    [
        ("T4", "auto", "fp16"),
        ("8xH100", "auto", "bf16"),
        ("8xH100", FP8, "bf16"),
        ("8xB200", "mxfp8", "bf16"),
        ("8xH100", "bf16_pure", "bf16"),
        ("8xH100", {"mode": "bf16", "layers": {"*.mlp": "fp8"}}, "bf16"),
        ("8xH100", {"mode": "bf16", "layers": {"lm_head": "fp32"}}, "torch_autocast"),
        ("8xH100", FP8 | {"layers": {"lm_head": "fp32"}}, "torch_autocast"),
        ("8xH100", "fp32", None),
        ("8xH100", {"mode": "fp32", "layers": {"*.mlp": "bf16"}}, None),
        ("P100", "auto", None),
    ],
    ids=str,
)
def test_the_number_format_has_its_block_and_no_other(machine: str, precision: Any, block: str | None) -> None:
    plan, _ = plan_of(machine, precision=precision)
    assert plan.deepspeed is not None
    found = {"fp16", "bf16", "torch_autocast"} & set(plan.deepspeed)
    assert found == ({block} if block else set())
    assert all(plan.deepspeed[name]["enabled"] is True for name in found)
    # transformers compares its own flags with these blocks, and accelerate turns an engine on by them.
    assert {name for name in ("bf16", "fp16") if plan.training_arguments[name]} == found - {"torch_autocast"}


def test_pure_bf16_has_no_fp32_copies_and_an_optimizer_of_mpts_own() -> None:
    plan, notes = plan_of(precision="bf16_pure", stage=2)
    assert plan.deepspeed is not None
    assert plan.deepspeed["bf16"] == {
        "enabled": True,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
    assert (plan.deepspeed["communication_data_type"], plan.deepspeed["data_types"]["grad_accum_dtype"]) == (
        "bf16",
        "bf16",
    )
    assert "optimizer" not in plan.deepspeed and plan.deepspeed["zero_allow_untested_optimizer"] is True
    assert any("mpt's own optimizer" in note for note in notes)
    assert plan.value("autocast_dtype") is None


def test_an_optimizer_that_pure_bf16_leaves_alone_is_the_trainers() -> None:
    pure = {"mode": "bf16_pure", "rounding": "nearest"}
    plan, notes = plan_of(precision=pure, stage=2, training={"optim": "adafactor"})
    assert plan.deepspeed is not None and "optimizer" not in plan.deepspeed
    assert any("training.optim is adafactor" in note for note in notes)


def test_beside_fp32_islands_gradients_are_summed_and_accumulated_in_fp32() -> None:
    islands = {"mode": "bf16", "layers": {"lm_head": "fp32"}}
    config = config_of(precision=islands, stage=3)
    assert (config["communication_data_type"], config["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})
    for key in ("reduce_dtype", "grad_accum_dtype"):
        with pytest.raises(MptError, match=key):
            config_of(precision=islands | {key: "bf16"}, stage=3)


def test_the_loss_scale_of_the_recipe_reaches_the_fp16_block() -> None:
    scale = {"initial": 1024, "growth_interval": 500, "min": 4, "hysteresis": 3}
    config = config_of("4xV100", precision={"mode": "fp16", "loss_scale": scale})
    assert config["fp16"] == {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": 10,
        "loss_scale_window": 500,
        "hysteresis": 3,
        "min_loss_scale": 4,
    }
    static = config_of("4xV100", precision={"mode": "fp16", "loss_scale": {"static": 128.0}})
    assert static["fp16"] == {"enabled": True, "auto_cast": False, "loss_scale": 128.0}


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"growth_factor": 4.0}, "growth_factor is 4, and DeepSpeed knows only 2"),
        ({"backoff_factor": 0.25}, "backoff_factor is 0.25, and DeepSpeed knows only 0.5"),
        ({"initial": 1000}, "initial is 1000, and DeepSpeed takes a power of two"),
        ({"min": 0.5}, "min is 0.5, and DeepSpeed takes whole numbers"),
    ],
)
def test_a_loss_scale_that_deepspeed_can_not_do_is_refused(scale: dict[str, float], said: str) -> None:
    with pytest.raises(MptError, match=said) as raised:
        config_of("4xV100", precision={"mode": "fp16", "loss_scale": scale}, stage=2)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("power", [0, 1, 15, 16, 32, 40])
def test_powers_of_two_are_exact(power: int) -> None:
    assert exact_power_of_two(2.0**power) == power
    if power > 1:
        with pytest.raises(MptError, match="power of two"):
            exact_power_of_two(2.0**power + 1)


def test_gradients_are_summed_and_accumulated_in_fp32_unless_asked() -> None:
    config = config_of(stage=2)
    assert (config["communication_data_type"], config["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})
    asked = config_of(stage=2, precision={"mode": "bf16", "reduce_dtype": "bf16", "grad_accum_dtype": "bf16"})
    assert (asked["communication_data_type"], asked["data_types"]) == ("bf16", {"grad_accum_dtype": "bf16"})
    with pytest.raises(MptError, match="grad_accum_dtype: fp16 was asked for, and mode bf16 has no loss scale"):
        config_of(stage=2, precision={"mode": "bf16", "grad_accum_dtype": "fp16"})


def test_the_bucket_sizes_are_transformers_formulas() -> None:
    zero = config_of(stage=3)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 256 * 256
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 256 * 256)
    assert zero["stage3_param_persistence_threshold"] == 2560
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert not [key for key in config_of(stage=2)["zero_optimization"] if key.startswith("stage3")]


def test_offload_names_device_path_and_pinning() -> None:
    config = config_of(offloaded=read_offload("optimizer=nvme,parameters=cpu,nvme_path=/fast"))
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["aio"]["block_size"] == 1048576
    assert "aio" not in config_of(offloaded=OffloadDevice.CPU)
    on_cpu = config_of("cpu", offloaded=OffloadDevice.CPU)
    assert on_cpu["zero_optimization"]["offload_optimizer"]["pin_memory"] is False


TRAINING = {"learning_rate": 3e-4, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}


def test_the_optimizer_is_the_one_of_the_training_arguments() -> None:
    config = config_of(stage=2, training=TRAINING)
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"] == {
        "type": "AdamW",
        "params": {
            "lr": 3e-4,
            "betas": [0.9, 0.95],
            "eps": 1e-6,
            "weight_decay": 0.0,
            "torch_adam": True,
            "fused": True,
        },
    }
    assert config_of(stage=2)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("machine", "offload", "by_torch"),
    [("8xH100", "none", True), ("8xH100", "cpu", False), ("cpu", "none", True), ("cpu", "cpu", True)],
)
def test_deepspeed_compiles_an_optimizer_only_for_states_offloaded_from_a_gpu(
    machine: str, offload: str, by_torch: bool
) -> None:
    params = config_of(machine, stage=3, offloaded=OffloadDevice(offload))["optimizer"]["params"]
    assert params.get("torch_adam", False) is params.get("fused", False) is by_torch


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"optim": "adafactor"}, "training.optim is adafactor"),
        ({"optim_args": "foo=1"}, "optim_args"),
    ],
)
def test_an_optimizer_that_deepspeed_would_build_otherwise_is_left_to_the_trainer(
    training: dict[str, Any], said: str
) -> None:
    plan, notes = plan_of(stage=2, training=training)
    assert plan.deepspeed is not None
    assert "optimizer" not in plan.deepspeed
    assert plan.deepspeed["zero_allow_untested_optimizer"] is True
    assert any(said in note for note in notes)


def test_an_optimizer_of_the_trainer_goes_with_offload_on_a_cpu_without_being_compiled() -> None:
    config = config_of(
        "cpu", stage=2, offloaded=OffloadSection(optimizer=OffloadDevice.CPU), training={"optim_args": "foo=1"}
    )
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_weight_decay_stands_in_the_optimizer_section_and_a_note_says_which_parameters_it_is_for() -> None:
    plan, notes = plan_of(stage=2, training={"weight_decay": 0.1})
    assert plan.deepspeed is not None
    assert plan.deepspeed["optimizer"]["params"]["weight_decay"] == 0.1
    assert any("biases and norms" in note for note in notes)


def test_there_is_no_scheduler_section_and_a_note_says_why() -> None:
    plan, notes = plan_of(stage=2, training={"max_steps": 100, "warmup_steps": 10})
    assert plan.deepspeed is not None
    assert "scheduler" not in plan.deepspeed
    assert any("lag one step behind" in note for note in notes)


def test_a_plan_without_zero_gets_stage_2_and_a_note() -> None:
    plan, notes = plan_of("T4")
    assert plan.deepspeed is not None
    assert plan.deepspeed["zero_optimization"]["stage"] == 2
    assert notes[0].startswith("`mpt train` would go by single here")
    asked, _ = plan_of("T4", stage=1)
    assert asked.values["distributed.strategy"].reason == "stage 1 was asked for"


@pytest.mark.parametrize(("stage", "said"), [(0, "trains wrongly"), (4, "no ZeRO stage 4"), (-1, "no ZeRO stage -1")])
def test_stages_that_do_not_train_are_refused(stage: int, said: str) -> None:
    with pytest.raises(MptError, match=said):
        plan_of(stage=stage)


@pytest.mark.parametrize(
    ("text", "optimizer", "parameters"),
    [
        ("optimizer=cpu", "cpu", "none"),
        ("optimizer=cpu,parameters=cpu", "cpu", "cpu"),
        ("parameters=cpu", "none", "cpu"),
    ],
)
def test_an_offload_argument_names_what_goes_where(text: str, optimizer: str, parameters: str) -> None:
    offload = read_offload(text)
    assert isinstance(offload, OffloadSection)
    assert (offload.optimizer.value, offload.parameters.value) == (optimizer, parameters)


@pytest.mark.parametrize("text", ["disk", "", "optimizer=disk", "optimiser=cpu", "optimizer=nvme", "optimizer="])
def test_an_offload_argument_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(MptError, match="--offload") as raised:
        read_offload(text)
    assert raised.value.exit_code == 2
