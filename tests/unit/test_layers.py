"""Which module computes in which precision: patterns, formats that a mode holds, fp8's own choice, islands and ZeRO."""

from typing import Any

import pytest

from mpt.errors import ExitCode, MptError, UnsupportedError
from mpt.hardware.specs import parse_machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.deepspeed_plan import with_strategy
from mpt.planning.float8_engine import choose_float8
from mpt.planning.layers import ISLANDS, check_tied, choose_layers, count_layers, island_dtypes, keeps_mlp_wide
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import PrecisionSection, Recipe
from mpt.terms import Precision, Strategy
from tests.unit.module_lists import GPT2, LLAMA, gpt2_modules, linear, llama_modules

MODULES = llama_modules()
BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEAR = [f"model.layers.{block}.{name}" for block in range(3) for name in BLOCK + MLP] + ["lm_head"]


def decide(
    layers: Any = None,
    mode: str = "bf16",
    machine: str = "H100",
    modules: tuple[ModuleShape, ...] = MODULES,
    **keys: Any,
) -> Decision[dict[str, Any] | None]:
    section = PrecisionSection.model_validate({"mode": mode, "layers": layers} | keys)
    where = parse_machine(machine)
    precision = section.asked_mode or Precision.BF16
    fp8 = choose_float8(section, precision, where, None)
    return choose_layers(section, precision, modules, machine=where, fp8=fp8.value)


def precisions(*arguments: Any, **keys: Any) -> dict[str, str]:
    value = decide(*arguments, **keys).value
    assert value is not None
    return {entry["name"]: entry["precision"] for entry in value["modules"]}


def refused(*arguments: Any, **keys: Any) -> MptError:
    with pytest.raises(MptError) as caught:
        decide(*arguments, **keys)
    assert caught.value.remedy
    return caught.value


def plan_of(machine: str, precision: Any, strategy: str = "auto", config: dict[str, Any] = LLAMA, **keys: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "model": {"config": config},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": config["vocab_size"]},
            "data": {"source": "text.txt", "sequence_length": 64},
            "distributed": {"strategy": strategy},
            "precision": precision,
        }
        | keys
    )
    modules = llama_modules(config) if config["model_type"] == "llama" else gpt2_modules(config)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan", modules=modules)


# --- patterns


@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16_pure"])
def test_a_model_without_patterns_is_simply_in_its_precision(mode: str) -> None:
    decision = decide(mode=mode)
    assert (decision.value, decision.origin) == (None, Origin.DERIVED)
    assert mode in decision.reason


def test_every_matrix_multiplication_and_every_island_is_listed_in_the_models_order() -> None:
    decision = decide({"lm_head": "fp32", "model.norm": "fp32"})
    assert decision.value is not None
    assert [entry["name"] for entry in decision.value["modules"]] == [*LINEAR[:-1], "model.norm", "lm_head"]
    assert all(entry["reason"] for entry in decision.value["modules"])
    assert decision.origin is Origin.ASKED
    assert decision.reason == count_layers(decision.value) == "21 in bf16, 2 in fp32"


@pytest.mark.parametrize(
    ("layers", "fp32"),
    [
        ({"lm_head": "fp32"}, ["lm_head"]),
        ({"*.q_proj": "fp32"}, [f"model.layers.{block}.self_attn.q_proj" for block in range(3)]),
        # A module that holds others means what is beneath it, with and without a wildcard of its own.
        ({"model.layers.0.mlp": "fp32"}, [f"model.layers.0.{name}" for name in MLP]),
        ({"*.2.mlp.*": "fp32"}, [f"model.layers.2.{name}" for name in MLP]),
        ({"model.layers.1": "fp32"}, [f"model.layers.1.{n}" for n in [*BLOCK, *MLP, "input_layernorm",
                                                                     "post_attention_layernorm"]]),
        ({"*.mlp": "bf16"}, []),
        # The module's own name goes before the name of what holds it, and that before wildcards, in any order.
        ({"*.mlp": "bf16", "model.layers.0.mlp.up_proj": "fp32"}, ["model.layers.0.mlp.up_proj"]),
        ({"model.layers.0.mlp.up_proj": "fp32", "*.mlp": "bf16"}, ["model.layers.0.mlp.up_proj"]),
        ({"*.mlp": "bf16", "model.layers.0.mlp": "fp32"}, [f"model.layers.0.{name}" for name in MLP]),
        ({"model.layers.0.mlp": "fp32", "model.layers.0.mlp.up_proj": "bf16"},
         ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]),
        # Wildcards may disagree where a name decides.
        ({"*.0.mlp.up_proj": "bf16", "*.up_proj": "fp32", "model.layers.0.mlp.up_proj": "fp32"},
         [f"model.layers.{block}.mlp.up_proj" for block in range(3)]),
        # Patterns that agree may overlap.
        ({"*.mlp": "fp32", "*.0.mlp.*": "fp32"}, [f"model.layers.{b}.{name}" for b in range(3) for name in MLP]),
    ],
    ids=str,
)  # fmt: skip
def test_a_pattern_names_modules(layers: dict[str, str], fp32: list[str]) -> None:
    assert [name for name, precision in precisions(layers).items() if precision == "fp32"] == fp32


def test_an_island_says_which_pattern_made_it() -> None:
    value = decide({"*.mlp": "bf16", "lm_head": "fp32"}).value
    assert value is not None
    reasons = {entry["name"]: entry["reason"] for entry in value["modules"]}
    assert reasons["lm_head"] == "precision.layers: lm_head"
    assert reasons["model.layers.0.mlp.up_proj"] == "precision.layers: *.mlp"
    assert reasons["model.layers.0.self_attn.q_proj"] == "the mode is bf16"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("lm_haed", "did you mean lm_head?"),
        ("up_proj", "did you mean *.up_proj?"),
        ("*.mpl.*", "did you mean *.mlp?"),
        ("model.layers.*.mlp.donw_proj", "did you mean *.down_proj"),
        ("model.layers.3.mlp", "did you mean *.mlp?"),
        ("transformer.h.0.attn.c_attn", "matches no module of the model"),
        ("modle", "did you mean model?"),  # *.model would match nothing
        ("LM_Head", "did you mean lm_head?"),
        ("*.MLP", "did you mean *.mlp?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(pattern: str, hint: str) -> None:
    error = refused({"*.mlp": "fp32", pattern: "fp32"})
    assert error.exit_code is ExitCode.USAGE
    assert f'precision.layers: "{pattern}" matches no module' in error.problem
    assert hint in error.problem
    assert "down_proj" in error.remedy and "model.layers.0.self_attn.q_proj" in error.remedy


@pytest.mark.parametrize(
    "layers",
    [
        {"*.mlp": "fp32", "*.1.*": "bf16"},
        {"*.up_proj": "fp32", "model.layers.1*": "bf16"},
        {"model.layers.1": "fp32", "model.layers.1.mlp": "bf16"},
    ],
    ids=str,
)
def test_two_patterns_that_fight_are_both_named_with_the_module(layers: dict[str, str]) -> None:
    error = refused(layers)
    assert all(f'"{pattern}": {wanted}' in error.problem for pattern, wanted in layers.items())
    assert "model.layers.1.mlp." in error.problem
    name, wanted = error.remedy.partition("own name: `")[2].removesuffix("`.").split(": ")
    if "up_proj" in name:
        assert precisions(layers | {name: wanted})[name] == wanted  # the remedy mends it


def test_a_pattern_over_a_block_lowers_its_matrix_multiplications_and_leaves_its_norms() -> None:
    found = precisions({"model.layers.1": "fp8"})
    assert [name for name, precision in found.items() if precision == "fp8"] == [
        f"model.layers.1.{name}" for name in BLOCK + MLP
    ]
    assert "model.layers.1.input_layernorm" not in found


@pytest.mark.parametrize(
    ("wanted", "mode", "pattern"),
    [("fp8", "bf16", "*layernorm"), ("fp8", "bf16", "model.embed_tokens"), ("bf16", "fp32", "model.norm")],
)
def test_a_narrow_format_without_a_matrix_multiplication_is_an_error(wanted: str, mode: str, pattern: str) -> None:
    error = refused({pattern: wanted}, mode)
    assert f'"{pattern}": {wanted} matches no linear layer' in error.problem
    assert "model.layers.0.self_attn.q_proj" in error.remedy


# --- formats and modes


@pytest.mark.parametrize("mode", list(ISLANDS))
@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16", "fp8"])
def test_a_mode_holds_some_formats_and_refuses_the_others_with_the_reason(mode: Precision, wanted: str) -> None:
    keys: dict[str, Any] = {"fp8": {"auto_filter": False}} if mode is Precision.FP8 else {}
    machine = "B200" if mode is Precision.MXFP8 else "H100"
    if wanted in ISLANDS[mode]:
        found = precisions({"*.1.mlp": wanted}, mode, machine, **keys)
        expected = mode if wanted == "fp8" and mode is Precision.MXFP8 else wanted
        assert found["model.layers.1.mlp.up_proj"] == expected
    else:
        error = refused({"*.1.mlp": wanted}, mode, machine, **keys)
        assert error.exit_code is ExitCode.USAGE
        assert f"{wanted} does not go with mode {mode}" in error.problem
        assert all(other in error.remedy for other in ISLANDS[mode])


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("bf16", "fp16"), ("fp32", "fp16"), ("fp8", "fp16"), ("fp16", "fp8"), ("fp32", "fp8"), ("tf32", "fp32")],
)
def test_formats_that_never_go_together(mode: str, wanted: str) -> None:
    # fp16 needs a loss scale, fp8 needs bf16 between its layers, and TF32 is on or off for all.
    assert wanted not in ISLANDS[Precision(mode)]


@pytest.mark.parametrize(
    ("machine", "mode", "wanted", "lacks"),
    [
        ("T4", "fp16", "bf16", "Tesla T4 has no native bf16"),
        ("V100", "fp32", "bf16", "has no native bf16"),
        ("4xV100+4xA100", "fp16", "bf16", "has no native bf16"),
        ("A100", "bf16", "fp8", "has no native fp8"),
    ],
)
def test_a_format_that_the_machine_would_emulate_is_unsupported_unless_allowed(
    machine: str, mode: str, wanted: str, lacks: str
) -> None:
    error = refused({"*.mlp": wanted}, mode, machine)
    assert isinstance(error, UnsupportedError) and error.exit_code is ExitCode.UNSUPPORTED
    assert lacks in error.problem and '"*.mlp"' in error.problem
    assert "allow_emulation: true" in error.remedy
    assert precisions({"*.mlp": wanted}, mode, machine, allow_emulation=True)["model.layers.0.mlp.up_proj"] == wanted


def test_fp8_layers_on_unlike_devices_are_unsupported() -> None:
    assert refused({"*.mlp": "fp8"}, machine="4xH100+4xL40S").exit_code is ExitCode.UNSUPPORTED


# --- fp8


def test_the_mode_fp8_lists_every_linear_layer_with_precision_and_reason() -> None:
    decision = decide(mode="fp8", fp8={"auto_filter": False})
    assert decision.value is not None
    assert [entry["name"] for entry in decision.value["modules"]] == LINEAR
    kept = {entry["name"]: entry["reason"] for entry in decision.value["modules"] if entry["precision"] != "fp8"}
    assert set(kept) == {LINEAR[0], LINEAR[-2], "lm_head"}
    assert "keep_first" in kept[LINEAR[0]] and "keep_last" in kept[LINEAR[-2]] and "head" in kept["lm_head"]
    assert (decision.origin, decision.reason) == (Origin.AUTO, "19 in fp8, 3 in bf16")


def test_mxfp8_layers_are_called_mxfp8() -> None:
    assert set(precisions(mode="mxfp8", machine="B200").values()) == {"mxfp8", "bf16"}


def test_a_pattern_goes_before_what_fp8_keeps_and_before_what_it_converts() -> None:
    found = precisions({LINEAR[0]: "fp8", "*.1.mlp": "bf16", "lm_head": "fp32"}, "fp8", fp8={"auto_filter": False})
    assert found[LINEAR[0]] == "fp8"
    assert found["model.layers.1.mlp.up_proj"] == "bf16"
    assert found["lm_head"] == "fp32"


@pytest.mark.parametrize(
    ("layers", "fp8"),
    [
        (None, {"keep_first": 21, "auto_filter": False}),
        (None, {"keep_high_precision": ["model"], "auto_filter": False}),
        (None, {}),  # every layer is too small to gain
        # What fp8 would have converted, patterns take away.
        ({"model": "bf16"}, {"auto_filter": False}),
        ({"model": "fp32"}, {"auto_filter": False}),
    ],
    ids=str,
)
def test_fp8_without_a_single_fp8_layer_is_an_error(layers: Any, fp8: dict[str, Any]) -> None:
    error = refused(layers, "fp8", fp8=fp8)
    assert "not one linear layer of this model would be fp8" in error.problem
    assert "keep_first" in error.remedy


@pytest.mark.parametrize(
    ("size", "mode", "machine", "multiple"),
    [(24, "bf16", "H100", 16), (24, "mxfp8", "B200", 32), (48, "mxfp8", "B200", 32)],
)
def test_an_asked_layer_that_the_kernels_can_not_take_is_an_error_with_its_sizes(
    size: int, mode: str, machine: str, multiple: int
) -> None:
    modules = (*MODULES, linear("odd", 64, size))
    error = refused({"odd": "fp8"}, mode, machine, modules)
    assert f"64 x {size}" in error.problem and f"multiples of {multiple}" in error.problem
    assert precisions({"odd": "bf16"}, mode, machine, modules)["odd"] == "bf16"


def test_an_asked_conv1d_is_an_error() -> None:
    error = refused({"*.mlp": "fp8"}, modules=gpt2_modules())
    assert "transformer.h.0.mlp.c_fc is a Conv1D, which has no fp8 kernel" in error.problem


def test_a_conv1d_can_be_an_island() -> None:
    found = precisions({"*.c_fc": "fp32"}, modules=gpt2_modules())
    assert [name for name, precision in found.items() if precision == "fp32"] == [
        f"transformer.h.{block}.mlp.c_fc" for block in range(2)
    ]


def test_a_layer_asked_for_in_fp8_and_kept_from_it_is_a_fight() -> None:
    error = refused({"*.mlp": "fp8"}, "fp8", fp8={"keep_high_precision": ["*.down_proj"], "auto_filter": False})
    assert '"*.mlp"' in error.problem and '"*.down_proj"' in error.problem
    assert "model.layers.0.mlp.down_proj" in error.problem


@pytest.mark.parametrize(
    "fp8", [{"keep_first": 1}, {"keep_last": 0}, {"keep_high_precision": []}, {"auto_filter": True}]
)
def test_what_chooses_layers_by_itself_has_no_place_beside_patterns_in_mode_bf16(fp8: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fp8))):
        PrecisionSection.model_validate({"mode": "bf16", "layers": {"*.mlp": "fp8"}, "fp8": fp8})
    assert precisions({"*.mlp": "fp8"}, fp8={"backend": "torchao", "recipe": "rowwise"})["lm_head"] == "bf16"


@pytest.mark.parametrize(
    ("asked", "kept", "precision"),
    [
        (LINEAR[5], "*.mlp", "fp8"),  # the module's own name goes before a wildcard, whoever says it
        ("*.mlp", LINEAR[5], "bf16"),
        ("model.layers.0", LINEAR[5], "bf16"),
        ("model.layers.0", "*.up_proj", "fp8"),
    ],
)
def test_of_asked_and_kept_the_closer_name_wins(asked: str, kept: str, precision: str) -> None:
    fp8 = {"keep_high_precision": [kept], "auto_filter": False}
    assert precisions({asked: "fp8"}, "fp8", fp8=fp8)[LINEAR[5]] == precision


# --- mixtures of experts, and what only looks like a linear layer

EXPERTS = ModuleShape("model.layers.0.mlp.experts", "experts", 0, 0, 98304)
MIXTURE = (*(module for module in MODULES if ".0.mlp." not in module.name), EXPERTS)


@pytest.mark.parametrize("layers", [None, {"model.layers.1": "fp8"}], ids=str)
def test_fused_experts_are_listed_as_what_fp8_does_not_take(layers: Any) -> None:
    keys: dict[str, Any] = {} if layers else {"fp8": {"auto_filter": False}}
    decision = decide(layers, "bf16" if layers else "fp8", modules=MIXTURE, **keys)
    assert decision.value is not None
    (entry,) = [entry for entry in decision.value["modules"] if entry["name"] == EXPERTS.name]
    assert (entry["precision"], entry["reason"]) == ("bf16", "fused experts: fp8 takes torch.nn.Linear alone")


@pytest.mark.parametrize(
    ("pattern", "wanted", "mode", "says"),
    [
        ("*.experts", "fp8", "bf16", "fused experts: fp8 takes torch.nn.Linear alone"),
        ("model.layers.0.mlp", "fp8", "fp8", "fused experts: fp8 takes torch.nn.Linear alone"),
        ("*.experts", "bf16", "fp32", "in the model's own precision or in fp32"),
    ],
)
def test_a_pattern_that_means_fused_experts_alone_is_told_so(pattern: str, wanted: str, mode: str, says: str) -> None:
    error = refused({pattern: wanted}, mode, modules=MIXTURE)
    assert f'"{pattern}": {wanted} means {EXPERTS.name}' in error.problem and says in error.problem
    assert precisions({"*.experts": "fp32"}, "bf16", modules=MIXTURE)[EXPERTS.name] == "fp32"


def test_a_subclass_of_a_linear_layer_is_refused_before_a_worker_would() -> None:
    modules = (*MODULES, ModuleShape("model.layers.2.router", "linear subclass", 64, 64, 4096))
    found = decide(mode="fp8", modules=modules, fp8={"auto_filter": False}).value
    assert found is not None
    (entry,) = [entry for entry in found["modules"] if entry["name"] == "model.layers.2.router"]
    assert entry["precision"] == "bf16"
    assert entry["reason"] == "a subclass of torch.nn.Linear: fp8 takes torch.nn.Linear alone"
    error = refused({"*.router": "fp8"}, modules=modules)
    assert "model.layers.2.router is a subclass of torch.nn.Linear" in error.problem
    assert precisions({"*.router": "fp32"}, modules=modules)["model.layers.2.router"] == "fp32"


# --- islands and what holds them


@pytest.mark.parametrize(
    ("mode", "listed", "islands"),
    [
        ("bf16", {"a": "bf16", "b": "fp32", "c": "fp8"}, {"b": "fp32"}),
        ("fp8", {"a": "bf16", "b": "fp32", "c": "fp8"}, {"b": "fp32"}),
        ("mxfp8", {"a": "bf16", "c": "mxfp8"}, {}),
        ("bf16_pure", {"a": "bf16", "b": "fp32"}, {"b": "fp32"}),
        ("fp16", {"a": "fp16", "b": "fp32", "c": "bf16"}, {"b": "fp32", "c": "bf16"}),
        ("fp32", {"a": "fp32", "b": "bf16"}, {"b": "bf16"}),
        ("tf32", {"a": "fp32", "b": "bf16"}, {"b": "bf16"}),
    ],
)
def test_an_island_is_what_computes_otherwise_than_the_model_around_it(
    mode: str, listed: dict[str, str], islands: dict[str, str]
) -> None:
    layers = {"modules": [{"name": name, "precision": dtype, "reason": ""} for name, dtype in listed.items()]}
    assert island_dtypes(layers, Precision(mode)) == islands
    assert island_dtypes(None, Precision(mode)) == {}


TIED = llama_modules(LLAMA | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("names", "modules", "allowed"),
    [
        (["lm_head"], MODULES, True),
        (["lm_head"], TIED, False),
        (["model.embed_tokens"], TIED, False),
        (["lm_head", "model.embed_tokens"], TIED, True),
        (["model.norm"], TIED, True),
    ],
)
def test_pure_bf16_keeps_a_tied_weight_in_one_format(
    names: list[str], modules: tuple[ModuleShape, ...], allowed: bool
) -> None:
    layers = decide(dict.fromkeys(names, "fp32"), "bf16_pure", modules=modules).value
    if allowed:
        check_tied(layers, Precision.BF16_PURE, modules)
        return
    with pytest.raises(MptError, match="share one weight") as caught:
        check_tied(layers, Precision.BF16_PURE, modules)
    assert "lm_head" in caught.value.problem and "model.embed_tokens" in caught.value.problem
    check_tied(layers, Precision.BF16, modules)  # where the weights are fp32 anyway


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3])
def test_deepspeed_bears_islands_in_bf16_by_fp32_weights_under_its_own_autocast(strategy: Strategy) -> None:
    plan = plan_of("8xA100-80GB", {"mode": "bf16", "layers": {"lm_head": "fp32"}}, strategy)
    assert plan.deepspeed is not None
    assert plan.deepspeed["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert not {"bf16", "fp16"} & set(plan.deepspeed)
    assert plan.training_arguments["bf16"] is False
    formats = ("weights_dtype", "gradient_dtype", "master_weights_dtype", "reduce_dtype", "autocast_dtype")
    assert [plan.value(key) for key in formats] == ["fp32", "fp32", "fp32", "fp32", "bf16"]


def test_outside_deepspeed_islands_change_nothing_but_their_own_format() -> None:
    plan = plan_of("8xA100-80GB", {"mode": "bf16", "layers": {"lm_head": "fp32"}}, "ddp")
    assert plan.training_arguments["bf16"] is True
    assert (plan.value("weights_dtype"), plan.value("autocast_dtype"), plan.deepspeed) == ("fp32", "bf16", None)


def test_a_pattern_that_makes_no_island_leaves_deepspeeds_bf16_engine_alone() -> None:
    plan = plan_of("8xA100-80GB", {"mode": "bf16", "layers": {"*.mlp": "bf16"}}, "zero2")
    assert plan.deepspeed is not None
    assert plan.deepspeed["bf16"]["enabled"] is True
    assert plan.training_arguments["bf16"] is True


@pytest.mark.parametrize(("machine", "mode"), [("8xT4", "fp16"), ("8xA100", "bf16_pure")])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_casts_every_weight_in_fp16_and_pure_bf16_so_islands_are_refused(
    machine: str, mode: str, strategy: str
) -> None:
    precision = {"mode": mode, "layers": {"lm_head": "fp32"}}
    with pytest.raises(MptError, match=f"under {strategy} DeepSpeed casts every weight") as caught:
        plan_of(machine, precision, strategy)
    assert "mode bf16" in caught.value.remedy and "ddp" in caught.value.remedy
    assert plan_of(machine, precision, "ddp").value("weights_dtype") == ("fp32" if mode == "fp16" else "bf16")


def test_a_strategy_that_mpt_chooses_is_one_that_bears_the_islands() -> None:
    # Without islands ZeRO-2 is taken here; DDP fits with gradient checkpointing alone.
    keys: dict[str, Any] = {"global_batch_size": 8, "data": {"source": "text.txt", "sequence_length": 2048}}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048}
    config = LLAMA | heads | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 34}
    free = plan_of("8xT4", "fp16", config=config, **keys)
    bound = plan_of("8xT4", {"mode": "fp16", "layers": {"lm_head": "fp32"}}, config=config, **keys)
    assert free.value("distributed.strategy") == "zero2"
    assert (bound.value("distributed.strategy"), bound.value("gradient_checkpointing")) == ("ddp", True)
    assert bound.memory.fits
    against = {option.value: option.reason for option in bound.values["distributed.strategy"].rejected}
    assert "DeepSpeed casts every weight" in against["zero2"]


@pytest.mark.parametrize(
    ("precision", "tf32"),
    [
        ("bf16", True),
        ("fp32", False),
        ("tf32", True),
        ({"mode": "bf16", "layers": {"lm_head": "fp32"}}, False),
        ({"mode": "bf16", "layers": {"*.mlp": "fp8"}}, True),
        ({"mode": "tf32", "layers": {"*.mlp": "bf16"}}, True),
    ],
    ids=str,
)
def test_an_fp32_island_is_not_multiplied_in_tf32(precision: Any, tf32: bool) -> None:
    plan = plan_of("H100", precision)
    assert plan.value("tf32") is tf32
    assert plan_of("T4", "fp32").value("tf32") is False


def test_a_plan_with_layers_survives_json_and_another_strategy() -> None:
    precision = {"mode": "fp8", "layers": {"lm_head": "fp32"}, "fp8": {"auto_filter": False}}
    plan = plan_of("8xH100", precision)
    again = Plan.from_json(plan.to_json())
    assert again.value("layers") == plan.value("layers")
    assert with_strategy(again.recipe, Strategy.ZERO2).precision == plan.recipe.precision
    assert precision["layers"] == again.recipe.precision.layers


def test_gpt2_has_no_fp8_but_has_islands() -> None:
    with pytest.raises(MptError, match="not one linear layer"):
        plan_of("H100", "fp8", config=GPT2, data={"source": "text.txt", "sequence_length": 16})
    plan = plan_of(
        "H100",
        {"mode": "bf16", "layers": {"*.mlp": "fp32"}},
        config=GPT2,
        data={"source": "text.txt", "sequence_length": 16},
    )
    assert plan.values["layers"].reason == "5 in bf16, 4 in fp32"


@pytest.mark.parametrize(
    ("layers", "is_enough"),
    [
        ({}, False),
        ({"lm_head": "fp32"}, False),
        ({"*.down_proj": "fp16"}, False),
        ({"model.layers.0.mlp.down_proj": "fp32"}, False),
        ({"*.down_proj": "fp32"}, True),
        ({"*.mlp.*": "bf16"}, True),
        ({f"model.layers.{block}.mlp.down_proj": "fp32" for block in range(3)}, True),
    ],
)
def test_an_overflowing_family_is_kept_wide_where_it_overflows(layers: dict[str, str], is_enough: bool) -> None:
    assert keeps_mlp_wide(layers, MODULES) is is_enough
