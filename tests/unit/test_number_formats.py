"""Which format holds what under which engine, and the wishes about it that can't be met."""

from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.number_formats import FP16_MAX, check_static_scale, choose_number_formats
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import PrecisionSection, Recipe
from mpt.terms import Method, Precision, Strategy
from tests.unit.module_lists import LLAMA, llama_modules

PLAIN = (Strategy.SINGLE, Strategy.DDP, Strategy.FSDP2)
ZERO = (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
HALF = {"fp16": "fp16", "bf16": "bf16", "fp8": "bf16", "mxfp8": "bf16"}
KEYS = (
    "weights_dtype",
    "master_weights_dtype",
    "gradient_dtype",
    "optimizer_state_dtype",
    "reduce_dtype",
    "grad_accum_dtype",
    "autocast_dtype",
    "adapter_dtype",
    "rounding",
)


def formats(
    mode: str = "bf16",
    strategy: Strategy = Strategy.SINGLE,
    method: Method = Method.FULL,
    *,
    checkpoint: str | None = None,
    has_islands: bool = False,
    beta1: float = 0.9,
    beta2: float = 0.999,
    optimizer: str = "adamw_torch_fused",
    **section: Any,
) -> dict[str, Decision[Any]]:
    return choose_number_formats(
        PrecisionSection.model_validate({"mode": mode} | section),
        Precision(mode),
        strategy,
        method,
        checkpoint,
        has_islands=has_islands,
        betas=(beta1, beta2),
        optimizer=optimizer,
    )


def values(*arguments: Any, **keys: Any) -> tuple[Any, ...]:
    decided = formats(*arguments, **keys)
    assert set(decided) == {*KEYS, "loss_scale"}
    assert all(decision.reason for decision in decided.values())
    return tuple(decided[key].value for key in KEYS)


def value(key: str, *arguments: Any, **keys: Any) -> Any:
    return formats(*arguments, **keys)[key].value


def refused(*arguments: Any, **keys: Any) -> MptError:
    with pytest.raises(MptError) as caught:
        formats(*arguments, **keys)
    assert caught.value.exit_code == 2 and caught.value.remedy
    return caught.value


# --- the table: weights, master, gradient, state, reduce, accumulate, autocast, adapters, rounding


@pytest.mark.parametrize("strategy", [*PLAIN, *ZERO])
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("mode", ["fp32", "tf32"])
def test_fp32_and_tf32_store_fp32_everywhere(mode: str, method: Method, strategy: Strategy) -> None:
    weights = "nf4" if method is Method.QLORA else "fp32"
    adapters = None if method is Method.FULL else "fp32"
    expected = (weights, "fp32", "fp32", "fp32", "fp32", "fp32", None, adapters, None)
    assert values(mode, strategy, method) == expected


@pytest.mark.parametrize("strategy", PLAIN)
@pytest.mark.parametrize(("mode", "half"), HALF.items())
def test_outside_deepspeed_16_bits_are_autocast_over_fp32_weights(mode: str, half: str, strategy: Strategy) -> None:
    full = ("fp32", "fp32", "fp32", "fp32", "fp32", "fp32", half, None, None)
    assert values(mode, strategy) == full
    assert values(mode, strategy, has_islands=True) == full
    # The frozen base holds no update, so it may be 16-bit; the adapters may not.
    assert values(mode, strategy, Method.LORA) == (half, *full[1:7], "fp32", None)
    assert values(mode, strategy, Method.QLORA) == ("nf4", *full[1:7], "fp32", None)


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize(("mode", "half"), HALF.items())
def test_deepspeeds_16_bit_engine_computes_with_copies_of_fp32_master_weights(
    mode: str, half: str, strategy: Strategy
) -> None:
    full = (half, "fp32", half, "fp32", "fp32", "fp32", None, None, None)
    assert values(mode, strategy) == full
    # Stages 1 and 2 cast the adapters; stage 3 takes them as they are, in fp32.
    adapters = "fp32" if strategy is Strategy.ZERO3 else half
    lora = (half, "fp32", adapters, "fp32", "fp32", "fp32", None, adapters, None)
    assert values(mode, strategy, Method.LORA) == lora
    assert values(mode, strategy, Method.QLORA) == ("nf4", *lora[1:])


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("mode", ["bf16", "fp8", "mxfp8"])
def test_islands_under_deepspeed_keep_every_weight_in_fp32(mode: str, strategy: Strategy) -> None:
    full = ("fp32", "fp32", "fp32", "fp32", "fp32", "fp32", "bf16", None, None)
    assert values(mode, strategy, has_islands=True) == full
    assert values(mode, strategy, Method.LORA, has_islands=True) == (*full[:7], "fp32", None)
    assert "islands" in formats(mode, strategy, has_islands=True)["weights_dtype"].reason


@pytest.mark.parametrize("strategy", [*PLAIN, *ZERO])
def test_pure_bf16_keeps_all_in_bf16_but_moments_that_would_stop_short(strategy: Strategy) -> None:
    expected = ("bf16", "bf16", "bf16", "fp32", "bf16", "bf16", None, None, "stochastic")
    assert values("bf16_pure", strategy) == expected
    assert values("bf16_pure", strategy, beta2=0.95) == (*expected[:3], "bf16", *expected[4:])


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
@pytest.mark.parametrize("strategy", [*PLAIN, *ZERO])
def test_pure_bf16_is_not_for_adapters(strategy: Strategy, method: Method) -> None:
    assert "adapters" in refused("bf16_pure", strategy, method).problem


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("mode", ["fp16", "bf16_pure"])
def test_islands_in_what_deepspeed_casts_whole_are_refused(mode: str, strategy: Strategy) -> None:
    assert "DeepSpeed casts every weight" in refused(mode, strategy, has_islands=True).problem


def test_a_bf16_checkpoint_gets_fp32_master_weights_and_the_reason_says_so() -> None:
    decision = formats("bf16", checkpoint="bf16")["master_weights_dtype"]
    assert decision.value == "fp32"
    assert "the checkpoint is bf16" in decision.reason


# --- pure bf16


@pytest.mark.parametrize(
    ("beta2", "dtype"),
    [(0.8, "bf16"), (0.95, "bf16"), (0.957, "bf16"), (0.958, "fp32"), (0.99, "fp32"), (0.999, "fp32")],
)
def test_moments_in_bf16_need_a_beta_with_which_they_follow_the_gradients(beta2: float, dtype: str) -> None:
    for key, betas in (("adam_beta2", {"beta2": beta2}), ("adam_beta1", {"beta1": beta2, "beta2": 0.5})):
        decision = formats("bf16_pure", **betas)["optimizer_state_dtype"]
        assert (decision.value, decision.origin) == (dtype, Origin.AUTO)
        told = f"{key} {beta2:g}" if beta2 > 0.9 or key == "adam_beta1" else "adam_beta1 0.9"
        assert told in decision.reason
        assert "average" in decision.reason or "anywhere" in decision.reason
    assert value("optimizer_state_dtype", "bf16", beta2=beta2) == "fp32"  # elsewhere it is fp32 whatever beta2 is


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("sgd", "bf16"), ("adagrad", "bf16"), ("rmsprop", "bf16"), ("adafactor", "fp32"), ("adamw_torch", "fp32")],
)
def test_another_optimizer_keeps_its_states_as_it_does(optimizer: str, dtype: str) -> None:
    assert value("optimizer_state_dtype", "bf16_pure", optimizer=optimizer, rounding="nearest") == dtype


@pytest.mark.parametrize(
    ("asked", "rounding", "origin"),
    [
        (None, "stochastic", Origin.AUTO),
        ("stochastic", "stochastic", Origin.ASKED),
        ("kahan", "kahan", Origin.ASKED),
        ("nearest", "nearest", Origin.ASKED),
    ],
)
def test_pure_bf16_rounds_as_asked_and_stochastically_otherwise(
    asked: str | None, rounding: str, origin: Origin
) -> None:
    decision = formats("bf16_pure", rounding=asked)["rounding"]
    assert (decision.value, decision.origin) == (rounding, origin)
    assert ("lost" in decision.reason) is (rounding == "nearest" or asked is None)


@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
def test_only_adamw_rounds_its_update(rounding: str | None) -> None:
    error = refused("bf16_pure", optimizer="lion_32bit", rounding=rounding)
    assert "lion_32bit" in error.problem and "rounding: nearest" in error.remedy
    assert value("rounding", "bf16_pure", optimizer="lion_32bit", rounding="nearest") == "nearest"


@pytest.mark.parametrize("strategy", [Strategy.SINGLE, Strategy.DDP])
def test_pure_bf16_may_keep_an_fp32_copy_in_the_optimizer(strategy: Strategy) -> None:
    found = values("bf16_pure", strategy, beta2=0.95, master_weights="fp32")
    assert found == ("bf16", "fp32", "bf16", "fp32", "bf16", "bf16", None, None, "nearest")
    assert formats("bf16_pure", master_weights="fp32")["master_weights_dtype"].origin is Origin.ASKED
    assert value("master_weights_dtype", "bf16_pure", strategy, master_weights="none") == "bf16"


@pytest.mark.parametrize("strategy", ZERO)
def test_an_fp32_copy_under_zero_is_what_mode_bf16_means(strategy: Strategy) -> None:
    assert "precision: bf16" in refused("bf16_pure", strategy, master_weights="fp32").remedy


def test_an_fp32_copy_is_kept_by_no_other_optimizer() -> None:
    assert "lion_32bit" in refused("bf16_pure", optimizer="lion_32bit", master_weights="fp32").problem


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16", "fp8"])
def test_master_weights_are_fp32_in_every_other_mode_and_may_be_asked_for(mode: str) -> None:
    assert values(mode, master_weights="fp32") == values(mode)
    with pytest.raises(ValueError, match="ask for mode bf16_pure"):
        PrecisionSection.model_validate({"mode": mode, "master_weights": "none"})


# --- sums over ranks and micro batches


@pytest.mark.parametrize("strategy", [Strategy.DDP, *ZERO])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16_pure"])
@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_gradients_are_summed_over_ranks_as_asked(asked: str, mode: str, strategy: Strategy) -> None:
    decision = formats(mode, strategy, reduce_dtype=asked)["reduce_dtype"]
    assert (decision.value, decision.origin) == (asked, Origin.ASKED)


@pytest.mark.parametrize("key", ["reduce_dtype", "grad_accum_dtype"])
@pytest.mark.parametrize("strategy", [Strategy.DDP, *ZERO])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16_pure", "fp8"])
def test_fp16_sums_need_the_loss_scale_that_only_fp16_has(mode: str, strategy: Strategy, key: str) -> None:
    error = refused(mode, strategy, **{key: "fp16"})
    assert f"precision.{key}: fp16" in error.problem and "no loss scale" in error.problem


@pytest.mark.parametrize(
    ("mode", "asked", "allowed"),
    [
        ("bf16", None, True),
        ("bf16", "fp32", True),
        ("bf16", "bf16", False),
        ("bf16", "fp16", False),
        ("bf16_pure", "bf16", True),
        ("bf16_pure", "fp32", False),
        ("fp32", "bf16", False),
    ],
)
def test_one_process_sums_nothing_over_ranks(mode: str, asked: str | None, allowed: bool) -> None:
    if allowed:
        assert value("reduce_dtype", mode, reduce_dtype=asked) == ("bf16" if mode == "bf16_pure" else "fp32")
    else:
        assert f"reduce_dtype: {asked}" in refused(mode, reduce_dtype=asked).problem


@pytest.mark.parametrize(
    ("mode", "strategy", "asked", "allowed"),
    [
        *[("bf16", strategy, asked, True) for strategy in ZERO for asked in ("fp32", "bf16")],
        ("bf16", Strategy.SINGLE, "fp32", True),
        ("bf16", Strategy.SINGLE, "bf16", False),
        ("bf16", Strategy.DDP, "fp32", True),
        ("bf16", Strategy.DDP, "bf16", False),
        ("fp32", Strategy.DDP, "fp16", False),
        ("bf16_pure", Strategy.SINGLE, "bf16", True),
        ("bf16_pure", Strategy.SINGLE, "fp32", True),
        ("bf16_pure", Strategy.SINGLE, "fp16", False),
        ("bf16_pure", Strategy.DDP, "bf16", True),
        ("bf16_pure", Strategy.DDP, "fp32", False),
        ("bf16_pure", Strategy.ZERO1, "bf16", True),
        ("bf16_pure", Strategy.ZERO1, "fp32", False),  # DeepSpeed takes BF16_Optimizer there, with fp32 masters
        ("bf16_pure", Strategy.ZERO2, "fp32", True),
        ("bf16_pure", Strategy.ZERO3, "fp32", True),
    ],
)
def test_an_engine_accumulates_gradients_in_what_it_can(
    mode: str, strategy: Strategy, asked: str, allowed: bool
) -> None:
    if allowed:
        decision = formats(mode, strategy, grad_accum_dtype=asked)["grad_accum_dtype"]
        assert (decision.value, decision.origin) == (asked, Origin.ASKED)
    else:
        assert f"grad_accum_dtype: {asked}" in refused(mode, strategy, grad_accum_dtype=asked).problem


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_alone_would_sum_in_16_bits_and_the_reason_says_so(strategy: Strategy) -> None:
    decided = formats("bf16", strategy)
    for key in ("reduce_dtype", "grad_accum_dtype"):
        assert decided[key].origin is Origin.AUTO
        assert "DeepSpeed alone would in 16 bits" in decided[key].reason


# --- loss scaling


@pytest.mark.parametrize("strategy", [*PLAIN, *ZERO])
def test_only_fp16_scales_its_loss(strategy: Strategy) -> None:
    assert formats("fp16", strategy)["loss_scale"] == Decision(
        {
            "initial": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "min": None,
            "hysteresis": None,
        },
        Origin.AUTO,
        "dynamic: halved on an overflow, whose step is skipped; doubled after clean steps",
    )
    for mode in ("fp32", "tf32", "bf16", "bf16_pure", "fp8", "mxfp8"):
        assert value("loss_scale", mode, strategy) is None


def plan_of(machine: str, precision: Any, strategy: str = "auto", **keys: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "model": {"config": LLAMA},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 320},
            "data": {"source": "text.txt", "sequence_length": 64},
            "distributed": {"strategy": strategy},
            "precision": precision,
        }
        | keys
    )
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="a-plan", modules=llama_modules())


SCALE = {"initial": 1024.0, "growth_interval": 50, "min": 4.0, "hysteresis": 3}


@pytest.mark.parametrize(
    ("strategy", "processes"), [("single", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_floor_and_hysteresis_reach_both_engines(strategy: str, processes: int) -> None:
    plan = plan_of(f"{processes}xT4", {"mode": "fp16", "loss_scale": SCALE}, strategy)
    assert plan.value("loss_scale") == SCALE | {"growth_factor": 2.0, "backoff_factor": 0.5}
    assert plan.values["loss_scale"].origin is Origin.ASKED
    if plan.deepspeed is not None:
        block = plan.deepspeed["fp16"]
        assert (block["min_loss_scale"], block["hysteresis"]) == (4, 3)
        assert (block["initial_scale_power"], block["loss_scale_window"]) == (10, 50)


@pytest.mark.parametrize("scale", [{"growth_factor": 4.0}, {"backoff_factor": 0.25}, {"initial": 1000}, {"min": 0.5}])
def test_what_only_torchs_scaler_can_do_is_refused_by_deepspeed_alone(scale: dict[str, float]) -> None:
    plan = plan_of("2xT4", {"mode": "fp16", "loss_scale": scale}, "ddp")
    assert plan.value("loss_scale").items() >= scale.items()
    with pytest.raises(MptError, match=f"precision.loss_scale.{next(iter(scale))}"):
        plan_of("2xT4", {"mode": "fp16", "loss_scale": scale}, "zero2")


@pytest.mark.parametrize("machine", ["A100", "P100"])
def test_a_loss_scale_for_an_automatic_precision_that_is_not_fp16_is_refused(machine: str) -> None:
    with pytest.raises(MptError, match=r"precision\.loss_scale was given, and the precision is"):
        plan_of(machine, {"loss_scale": {"initial": 1024}})
    assert plan_of("T4", {"loss_scale": {"initial": 1024}}).value("loss_scale")["initial"] == 1024


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_a_static_scale_is_refused_above_the_height_at_which_the_first_gradient_overflows(tokens: int) -> None:
    limit = FP16_MAX * tokens
    for scale in (1.0, 65504.0, limit):
        check_static_scale({"static": scale}, tokens=tokens)
    for scale in (limit * (1 + 2**-50), limit * 2, 1e300):
        with pytest.raises(MptError, match=f"{tokens} tokens a step") as caught:
            check_static_scale({"static": scale}, tokens=tokens)
        assert "leave static out" in caught.value.remedy


@pytest.mark.parametrize("scale", [None, {"initial": 1e30, "growth_factor": 2.0}])
def test_a_dynamic_scale_finds_its_height_by_itself(scale: dict[str, float] | None) -> None:
    check_static_scale(scale, tokens=1)


def test_the_tokens_of_a_step_are_those_of_the_whole_batch() -> None:
    precision = {"mode": "fp16", "loss_scale": {"static": FP16_MAX * 64 * 2}}
    assert plan_of("T4", precision, global_batch_size=2).value("loss_scale") == precision["loss_scale"]
    with pytest.raises(MptError, match="with 64 tokens a step"):
        plan_of("T4", precision, global_batch_size=1)
