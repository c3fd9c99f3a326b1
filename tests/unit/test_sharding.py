"""Strategy, offload, checkpointing, processes: the cheapest that fits, what was asked, and contradictions."""

from dataclasses import replace
from typing import Any

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.hardware.specs import parse_machine
from mpt.planning.contradictions import deepspeed_computes_fp16
from mpt.planning.decision import Origin
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.sharding import Layout, choose_layout
from mpt.recipe.schema import Recipe
from mpt.terms import Attention, DeviceKind, OffloadDevice, Precision, Strategy

SMALL = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
QLORA = {"lora": {"rank": 8}, "quantization": {}}


def layout(
    machine: str | Machine, model: Any = "meta-llama/Llama-2-7b-hf", computing: Precision = Precision.BF16, **keys: Any
) -> Layout:
    data = {"source": "text.txt", "sequence_length": 2048}
    recipe = Recipe.model_validate({"model": model, "data": data} | keys)
    where = parse_machine(machine) if isinstance(machine, str) else machine
    return choose_layout(recipe, where, learn_model_facts(recipe), computing, Attention.SDPA, 2048)


@pytest.mark.parametrize(
    ("machine", "model", "strategy", "checkpointing", "optimizer_on", "parameters_on"),
    [
        ("8xH100", "gpt2", Strategy.DDP, False, "none", "none"),
        ("A100-80GB", "gpt2", Strategy.SINGLE, False, "none", "none"),
        ("T4", "gpt2-large", Strategy.SINGLE, True, "none", "none"),
        ("8xA100-80GB", "meta-llama/Llama-2-7b-hf", Strategy.ZERO2, False, "none", "none"),
        ("8xA100-40GB", "meta-llama/Llama-2-13b-hf", Strategy.ZERO3, True, "none", "none"),
        ("A100-80GB", "meta-llama/Llama-2-7b-hf", Strategy.ZERO2, True, "cpu", "none"),
        ("T4", "meta-llama/Llama-2-7b-hf", Strategy.ZERO3, True, "cpu", "cpu"),
        ("8xA100-80GB", "meta-llama/Llama-3.1-70B", Strategy.ZERO3, True, "cpu", "none"),
        ("4x8xH100", "meta-llama/Llama-3.1-70B", Strategy.ZERO3, True, "none", "none"),
    ],
)
def test_the_cheapest_option_that_fits_is_taken(
    machine: str, model: str, strategy: Strategy, checkpointing: bool, optimizer_on: str, parameters_on: str
) -> None:
    found = layout(machine, model)
    assert found.memory.fits
    assert found.strategy.value is strategy
    assert found.strategy.origin is Origin.AUTO
    assert found.gradient_checkpointing.value is checkpointing
    assert found.offload.value == {"optimizer": optimizer_on, "parameters": parameters_on, "nvme_path": None}


@pytest.mark.parametrize(
    ("machine", "computes"), [("8xT4", True), ("2xV100", True), ("8xH100", True), ("2xP100", False), ("MI300X", True)]
)
def test_deepspeed_takes_fp16_from_volta_on(machine: str, computes: bool) -> None:
    """deepspeed 0.19.8: below compute capability 7.0 only with DS_ALLOW_DEPRECATED_FP16."""
    assert deepspeed_computes_fp16(parse_machine(machine)) is computes


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_fp16_that_deepspeed_would_refuse_is_refused_while_planning(strategy: str) -> None:
    with pytest.raises(UnsupportedError, match="DeepSpeed has no fp16 on"):
        layout("2xP100", "gpt2", Precision.FP16, distributed={"strategy": strategy})
    left_open = layout("2xP100", "gpt2-xl", Precision.FP16)
    assert left_open.strategy.value is Strategy.DDP


def test_a_rejected_strategy_says_how_much_it_would_need() -> None:
    against = {option.value: option.reason for option in layout("8xA100-80GB").strategy.rejected}
    assert set(against) == set(Strategy) - {Strategy.ZERO2}
    assert against["ddp"].startswith("needs 1") and "GiB of 80.0 a rank at micro batch 1" in against["ddp"]
    assert against["single"] == "there are 8 processes"


def test_where_nothing_fits_the_layout_that_needs_least_is_planned_and_says_so() -> None:
    found = layout("T4", "meta-llama/Llama-3.1-70B", offload="none")
    assert not found.memory.fits
    assert found.memory.peak_gib > 15
    assert found.micro_batch_size.value == 1
    assert "does not fit" in found.strategy.reason


def test_a_small_micro_batch_gives_way_to_a_layout_with_room() -> None:
    data = {"source": "text.txt", "sequence_length": 128}
    recipe = Recipe.model_validate({"model": "meta-llama/Llama-2-7b-hf", "data": data})
    found = choose_layout(
        recipe, parse_machine("2xA100-80GB"), learn_model_facts(recipe), Precision.BF16, Attention.SDPA, 128
    )
    assert found.micro_batch_size.value * 128 >= 1024  # the largest of the usual sizes, 8


@pytest.mark.parametrize("memory_gib", [6.0, 8.0, 9.0, 9.5, 10.0, 11.0, 12.0, 14.0, 16.0, 24.0])
@pytest.mark.parametrize("machine", ["T4", "2xT4"])
def test_nothing_is_offloaded_while_something_fits_without(machine: str, memory_gib: float) -> None:
    named = parse_machine(machine)
    devices = tuple(replace(device, memory_gib=memory_gib) for device in named.devices)
    data = {"source": "text.txt", "sequence_length": 128}
    recipe = Recipe.model_validate({"model": "Qwen/Qwen2.5-0.5B", "data": data})
    without = recipe.model_copy(update={"offload": OffloadDevice.NONE})
    found, kept = (
        choose_layout(r, replace(named, devices=devices), learn_model_facts(r), Precision.FP16, Attention.SDPA, 128)
        for r in (recipe, without)
    )
    assert (found.offload.value["optimizer"] == "cpu") is not kept.memory.fits


@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP2])
def test_an_asked_strategy_is_honoured_even_where_another_would_do(strategy: Strategy) -> None:
    found = layout("8xH100", "gpt2", distributed={"strategy": strategy})
    assert (found.strategy.value, found.strategy.origin) == (strategy, Origin.ASKED)


@pytest.mark.parametrize(("asked", "origin"), [(True, Origin.ASKED), (False, Origin.ASKED)])
def test_asked_checkpointing_is_honoured(asked: bool, origin: Origin) -> None:
    found = layout("8xH100", "gpt2", gradient_checkpointing=asked)
    assert (found.gradient_checkpointing.value, found.gradient_checkpointing.origin) == (asked, origin)


@pytest.mark.parametrize(
    ("offload", "strategy", "expected", "moved"),
    [
        ("cpu", "auto", Strategy.ZERO3, ("cpu", "cpu")),
        ("cpu", "zero3", Strategy.ZERO3, ("cpu", "cpu")),
        ("cpu", "zero2", Strategy.ZERO2, ("cpu", "none")),
        ({"optimizer": "cpu"}, "auto", Strategy.ZERO2, ("cpu", "none")),
        ({"optimizer": "nvme", "nvme_path": "/fast"}, "zero3", Strategy.ZERO3, ("nvme", "none")),
        ("none", "auto", Strategy.DDP, ("none", "none")),
    ],
)
def test_asked_offload_chooses_a_stage_that_can_do_it(
    offload: Any, strategy: str, expected: Strategy, moved: tuple[str, str]
) -> None:
    found = layout("2xH100", "gpt2", offload=offload, distributed={"strategy": strategy})
    assert found.strategy.value is expected
    assert (found.offload.value["optimizer"], found.offload.value["parameters"]) == moved
    assert found.offload.origin is Origin.ASKED


@pytest.mark.parametrize(
    ("machine", "keys", "said"),
    [
        ("8xH100", {"offload": "cpu", "distributed": {"strategy": "ddp"}}, "only ZeRO offloads"),
        ("8xH100", {"offload": {"parameters": "cpu"}, "distributed": {"strategy": "zero2"}}, "only zero3"),
        ("8xH100", {"offload": "nvme"}, "where the drive is"),
        ("8xH100", {"offload": "cpu", **QLORA}, "quantization"),
        ("8xH100", {"offload": "cpu", "training": {"optim": "lion_32bit"}}, "AdamW"),
        ("8xH100", {"offload": "cpu", "training": {"optim": "adamw_torch_8bit"}}, "AdamW"),
        ("8xH100", {"distributed": {"strategy": "zero3"}, **QLORA}, "quantised weights can't be divided"),
        ("8xH100", {"distributed": {"strategy": "single", "processes_per_node": 2}}, "2 processes"),
        ("2x8xH100", {"distributed": {"strategy": "single"}}, "2 processes"),
        ("H100", {"distributed": {"strategy": "ddp"}}, "there is one process"),
        ("H100", {"distributed": {"strategy": "fsdp2"}}, "there is one process"),
        ("8xH100", {"global_batch_size": 12}, "not a multiple of 8 processes"),
    ],
)
def test_contradictions_are_errors_with_a_remedy(machine: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(MptError, match=said) as raised:
        layout(machine, **keys)
    assert raised.value.exit_code == 2
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("machine", "keys", "said"),
    [
        ("4xT4", {"distributed": {"processes_per_node": 5}}, "has 4 a node"),
        ("A100-80GB:3g.40gb", {"distributed": {"processes_per_node": 2}}, "MIG"),
        ("cpu", {"distributed": {"strategy": "fsdp2", "processes_per_node": 2}}, "on a CPU"),
    ],
)
def test_what_the_machine_can_not_do_is_unsupported(machine: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        layout(machine, **keys)


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3])
def test_pure_bf16_goes_through_zero_as_asked(strategy: Strategy) -> None:
    found = layout("8xH100", computing=Precision.BF16_PURE, distributed={"strategy": strategy})
    assert found.strategy.value is strategy


@pytest.mark.parametrize("keys", [{}, {"distributed": {"strategy": "zero2"}}, {"distributed": {"strategy": "zero3"}}])
def test_pure_bf16_is_never_offloaded_for_deepspeeds_cpu_optimizer_does_not_round_as_asked(
    keys: dict[str, Any],
) -> None:
    with pytest.raises(MptError, match="bf16_pure") as caught:
        layout("8xH100", computing=Precision.BF16_PURE, offload="cpu", **keys)
    assert "precision: bf16" in caught.value.remedy
    unasked = layout("T4", "meta-llama/Llama-2-7b-hf", computing=Precision.BF16_PURE, **keys)
    assert unasked.offload.value["optimizer"] == unasked.offload.value["parameters"] == "none"
    assert not unasked.memory.fits


def test_pure_bf16_needs_half_the_memory_and_so_fewer_devices() -> None:
    asked = {"training": {"adam_beta2": 0.95}, "gradient_checkpointing": True, "precision": "bf16_pure"}
    found = layout("A100-80GB", computing=Precision.BF16_PURE, **asked)
    assert (found.strategy.value, found.memory.fits) == (Strategy.SINGLE, True)
    assert not layout("A100-80GB", gradient_checkpointing=True, offload="none").memory.fits


@pytest.mark.parametrize(
    ("machine", "keys", "per_node", "world", "strategy"),
    [
        ("cpu", {}, 1, 1, Strategy.SINGLE),
        ("2xcpu", {}, 2, 2, Strategy.DDP),
        ("cpu", {"distributed": {"processes_per_node": 2}}, 2, 2, Strategy.DDP),
        ("cpu", {"distributed": {"processes_per_node": 2, "strategy": "zero3"}}, 2, 2, Strategy.ZERO3),
        ("cpu", {"distributed": {"strategy": "zero2"}}, 1, 1, Strategy.ZERO2),
        ("8xH100", {}, 8, 8, Strategy.DDP),
        ("8xH100", {"distributed": {"processes_per_node": 3}}, 3, 3, Strategy.DDP),
        ("8xH100", {"distributed": {"strategy": "single"}}, 1, 1, Strategy.SINGLE),
        ("2x8xH100", {}, 8, 16, Strategy.DDP),
        ("2x8xH100", {"distributed": {"processes_per_node": 1}}, 1, 2, Strategy.DDP),
    ],
)
def test_there_is_one_process_a_device_unless_asked(
    machine: str, keys: dict[str, Any], per_node: int, world: int, strategy: Strategy
) -> None:
    found = layout(machine, {"config": SMALL}, **keys)
    assert (found.processes_per_node.value, found.world_size.value) == (per_node, world)
    assert found.strategy.value is strategy


def test_several_mig_instances_are_one_process() -> None:
    one = parse_machine("A100-80GB:3g.40gb")
    assert layout(replace(one, devices=one.devices * 2), "gpt2").world_size.value == 1


def test_processes_on_a_cpu_share_its_memory() -> None:
    cpu = replace(parse_machine("cpu"), host_memory_gib=16.0)
    found = layout(cpu, {"config": SMALL}, distributed={"processes_per_node": 2})
    assert found.memory.capacity_gib == 8.0


def test_offload_on_a_cpu_is_honoured_and_called_useless() -> None:
    found = layout("cpu", {"config": SMALL}, offload="cpu", distributed={"strategy": "zero3"})
    assert found.offload.value["optimizer"] == "cpu"
    assert "saves nothing" in found.offload.reason
    plain = layout("cpu", {"config": SMALL}, distributed={"strategy": "zero3"})
    assert found.memory.peak_gib == plain.memory.peak_gib


def test_unknown_memory_is_taken_to_be_enough() -> None:
    cpu = parse_machine("cpu")
    devices = tuple(replace(device, memory_gib=None, kind=DeviceKind.CUDA) for device in cpu.devices)
    found = layout(Machine(devices=devices), "meta-llama/Llama-3.1-70B")
    assert found.memory.fits
    assert found.memory.capacity_gib is None


def test_a_wish_that_only_deepspeed_can_meet_goes_to_deepspeed() -> None:
    found = layout("8xH100", "gpt2", precision={"mode": "bf16", "grad_accum_dtype": "bf16"})
    assert found.strategy.value is Strategy.ZERO2
    assert "grad_accum_dtype" in next(option.reason for option in found.strategy.rejected if option.value == "ddp")


def test_ddp_sums_in_the_format_that_is_asked_for() -> None:
    found = layout("8xH100", "gpt2", precision={"mode": "bf16", "reduce_dtype": "bf16"})
    assert found.strategy.value is Strategy.DDP


def test_qlora_is_never_divided_unasked() -> None:
    found = layout("8xT4", computing=Precision.FP16, **QLORA)
    assert found.strategy.value is Strategy.DDP
