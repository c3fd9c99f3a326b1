"""The written configurations, held against the installed DeepSpeed and transformers: no warning, no mismatch."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.runtime.config
import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from mpt.hardware.specs import parse_machine
from mpt.planning.deepspeed_plan import read_offload, resolve_for_deepspeed
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan
from mpt.recipe.catalog import find_recipe, list_recipes
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe

GOLDEN = Path(__file__).parents[2] / "configs" / "deepspeed"
MACHINES = ("1xT4", "4xV100", "8xA100-80GB", "8xH100", "2x8xH100")
TINY: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}},
    "data": "text.txt",
    "global_batch_size": 64,
}
LOSS_SCALE = {"mode": "fp16", "loss_scale": {"initial": 4096, "growth_interval": 100, "min": 2, "hysteresis": 4}}
VARIANTS: list[tuple[str, dict[str, Any], int | None, str | None]] = [
    ("8xH100", {}, 1, None),
    ("8xH100", {}, 3, "cpu"),
    ("8xH100", {}, 2, "optimizer=cpu"),
    ("8xH100", {}, 3, "optimizer=nvme,parameters=nvme,nvme_path=/fast"),
    ("4xV100", {"precision": LOSS_SCALE}, 3, None),
    ("4xV100", {"precision": {"mode": "fp16", "loss_scale": {"static": 128.0}}}, 2, None),
    ("8xH100", {"precision": {"mode": "bf16", "reduce_dtype": "bf16", "grad_accum_dtype": "bf16"}}, 2, None),
    ("8xH100", {"precision": "fp32"}, 3, None),
    ("8xH100", {"training": {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6}}, 3, "cpu"),
    ("8xH100", {"training": {"learning_rate": 3e-4, "max_grad_norm": 0.3, "warmup_steps": 0.1}}, 2, None),
    ("8xH100", {"training": {"optim": "adafactor"}}, 2, None),
    ("cpu", {}, 3, "cpu"),
    ("2xcpu", {}, 2, None),
]


def built_in(name: str, machine: str) -> Plan:
    recipe = load_recipe(find_recipe(name))
    return resolve_for_deepspeed(recipe, parse_machine(machine), learn_model_facts(recipe), name=name)[0]


def variant(machine: str, keys: dict[str, Any], stage: int | None, offload: str | None) -> Plan:
    recipe = Recipe.model_validate(TINY | keys)
    return resolve_for_deepspeed(
        recipe,
        parse_machine(machine),
        learn_model_facts(recipe),
        name="variant",
        stage=stage,
        offload=None if offload is None else read_offload(offload),
    )[0]


@pytest.fixture
def deepspeed_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """DeepSpeed's logger hands nothing on, so listen to it itself."""
    from deepspeed.utils import logger

    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def check_deepspeed(config: dict[str, Any], world: int, log: pytest.LogCaptureFixture) -> None:
    distributed = deepspeed.runtime.config.dist
    with (
        mock.patch.object(distributed, "get_rank", lambda *_, **__: 0),
        mock.patch.object(distributed, "get_world_size", lambda *_, **__: world),
    ):
        parsed = deepspeed.runtime.config.DeepSpeedConfig(copy.deepcopy(config))
    assert [record.getMessage() for record in log.records if record.levelno >= logging.WARNING] == []
    assert parsed.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert parsed.float16_config.enabled == ("fp16" in config)
    assert parsed.bfloat16_config.enabled == ("bf16" in config)
    assert parsed.grad_accum_dtype == config["data_types"]["grad_accum_dtype"]


def check_trainer(plan: Plan, tmp_path: Path) -> None:
    class Arguments(TrainingArguments):
        """As a rank of the planned world would see itself."""

        world_size = property(lambda self: plan.value("world_size"))

    keywords = dict(plan.training_arguments) | {"use_cpu": True, "output_dir": str(tmp_path)}
    arguments = Arguments(**keywords)
    config = HfTrainerDeepSpeedConfig(copy.deepcopy(plan.deepspeed))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, None, 1000)  # raises ValueError for a value that differs
    assert config.config == plan.deepspeed


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", [entry.name for entry in list_recipes()])
def test_deepspeed_and_transformers_accept_every_checked_in_configuration(
    name: str, machine: str, deepspeed_log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    plan = built_in(name, machine)
    written = json.loads((GOLDEN / f"{name}--{machine}.json").read_text(encoding="utf-8"))
    assert written == plan.deepspeed, "stale: run scripts/regenerate"
    check_deepspeed(written, parse_machine(machine).device_count, deepspeed_log)
    check_trainer(plan, tmp_path)


@pytest.mark.parametrize(("machine", "keys", "stage", "offload"), VARIANTS)
def test_deepspeed_and_transformers_accept_what_a_recipe_can_ask_for(
    machine: str,
    keys: dict[str, Any],
    stage: int | None,
    offload: str | None,
    deepspeed_log: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    plan = variant(machine, keys, stage, offload)
    assert plan.deepspeed is not None
    check_deepspeed(dict(plan.deepspeed), plan.value("world_size"), deepspeed_log)
    check_trainer(plan, tmp_path)


def test_transformers_would_notice_a_value_that_differs(tmp_path: Path) -> None:
    plan = variant("8xH100", {}, 2, None)
    assert plan.deepspeed is not None
    dict(plan.deepspeed)["optimizer"]["params"]["lr"] *= 2
    with pytest.raises(ValueError, match="learning_rate"):
        check_trainer(plan, tmp_path)


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def new_optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("linear", lambda o: WarmupDecayLR(o, 100, 0, 1e-3, 10, "linear")),
        ("constant_with_warmup", lambda o: WarmupLR(o, 0, 1e-3, 10, "linear")),
        ("cosine", lambda o: WarmupCosineLR(o, 100, 0, 10, 0.0, "linear")),
    ],
)
def test_deepspeeds_schedules_are_not_transformers_which_is_why_none_is_written(name: str, build: Any) -> None:
    theirs = new_optimizer()
    expected = rates(get_scheduler(name, theirs, num_warmup_steps=10, num_training_steps=100), theirs, 100)
    ours = new_optimizer()
    found = rates(build(ours), ours, 100)
    # One step late in the warm-up, and nothing is learnt in the first two steps. Exact but for the order of operations.
    assert found[:2] == [0.0, 0.0]
    assert found[1:11] == pytest.approx(expected[:10], rel=1e-12)
    assert found != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("optim", "fused"), [("adamw_torch_fused", True), ("adamw_torch", None)])
def test_the_optimizer_section_builds_torchs_adamw_without_compiling(optim: str, fused: bool | None) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    plan = variant("8xH100", {"training": {"optim": optim, "learning_rate": 3e-4, "adam_beta2": 0.95}}, 2, None)
    assert plan.deepspeed is not None
    section = plan.deepspeed["optimizer"]
    engine = mock.Mock(spec=DeepSpeedEngine)
    engine.optimizer_name.return_value = section["type"].lower()
    engine.optimizer_params.return_value = section["params"]
    engine.get_optimizer_configuration = lambda *a, **k: DeepSpeedEngine.get_optimizer_configuration(engine, *a, **k)
    built = DeepSpeedEngine._configure_basic_optimizer(engine, [torch.nn.Parameter(torch.zeros(4))])
    assert type(built) is torch.optim.AdamW
    assert type(built) in ZERO_SUPPORTED_OPTIMIZERS
    assert (built.defaults["lr"], built.defaults["betas"], built.defaults["fused"]) == (3e-4, (0.9, 0.95), fused)
