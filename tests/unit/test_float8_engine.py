"""fp8 and mxfp8 on named machines: taken or refused, by which kernels, compiled or not."""

from typing import Any

import pytest

from mpt.errors import ExitCode, MptError, UnsupportedError
from mpt.hardware.machine import Device, Machine
from mpt.hardware.specs import parse_machine
from mpt.planning.compiling import choose_compile
from mpt.planning.decision import Origin
from mpt.planning.float8_engine import check_recomputed
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.terms import DeviceKind, Feature, Strategy
from tests.unit.module_lists import LLAMA, llama_modules

# Large enough for torchao's rule of which layers gain.
LARGE = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
}
BOTH = frozenset({"torchao", "transformer_engine"})


def plan_of(machine: str | Machine, precision: Any, packages: frozenset[str] | None = None, **keys: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "model": {"config": LARGE},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 320},
            "data": {"source": "text.txt", "sequence_length": 64},
            "precision": precision,
        }
        | keys
    )
    where = parse_machine(machine) if isinstance(machine, str) else machine
    facts = learn_model_facts(recipe)
    return resolve(recipe, where, facts, name="a-plan", packages=packages, modules=llama_modules(LARGE))


def refused(machine: str | Machine, precision: Any, packages: frozenset[str] | None = None, **keys: Any) -> MptError:
    with pytest.raises(MptError) as caught:
        plan_of(machine, precision, packages, **keys)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("machine", "fp8", "mxfp8"),
    [
        ("T4", False, False),
        ("V100", False, False),
        ("A100-80GB", False, False),
        ("RTX 4090", True, False),
        ("L40S", True, False),
        ("H100", True, False),
        ("H200", True, False),
        ("B200", True, True),
        ("B300", True, True),
        ("RTX 5090", True, False),  # 12.0 is no superset of 10.0
        ("MI300X", True, False),
        ("8xH100", True, False),
        ("2x8xH100", True, False),
        ("8xB200", True, True),
        ("4xH100+4xL40S", False, False),
        ("4xH100+4xA100", False, False),
        ("cpu", False, False),
        ("2xcpu", False, False),
    ],
)
def test_a_machine_takes_the_8_bit_formats_that_it_computes(machine: str, fp8: bool, mxfp8: bool) -> None:
    for mode, taken in (("fp8", fp8), ("mxfp8", mxfp8)):
        if not taken:
            error = refused(machine, mode)
            assert isinstance(error, UnsupportedError) and error.exit_code is ExitCode.UNSUPPORTED
            assert f"precision {mode} was asked for" in error.problem
            others = ("bf16", "fp16", "precision: fp8", "precision: fp32")  # fp32: a CPU without native bf16
            assert any(other in error.remedy for other in others)
            continue
        plan = plan_of(machine, mode)
        assert plan.value("precision") == mode
        assert {entry["precision"] for entry in plan.value("layers")["modules"]} == {mode, "bf16"}
        assert plan.value("fp8")["emulated"] is False
        assert "EMULATED" not in plan.values["precision"].reason + plan.values["fp8"].reason


@pytest.mark.parametrize(
    ("machine", "asked", "backend", "recipe", "compiled"),
    [
        ("H100", "fp8", "torchao", "tensorwise", True),
        ("MI300X", "fp8", "torchao", "tensorwise", True),
        ("8xH100", "fp8", "torchao", "tensorwise", True),
        ("RTX 4090", {"mode": "fp8", "fp8": {"recipe": "rowwise"}}, "torchao", "rowwise", True),
        (
            "L40S",
            {"mode": "fp8", "fp8": {"recipe": "rowwise_with_gw_hp"}},
            "torchao",
            "rowwise_with_gw_hp",
            True,
        ),
        ("H100", {"mode": "bf16", "layers": {"*.mlp": "fp8"}}, "torchao", "tensorwise", True),
        ("B200", "mxfp8", "transformer_engine", "mxfp8", False),
        ("B300", {"mode": "fp8", "fp8": {"recipe": "mxfp8"}}, "transformer_engine", "mxfp8", False),
        (
            "H100",
            {"mode": "fp8", "fp8": {"backend": "transformer_engine"}},
            "transformer_engine",
            "tensorwise",
            False,
        ),
        (
            "H100",
            {"mode": "fp8", "fp8": {"backend": "transformer_engine", "recipe": "delayed"}},
            "transformer_engine",
            "delayed",
            False,
        ),
    ],
)
def test_the_kernels_follow_from_the_mode_and_what_the_recipe_says(
    machine: str, asked: Any, backend: str, recipe: str, compiled: bool
) -> None:
    plan = plan_of(machine, asked)
    fp8 = plan.value("fp8")
    assert (fp8["backend"], fp8["recipe"], fp8["emulated"]) == (backend, recipe, False)
    assert (plan.value("compile"), plan.values["compile"].origin) == (compiled, Origin.AUTO)
    assert plan.training_arguments.get("torch_compile", False) is compiled
    assert plan.training_arguments["bf16"] is True
    is_asked = isinstance(asked, dict) and "fp8" in asked
    assert plan.values["fp8"].origin is (Origin.ASKED if is_asked else Origin.AUTO)


def test_fp8_by_the_recipe_mxfp8_is_the_mode_mxfp8() -> None:
    asked = {"mode": "fp8", "fp8": {"recipe": "mxfp8"}}
    assert plan_of("B200", asked).value("precision") == "mxfp8"
    assert "precision mxfp8 was asked for" in refused("H100", asked).problem


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        ("cpu", {"mode": "fp8"}),
        ("T4", {"mode": "fp8"}),
        ("8xA100-80GB", {"mode": "fp8"}),
        ("A100", {"mode": "bf16", "layers": {"*.mlp": "fp8"}}),
        ("cpu", {"mode": "fp8", "fp8": {"recipe": "rowwise"}}),
    ],
)
def test_emulation_is_taken_only_when_allowed_is_said_loudly_and_is_not_compiled(
    machine: str, precision: dict[str, Any]
) -> None:
    assert refused(machine, precision).exit_code is ExitCode.UNSUPPORTED
    plan = plan_of(machine, precision | {"allow_emulation": True})
    assert plan.value("fp8")["emulated"] is True
    assert plan.values["fp8"].reason.startswith("EMULATED")
    assert plan.value("compile") is False
    if precision["mode"] == "fp8":
        assert plan.values["precision"].reason.startswith("EMULATED")
        assert plan.value("fp8")["auto_filter"] is False  # a rule of speed, which emulation has not
        assert not any("slower" in option.reason for option in plan.values["precision"].rejected)


@pytest.mark.parametrize("machine", ["cpu", "T4", "H100", "MI300X", "RTX 5090"])
def test_mxfp8_is_never_emulated(machine: str) -> None:
    error = refused(machine, {"mode": "mxfp8", "allow_emulation": True})
    assert error.exit_code is ExitCode.UNSUPPORTED
    assert "not even emulated" in error.problem


def test_a_card_without_mxfp8_is_told_of_the_fp8_that_it_has() -> None:
    assert "precision: fp8" in refused("RTX 5090", "mxfp8").remedy
    assert "precision: bf16" in refused("A100", "mxfp8").remedy


@pytest.mark.parametrize(
    ("machine", "precision", "packages", "says"),
    [
        ("B200", "mxfp8", frozenset({"torch", "torchao"}), "transformer_engine[pytorch]"),
        ("H100", {"mode": "fp8", "fp8": {"backend": "transformer_engine"}}, frozenset({"torchao"}), "pip install"),
        ("H100", "fp8", frozenset({"torch", "transformer_engine"}), "mpt[fp8]"),
        ("H100", {"layers": {"*.mlp": "fp8"}}, frozenset({"torch"}), "mpt[fp8]"),
        ("cpu", {"mode": "fp8", "allow_emulation": True}, frozenset({"torch"}), "mpt[fp8]"),
    ],
)
def test_kernels_that_are_not_installed_are_unsupported_with_the_command_that_installs_them(
    machine: str, precision: Any, packages: frozenset[str], says: str
) -> None:
    error = refused(machine, precision, packages)
    assert error.exit_code is ExitCode.UNSUPPORTED
    assert "which is not installed" in error.problem
    assert says in error.remedy
    assert plan_of(machine, precision, packages | BOTH).value("fp8") is not None


def test_transformer_engine_is_not_asked_for_on_amd_and_torchao_is_taken() -> None:
    error = refused("MI300X", {"mode": "fp8", "fp8": {"backend": "transformer_engine"}})
    assert error.exit_code is ExitCode.UNSUPPORTED and "torchao" in error.remedy


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [("torchao", "delayed"), ("torchao", "mxfp8"), ("transformer_engine", "rowwise")],
)
def test_a_recipe_that_the_backend_lacks_is_a_usage_error_naming_the_one_that_has_it(backend: str, recipe: str) -> None:
    error = refused("B200", {"mode": "fp8", "fp8": {"backend": backend, "recipe": recipe}})
    assert error.exit_code is ExitCode.USAGE
    other = "transformer_engine" if backend == "torchao" else "torchao"
    assert recipe in error.problem and other in error.remedy


@pytest.mark.parametrize(
    ("recipe", "filters"), [("tensorwise", True), ("rowwise", True), ("rowwise_with_gw_hp", False)]
)
def test_layers_too_small_to_gain_are_left_out_where_torchao_published_a_rule(recipe: str, filters: bool) -> None:
    plan = plan_of("H100", {"mode": "fp8", "fp8": {"recipe": recipe}})
    listed = {entry["name"]: entry["precision"] for entry in plan.value("layers")["modules"]}
    # 4096 x 1024, which no recipe gains from.
    assert (listed["model.layers.1.self_attn.k_proj"] == "bf16") is filters
    assert listed["model.layers.1.mlp.up_proj"] == "fp8"
    asked = {"mode": "fp8", "fp8": {"recipe": recipe, "auto_filter": False}}
    kept = {entry["name"]: entry["precision"] for entry in plan_of("H100", asked).value("layers")["modules"]}
    assert kept["model.layers.1.self_attn.k_proj"] == "fp8"


@pytest.mark.parametrize(
    ("training", "compiled"),
    [
        ({"torch_compile": False}, False),
        ({"torch_compile": True}, True),
        ({"torch_compile_backend": "eager"}, True),
        ({"torch_compile_mode": "max-autotune"}, True),
        ({"torch_compile": False, "torch_compile_mode": "max-autotune"}, True),  # TrainingArguments turns it on
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_torch_compile_is_the_recipes_where_it_says_so(
    precision: str, training: dict[str, Any], compiled: bool
) -> None:
    decision = plan_of("H100", precision, training=training).values["compile"]
    assert (decision.value, decision.origin) == (compiled, Origin.ASKED)


def test_without_fp8_nothing_is_compiled_unasked() -> None:
    plan = plan_of("H100", "bf16")
    assert (plan.value("compile"), plan.value("fp8")) == (False, None)
    assert "torch_compile" not in plan.training_arguments


@pytest.mark.parametrize(("strategy", "compiled"), [("ddp", True), ("zero1", True), ("zero2", True), ("zero3", False)])
def test_fp8_is_compiled_by_default_but_not_where_zero3_would_break_every_graph(strategy: str, compiled: bool) -> None:
    fp8 = {"mode": "fp8", "fp8": {"auto_filter": False}}
    plan = plan_of("8xH100", fp8, distributed={"strategy": strategy})
    decision = plan.values["compile"]
    assert (decision.value, decision.origin) == (compiled, Origin.AUTO)
    assert ("ZeRO-3 gathers" in decision.reason) is not compiled
    asked = plan_of("8xH100", fp8, distributed={"strategy": strategy}, training={"torch_compile": True})
    assert asked.value("compile") is True


DELAYED = {"backend": "transformer_engine", "recipe": "delayed", "emulated": False}
TORCHAO = {"backend": "torchao", "recipe": "tensorwise", "emulated": False}


@pytest.mark.parametrize("key", ["torch_compile", "torch_compile_backend"])
def test_delayed_scaling_is_not_compiled(key: str) -> None:
    recipe = Recipe.model_validate(
        {"model": "gpt2", "data": "text.txt", "training": {key: True if key == "torch_compile" else "inductor"}}
    )
    with pytest.raises(MptError, match=f"{key} asks for torch.compile"):
        choose_compile(recipe, DELAYED, Strategy.SINGLE)
    assert choose_compile(recipe, TORCHAO, Strategy.ZERO3).value is True
    assert choose_compile(recipe, None, Strategy.SINGLE).value is True


@pytest.mark.parametrize(("fp8", "checkpointing", "allowed"), [(DELAYED, True, False), (DELAYED, False, True),
                                                                (TORCHAO, True, True), (None, True, True)])  # fmt: skip
def test_a_forward_pass_is_recomputed_only_where_fp8_repeats_its_numbers(
    fp8: dict[str, Any] | None, checkpointing: bool, allowed: bool
) -> None:
    if allowed:
        check_recomputed(fp8, gradient_checkpointing=checkpointing)
        return
    with pytest.raises(MptError, match="gradient checkpointing does not go with") as caught:
        check_recomputed(fp8, gradient_checkpointing=checkpointing)
    assert "tensorwise" in caught.value.remedy


def test_delayed_scaling_with_asked_checkpointing_is_refused_before_anything_runs() -> None:
    precision = {"mode": "fp8", "fp8": {"backend": "transformer_engine", "recipe": "delayed"}}
    assert "history" in refused("H100", precision, gradient_checkpointing=True).problem


@pytest.mark.parametrize("precision", ["fp8", {"mode": "bf16", "layers": {"*.mlp": "fp8"}}])
def test_quantised_weights_are_not_computed_in_fp8(precision: Any) -> None:
    keys: dict[str, Any] = {"model": "meta-llama/Llama-2-7b-hf", "tokenizer": None, "lora": {}, "quantization": {}}
    error = refused("H100", precision, **keys)
    assert error.exit_code is ExitCode.USAGE and "quantization" in error.problem
    assert plan_of("H100", {"layers": {"lm_head": "fp32"}}, **keys).value("precision") == "bf16"


def test_a_device_that_nothing_is_known_of_emulates_fp8_where_allowed() -> None:
    unknown = Device(name="X", kind=DeviceKind.XPU, generation="unknown", memory_gib=64.0, native=(Feature.FP32,))
    machine = Machine((unknown,))
    assert refused(machine, "fp8").exit_code is ExitCode.UNSUPPORTED
    assert plan_of(machine, {"mode": "fp8", "allow_emulation": True}).value("fp8")["emulated"] is True
