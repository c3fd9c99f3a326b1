"""What a comparison of two precisions means: the verdict, what an earlier one is worth, and the plan compared with."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.measuring.compare import differing, identify, is_settled
from mpt.measuring.comparison import Comparison, Gradient, Side, judge, remedy_for, side_of, without_cosine
from mpt.measuring.comparison_text import write_out
from mpt.measuring.reference import plan_reference, trainable_count
from mpt.planning.layers import mixed_layers
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import CompareBoundsSection, Recipe
from mpt.running.journal import spell_non_finite
from mpt.terms import Precision

LOWEST = ({"name": "wte.weight", "cosine": 0.9, "share": 0.5},)
BF16 = Side("bf16", losses=(4.0, 3.06), skipped=(False, False), step_time_s=0.5, memory_gib=1.0)
FP32 = Side("fp32", losses=(4.0, 3.0), skipped=(False, False), step_time_s=1.0, memory_gib=2.0)
CLOSE = Comparison(2, BF16, FP32, Gradient(0.995, lowest=LOWEST, parameters=9, norms=(1.0, 1.1)), {})


def bounds(**keys: float) -> CompareBoundsSection:
    return CompareBoundsSection.model_validate(keys)


# --- the verdict


@pytest.mark.parametrize(
    ("require", "breaks"),
    [
        (None, 0),
        (bounds(), 0),
        (bounds(max_loss_gap=0.03), 0),
        (bounds(max_loss_gap=CLOSE.gaps[1]), 0),  # exactly the bound
        (bounds(max_loss_gap=0.0199), 1),
        (bounds(min_gradient_cosine=0.99), 0),
        (bounds(min_gradient_cosine=0.995), 0),
        (bounds(min_gradient_cosine=0.9951), 1),
        (bounds(min_gradient_cosine=1.0), 1),
        (bounds(max_loss_gap=0.001, min_gradient_cosine=0.999), 2),
    ],
)
def test_a_bound_is_broken_beyond_it_and_not_at_it(require: CompareBoundsSection | None, breaks: int) -> None:
    assert len(judge(CLOSE, require)) == breaks


def test_a_breach_names_the_bound_the_value_and_where() -> None:
    gap, cosine = judge(CLOSE, bounds(max_loss_gap=0.01, min_gradient_cosine=0.999))
    assert gap == "the losses of bf16 and fp32 differ by up to 0.02 (step 2), and compare.require.max_loss_gap is 0.01"
    assert "have cosine 0.995, and compare.require.min_gradient_cosine is 0.999 (lowest: wte.weight 0.9000)" in cosine


@pytest.mark.parametrize("diverging", ["candidate", "reference"])
def test_who_diverges_breaks_every_requirement_and_none_where_nothing_is_required(diverging: str) -> None:
    side = replace(getattr(CLOSE, diverging), diverged="loss was nan at step 3", losses=(4.0,))
    diverged = replace(CLOSE, **{diverging: side})
    assert judge(diverged, None) == ()
    (breach,) = judge(diverged, bounds())
    assert breach == f"{side.precision} diverged while it was compared: loss was nan at step 3"
    said = "diverges in the reference too" in remedy_for(diverged)
    assert said is (diverging == "reference")


def test_a_gap_that_is_no_number_or_infinite_breaks_the_bound() -> None:
    for loss in (float("nan"), float("inf")):
        assert judge(replace(CLOSE, candidate=replace(BF16, losses=(4.0, loss))), bounds(max_loss_gap=1e9))


def test_where_no_step_was_made_a_bound_is_not_kept() -> None:
    empty = replace(CLOSE, candidate=replace(BF16, losses=(), skipped=()))
    assert (empty.max_gap, empty.max_gap_step, empty.final_gap) == (None, None, None)
    assert judge(empty, bounds(max_loss_gap=0.5)) == ("no step was compared, and compare.require.max_loss_gap is 0.5",)
    assert without_cosine(empty.candidate, FP32) == "bf16 made no step"


def test_an_overflow_at_the_first_step_leaves_no_cosine_and_the_remedy_names_the_scale_that_held() -> None:
    fp16 = Side("fp16", (4.0, 4.0, 3.0), loss_scales=(2.0**27, 2.0**26, 2.0**25), skipped=(True, True, False))
    reason = without_cosine(fp16, FP32)
    assert reason == "the first step in fp16 overflowed at loss scale 134217728"
    overflowed = replace(CLOSE, candidate=fp16, gradient=Gradient(None, reason))
    (breach,) = judge(overflowed, bounds(min_gradient_cosine=0.9))
    assert f"have no cosine, because {reason}, and compare.require.min_gradient_cosine is 0.9" in breach
    assert "precision.loss_scale.initial to 33554432, where" in remedy_for(overflowed)
    assert without_cosine(FP32, fp16) == reason  # fp16 as the reference


def test_a_side_sums_up_the_metrics_and_leaves_the_warm_up_out_of_the_times() -> None:
    times = {1: 9.0, 2: 5.0, 3: 1.0, 4: 2.0}
    rows = {step: {"loss": 4.0 - step, "step_time_s": time, "memory_gib": step / 2} for step, time in times.items()}
    made = side_of("bf16", rows, None)
    assert (made.losses, made.step_time_s, made.memory_gib) == ((3.0, 2.0, 1.0, 0.0), 1.5, 2.0)
    assert side_of("bf16", {step: rows[step] for step in (1, 2)}, None).step_time_s is None


def test_ratios_and_gaps_follow_from_the_two_sides() -> None:
    assert CLOSE.step_time_ratio == 0.5
    assert replace(CLOSE, reference=replace(FP32, step_time_s=None)).step_time_ratio is None
    assert CLOSE.gaps == pytest.approx((0.0, 0.02))
    assert (CLOSE.max_gap_step, CLOSE.final_gap) == (2, CLOSE.gaps[1])


def test_a_comparison_read_back_is_the_one_written() -> None:
    text = json.dumps(spell_non_finite(CLOSE.to_json()), allow_nan=False)
    assert Comparison.from_json(json.loads(text)) == CLOSE


# --- the text


def test_the_table_has_every_step_of_a_few_and_the_worst_of_many() -> None:
    said = "\n".join(write_out(CLOSE, bounds(max_loss_gap=0.5)))
    assert "1     4.00000     4.00000   0.0e+00" in said
    assert "up to 0.02 (step 2), 0.02 at the end; required: at most 0.5" in said
    assert "cosine 0.995000 at the first step" in said
    assert "0.50 of fp32's (0.500 s against 1.000 s)" in said
    losses = tuple(2.0 if step != 137 else 2.5 for step in range(500))
    many = replace(CLOSE, candidate=replace(BF16, losses=losses), reference=replace(FP32, losses=(2.0,) * 500))
    shown = [int(line.split()[0]) for line in write_out(many, None) if line.split()[0].isdecimal()]
    assert {1, 138, 500} <= set(shown)
    assert len(shown) <= 21


def test_where_no_step_was_timed_the_text_says_why() -> None:
    short = replace(CLOSE, candidate=replace(BF16, step_time_s=None), reference=replace(FP32, step_time_s=None))
    assert "  step time    too few steps to time: the first 2 warm up" in write_out(short, None)


MIXED = (*({"name": f"layers.{n}.mlp", "precision": "fp8"} for n in range(6)), {"name": "lm_head", "precision": "fp32"})


def test_layers_in_another_precision_are_counted_in_the_title_and_named_below_it() -> None:
    mixed = replace(CLOSE, candidate=replace(BF16, layers=MIXED))
    title, *names = write_out(mixed, None)[:3]
    assert title == "bf16 (6 layers in fp8, 1 in fp32) compared with fp32, step by step:"
    assert names[0] == "  in fp8: layers.0.mlp, layers.1.mlp, layers.2.mlp, layers.3.mlp and 2 more"
    assert names[1] == "  in fp32: lm_head"
    assert "the losses of bf16 (6 layers in fp8, 1 in fp32) and fp32" in judge(mixed, bounds(max_loss_gap=1e-9))[0]
    text = json.dumps(mixed.to_json())
    assert Comparison.from_json(json.loads(text)) == mixed


@pytest.mark.parametrize(
    ("precision", "own", "mixed"),
    [
        ("bf16", "bf16", {}),
        ({"mode": "bf16", "layers": {"*.mlp.up_proj": "fp8", "lm_head": "fp32"}}, "bf16",
         {"model.layers.0.mlp.up_proj": "fp8", "model.layers.1.mlp.up_proj": "fp8", "lm_head": "fp32"}),
        ({"mode": "bf16_pure", "layers": {"model.norm": "fp32"}}, "bf16_pure", {"model.norm": "fp32"}),
        ({"mode": "fp8", "fp8": {"keep_last": 0, "auto_filter": False}}, "fp8",
         {"model.layers.0.self_attn.q_proj": "bf16", "lm_head": "bf16"}),
    ],
    ids=["none", "two formats", "bf16_pure", "fp8"],
)  # fmt: skip
def test_mixed_layers_are_those_that_do_not_compute_in_the_mode(
    precision: Any, own: str, mixed: dict[str, str]
) -> None:
    plan = plan_of("H100", precision=precision)
    assert plan.value("precision") == own
    assert mixed_layers(plan.value("layers"), Precision(own)) == mixed


# --- the plans

BF16_ANYWHERE = {"mode": "bf16", "allow_emulation": True}
TINY: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 128}},
    "data": {"source": "builtin:python-reference", "sequence_length": 64},
    "compare": {"to": "fp32"},
}  # fmt: skip
KEPT = (
    "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "world_size", "distributed.strategy",
    "offload", "gradient_checkpointing", "sequence_length", "learning_rate", "optimizer",
)  # fmt: skip


def plan_of(machine: str, packages: frozenset[str] | None = None, **keys: Any) -> Plan:
    recipe = Recipe.model_validate(TINY | keys)
    facts, modules = learn_model_facts(recipe), learn_modules(recipe)
    return resolve(recipe, parse_machine(machine), facts, name="a-plan", packages=packages, modules=modules)


def pair_of(machine: str, packages: frozenset[str] | None = None, **keys: Any) -> tuple[Plan, Plan]:
    plan = plan_of(machine, packages, **keys)
    reference = plan_reference(plan, packages)
    assert reference is not None
    return plan, reference


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("mode", ["bf16", "bf16_pure"])
def test_the_reference_is_the_same_run_in_another_precision(strategy: str, mode: str) -> None:
    plan, reference = pair_of("4xA100-80GB", precision=mode, distributed={"strategy": strategy})
    assert (plan.value("precision"), reference.value("precision")) == (mode, "fp32")
    assert {key: reference.value(key) for key in KEPT} == {key: plan.value(key) for key in KEPT}
    # The worker reads it from a file.
    assert Plan.from_json(json.loads(json.dumps(reference.to_json()))).values == reference.values


def test_what_a_plan_chose_by_its_memory_is_kept_though_the_reference_needs_more() -> None:
    plan, reference = pair_of("A100-80GB", model="gpt2-large", precision="bf16_pure", global_batch_size=64)
    assert reference.memory.peak_gib > plan.memory.peak_gib
    assert {key: reference.value(key) for key in KEPT} == {key: plan.value(key) for key in KEPT}


def test_islands_and_loss_scaling_are_the_candidates_alone() -> None:
    plan, reference = pair_of("T4", precision={"mode": "fp16", "loss_scale": {"initial": 1024}})
    assert plan.value("loss_scale")["initial"] == 1024
    assert reference.value("loss_scale") is None


def test_an_attention_that_only_computes_in_16_bits_is_replaced_and_told() -> None:
    plan, reference = pair_of("H100", frozenset({"flash-attn"}), attention="flash_attention_2", precision="bf16")
    assert reference.value("attention") != "flash_attention_2"
    assert differing(plan, reference)["attention"] == ("flash_attention_2", reference.value("attention"))


def test_a_run_in_the_reference_precision_differs_in_nothing() -> None:
    assert differing(*pair_of("cpu", precision="fp32")) == {}


def test_without_a_comparison_there_is_no_reference() -> None:
    assert plan_reference(plan_of("cpu", compare=None), None) is None


def test_a_reference_that_does_not_fit_is_refused_with_what_it_needs() -> None:
    plan = plan_of("A100-80GB", model="meta-llama/Llama-2-7b-hf", precision="bf16_pure", training={"adam_beta2": 0.95})
    assert plan.memory.fits
    with pytest.raises(
        MptError, match=r"compare.to is fp32, and the same recipe can't be trained in it here: .*GiB"
    ) as no:
        plan_reference(plan, None)
    assert no.value.exit_code == 3


def test_a_reference_that_the_machine_can_not_compute_is_refused() -> None:
    plan = plan_of("T4", precision="fp16", compare={"to": "bf16"})
    with pytest.raises(MptError, match=r"compare\.to is bf16") as no:
        plan_reference(plan, None)
    assert no.value.exit_code == 3


def test_gradients_are_counted_by_what_is_trained() -> None:
    full = plan_of("cpu", precision=BF16_ANYWHERE)
    assert trainable_count(full) == full.facts.parameters
    adapted = plan_of("A100-80GB", model="gpt2", precision="bf16", lora={"rank": 8})
    assert 0 < trainable_count(adapted) < adapted.facts.parameters / 20


# --- an earlier comparison


def told(plan: Plan, reference: Plan, **changes: Any) -> dict[str, Any]:
    return {**CLOSE.to_json(), "of": identify(plan, reference, 20), "passed": True} | changes


def test_an_earlier_comparison_holds_for_the_same_values_within_the_bounds_of_today() -> None:
    pair = pair_of("cpu", precision=BF16_ANYWHERE)
    identity = identify(*pair, 20)
    assert is_settled(told(*pair), identity, bounds(max_loss_gap=0.03))
    assert is_settled(told(*pair, passed=None), identity, None)
    assert not is_settled(told(*pair), identity, bounds(max_loss_gap=0.01))
    assert not is_settled(told(*pair, passed=False), identity, None)  # compared again, whatever it was judged by
    assert not is_settled(None, identity, None)
    assert not is_settled({"of": identity}, identity, None)  # of another version of mpt


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"name": "another"}, True),
        ({"restart": {"max_restarts": 9}}, True),
        ({"compare": {"to": "fp32", "require": {"max_loss_gap": 0.1}}}, True),
        ({"compare": {"to": "fp16"}}, False),
        ({"training": {"learning_rate": 1e-3}}, False),
        ({"training": {"seed": 7}}, False),
        ({"micro_batch_size": 3}, False),
        ({"data": {"source": "builtin:python-reference", "sequence_length": 32}}, False),
    ],
)
def test_a_comparison_is_of_the_values_that_its_numbers_follow_from(changes: dict[str, Any], is_same: bool) -> None:
    before, after = pair_of("cpu", precision=BF16_ANYWHERE), pair_of("cpu", **{"precision": BF16_ANYWHERE} | changes)
    assert (identify(*before, 20) == identify(*after, 20)) is is_same
    assert identify(*before, 20) != identify(*before, 21)
