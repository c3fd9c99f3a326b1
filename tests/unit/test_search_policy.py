"""Which precision each layer gets from what was measured, and how the recipe says it. No model, no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.specs import parse_machine
from mpt.measuring.layer_cost import reckon_costs
from mpt.measuring.precision_block import replace_block, to_patterns, to_section, to_yaml, with_section
from mpt.measuring.precision_policy import (
    CHANNEL_FLOOR_DB,
    ENERGY_FLOOR_DB,
    UNDERFLOW_CEILING,
    Evidence,
    LayerEvidence,
    Measured,
    Policy,
    choose_policy,
    raise_worst,
)
from mpt.measuring.search_precision import (
    Subject,
    Verified,
    barred_layers,
    check_packages,
    check_recipe,
    check_wish,
    choose_candidates,
    settle,
    to_evidence,
)
from mpt.planning.layers import choose_layers
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import ModuleShape
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import PrecisionSection, Recipe
from mpt.terms import Precision
from tests.unit.module_lists import LLAMA, gpt2_modules, linear, llama_modules

ALL = ("fp8", "bf16", "fp32")
COSTS = {"fp32": 8.0, "bf16": 2.0, "fp8": 1.0}
PACKAGES = frozenset({"torch", "transformers", "accelerate", "datasets", "torchao"})


HEALTHY = {"output": 30.0, "input_gradient": 25.0, "weight_gradient": 26.0}
CHANNELS = {"output": 21.0, "input_gradient": 22.0, "weight_gradient": 23.0}


def measured(*changes: float, gradient: float = 25.0) -> Measured:
    return Measured(HEALTHY | {"input_gradient": gradient, "weight_gradient": gradient + 1}, CHANNELS, changes, {})


def layer(name: str, bf16: float, fp8: float, costs: Mapping[str, float] = COSTS) -> LayerEvidence:
    """A layer that moves the loss by so much in either format, in every batch."""
    return LayerEvidence(name, {"bf16": measured(bf16, gradient=50), "fp8": measured(fp8)}, costs, {})


def choose(*layers: LayerEvidence, tolerance: float = 0.01, candidates: tuple[str, ...] = ALL) -> Policy:
    """Choose with a reference loss of 1, so that the tolerance is the budget."""
    return choose_policy(Evidence(1.0, layers), tolerance, candidates)


@pytest.mark.parametrize(
    ("fp8", "tolerance", "expected"),
    [
        (0.001, 0.01, "fp8"),
        (0.01, 0.01, "fp8"),  # the boundary belongs to the budget
        (0.0101, 0.01, "bf16"),
        (0.5, 0.00009, "fp32"),
        (0.0, 1e-12, "fp32"),  # fp8 moves nothing here, and its gradients are under the floor
        (math.nan, 1.0, "bf16"),
        (math.inf, 1.0, "bf16"),
    ],
)
def test_a_layer_gets_the_lowest_format_within_the_tolerance(fp8: float, tolerance: float, expected: str) -> None:
    gradient = 25.0 if fp8 else ENERGY_FLOOR_DB - 0.1
    one = LayerEvidence("a", {"bf16": measured(1e-4), "fp8": measured(fp8, gradient=gradient)}, COSTS, {})
    policy = choose(one, tolerance=tolerance)
    assert policy.assignment == {"a": expected}
    assert policy.is_within


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [(ENERGY_FLOOR_DB, "fp8"), (ENERGY_FLOOR_DB - 0.01, "bf16"), (-math.inf, "bf16"), (math.inf, "fp8")],
)
def test_gradients_under_the_floor_keep_a_layer_up_however_little_the_loss_moves(
    gradient: float, expected: str
) -> None:
    one = LayerEvidence("a", {"bf16": measured(0.0), "fp8": measured(0.0, gradient=gradient)}, COSTS, {})
    assert choose(one).assignment == {"a": expected}


def test_signs_that_cancel_between_batches_count_all_the_same() -> None:
    one = LayerEvidence("a", {"bf16": measured(0.0), "fp8": measured(0.02, -0.02)}, COSTS, {})
    assert choose(one).assignment == {"a": "bf16"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"energy_db": dict.fromkeys(HEALTHY, ENERGY_FLOOR_DB)}, None),
        ({"channel_db": dict.fromkeys(HEALTHY, CHANNEL_FLOOR_DB)}, None),
        ({"underflow": {"input": UNDERFLOW_CEILING, "weight": 0.0}}, None),
        ({"energy_db": dict.fromkeys(HEALTHY, math.inf), "channel_db": {}}, None),
        ({"energy_db": HEALTHY | {"output": 19.6}}, "output at 19.6 dB, under the floor of 20"),
        ({"energy_db": HEALTHY | {"weight_gradient": 19.9}}, "weight gradient at 19.9 dB, under the floor of 20"),
        (
            {"channel_db": CHANNELS | {"weight_gradient": 5.8}},
            "a tenth of the channels of the weight gradient at 5.8 dB or less, under the floor of 15",
        ),
        ({"underflow": {"input": 0.54, "weight": 0.0}}, "54% of the input becomes 0, and 5% may"),
        ({"energy_db": HEALTHY | {"output": -math.inf}}, "its result is not finite"),
        ({"loss_changes": ()}, "its result is not finite"),
        ({"energy_db": {"output": 30.0, "input_gradient": 25.0}}, None),  # frozen weights have no gradient
    ],
)
def test_a_layer_under_a_floor_stays_up_whatever_the_loss_does(changed: dict[str, object], reason: str | None) -> None:
    seen = replace(Measured(HEALTHY, CHANNELS, (0.0,), {"input": 0.0007}), **changed)  # type: ignore[arg-type]
    assert seen.flaw() == reason
    policy = choose(LayerEvidence("a", {"bf16": measured(0.0), "fp8": seen}, COSTS, {}))
    assert policy.assignment == {"a": "bf16" if reason else "fp8"}
    assert policy.choices["a"].reason == (f"fp8: {reason}" if reason else "the lowest candidate")


def test_layers_add_as_squares_and_the_sensitive_ones_stay_up() -> None:
    layers = [layer(str(number), 0.0, 0.004) for number in range(6)]
    policy = choose(*layers, layer("worst", 0.0, 0.009))
    assert policy.assignment == {**dict.fromkeys("012345", "fp8"), "worst": "bf16"}
    assert policy.predicted == pytest.approx(0.004 * math.sqrt(6))
    assert policy.saved == pytest.approx(1 - (6 * 1 + 2) / (7 * 8))
    assert "more than is left of the tolerance" in policy.choices["worst"].reason


def test_where_only_one_may_fall_it_is_the_one_that_saves_more_for_the_same_error() -> None:
    large = {kind: 10 * cost for kind, cost in COSTS.items()}
    policy = choose(layer("small", 0.0, 0.008), layer("large", 0.0, 0.008, large))
    assert policy.assignment == {"small": "bf16", "large": "fp8"}


def test_a_format_that_is_no_faster_is_not_taken() -> None:
    policy = choose(layer("tiny", 0.0, 0.0, {"fp32": 1.0, "bf16": 1.0, "fp8": 1.5}))
    assert policy.assignment == {"tiny": "fp32"}
    assert policy.choices["tiny"].reason == "bf16: saves no time at this size"
    assert choose(layer("odd", 0.0, 0.0, {"fp32": 2.0, "bf16": 3.0, "fp8": 1.0})).assignment == {"odd": "fp8"}


def test_rules_hold_whatever_was_measured() -> None:
    policy = choose(replace(layer("lm_head", 0.0, 0.0), barred={"fp8": "the output head"}))
    assert policy.choices["lm_head"].precision == "bf16"
    assert policy.choices["lm_head"].reason == "fp8: the output head"


def test_a_layer_that_never_ran_stays_in_the_widest_format() -> None:
    policy = choose(LayerEvidence("expert", {}, COSTS, {}))
    assert policy.choices["expert"].precision == "fp32"
    assert "did not run" in policy.choices["expert"].reason


def test_without_fp32_the_widest_candidate_may_be_too_much_and_says_so() -> None:
    policy = choose(layer("a", 0.02, 0.03), candidates=("bf16", "fp8"))
    assert policy.assignment == {"a": "bf16"}
    assert not policy.is_within


def test_the_worst_layers_are_raised_first_and_no_further_than_needed() -> None:
    evidence = Evidence(1.0, (layer("a", 0.001, 0.006), layer("b", 0.001, 0.003), layer("c", 0.0, 0.002)))
    policy = choose_policy(evidence, 0.01, ALL)
    assert set(policy.assignment.values()) == {"fp8"}
    raised = raise_worst(evidence, policy, 0.6, ALL)
    assert raised is not None
    assert raised.assignment == {"a": "bf16", "b": "fp8", "c": "fp8"}
    everything = policy
    for _ in range(6):  # each layer has two steps up
        everything = raise_worst(evidence, everything, 1.0, ALL) or pytest.fail("nothing was raised")
    assert set(everything.assignment.values()) == {"fp32"}
    assert raise_worst(evidence, everything, 1.0, ALL) is None


@pytest.mark.parametrize(
    ("truth", "lowered", "failures"),
    [
        (lambda fp8: 0.0, 4, 0),
        (lambda fp8: -0.01, 4, 0),  # the boundary, and a loss that fell
        (lambda fp8: 0.011 if fp8 > 3 else 0.0, 3, 1),
        (lambda fp8: 0.02 if fp8 > 3 else 0.0, 1, 1),  # twice the budget: half of what was predicted
        (lambda fp8: math.nan if fp8 > 2 else 0.0, 0, 1),  # how far off, nobody knows: a quarter
        (lambda fp8: 1.0 if fp8 else 0.0, 0, 1),
    ],
)
def test_what_verification_refutes_is_raised_until_it_holds(
    truth: Callable[[int], float], lowered: int, failures: int
) -> None:
    evidence = Evidence(1.0, tuple(layer(name, 0.0, 0.004) for name in "abcd"))

    def verify(policy: Policy) -> Verified:
        return Verified((truth(list(policy.assignment.values()).count("fp8")),) * 2, 1.0, 30.0)

    def try_out(policy: Policy) -> tuple[float, ...]:
        return verify(policy).loss_changes

    chosen = choose_policy(evidence, 0.01, ALL)
    policy, verified, failed = settle(evidence, chosen, ALL, verify, try_out, lambda text: None)
    assert list(policy.assignment.values()).count("fp8") == lowered
    assert len(failed) == failures
    assert verified is not None
    assert verified.loss_change <= policy.budget


def settled(
    evidence: Evidence, truth: Mapping[str, tuple[float, ...]], candidates: tuple[str, ...] = ALL
) -> tuple[Policy, Verified | None, tuple[Verified, ...]]:
    """Settle where the layers in fp8 really change the batches' losses by `truth`, and add up."""

    def changes(policy: Policy) -> tuple[float, ...]:
        lowered = [truth[name] for name, kind in policy.assignment.items() if kind == "fp8"]
        return tuple(map(math.fsum, zip(*lowered, strict=True))) or (0.0,)

    def verify(policy: Policy) -> Verified:
        return Verified(changes(policy), 1.0, 30.0)

    return settle(evidence, choose_policy(evidence, 0.01, candidates), candidates, verify, changes, lambda text: None)


def test_what_is_verified_is_the_change_s_size_and_never_its_mean() -> None:
    evidence = Evidence(1.0, tuple(layer(name, 0.0, 0.004) for name in "ab"))
    policy, _, failed = settled(evidence, {"a": (0.03, -0.03), "b": (0.001, 0.001)})
    assert [one.loss_change for one in failed] == pytest.approx([0.03], rel=0.1)
    assert [one.mean_change for one in failed] == pytest.approx([0.001])
    assert policy.assignment == {"a": "bf16", "b": "fp8"}


@pytest.mark.parametrize("blamed", ["a", "j", "t"])
def test_the_one_layer_that_refutes_the_predictions_is_raised_alone(blamed: str) -> None:
    names = "abcdefghijklmnopqrst"
    evidence = Evidence(1.0, tuple(layer(name, 0.0, 0.0001 * number) for number, name in enumerate(names, start=1)))
    truth = dict.fromkeys(names, (0.0001, -0.0001)) | {blamed: (0.05, 0.03)}
    policy, verified, failed = settled(evidence, truth)
    assert {name for name, kind in policy.assignment.items() if kind != "fp8"} == {blamed}
    assert len(failed) == 1
    assert verified is not None
    assert policy.choices[blamed].reason == "fp8: the loss moved too far when verified, by 0.041 of this layer"


def test_a_loss_that_nothing_mends_ends_in_plain_fp32_or_in_an_error_without_it() -> None:
    evidence = Evidence(1.0, tuple(layer(name, 0.0, 0.001) for name in "abcdefgh"))

    def verify(policy: Policy) -> Verified:
        return Verified((0.5, 0.5), 0.9, 3.0)

    def settle_among(candidates: tuple[str, ...]) -> tuple[Policy, Verified | None, tuple[Verified, ...]]:
        chosen = choose_policy(evidence, 0.01, candidates)
        return settle(evidence, chosen, candidates, verify, lambda policy: (0.5, 0.5), lambda text: None)

    policy, verified, failed = settle_among(ALL)
    assert set(policy.assignment.values()) == {"fp32"}
    assert verified is None
    assert 1 < len(failed) <= 5
    with pytest.raises(MptError, match="every layer in bf16, the widest candidate, the loss moves by") as error:
        settle_among(("bf16", "fp8"))
    assert "Add fp32" in error.value.remedy


@pytest.mark.parametrize(
    ("seconds", "peaks", "costs", "sources"),
    [
        ({"fp32": 8.0, "bf16": 2.0, "fp8": 1.5}, {}, (8, 2, 1.5), ("measured", "measured", "measured")),
        ({"fp32": 8.0, "bf16": 2.0}, {"bf16": 100, "fp8": 400}, (8, 2, 0.5), ("measured", "measured", "table")),
        ({"fp32": 8.0, "bf16": 2.0}, {}, (8, 2, 1), ("measured", "measured", "assumed")),
        ({}, {"fp32": 50, "bf16": 500, "fp8": 1000}, (0.02, 0.002, 0.001), ("table", "table", "table")),
        ({}, {}, (1, 0.5, 0.25), ("assumed", "assumed", "assumed")),
    ],
)
def test_costs_are_measured_or_from_the_table_or_said_to_be_assumed(
    seconds: dict[str, float], peaks: dict[str, float], costs: tuple[float, ...], sources: tuple[str, ...]
) -> None:
    reckoned, origins = reckon_costs(1e12, seconds, peaks, ALL)
    assert tuple(reckoned.values()) == pytest.approx(costs)
    assert tuple(origins.values()) == sources


BLOCKS = llama_modules()
LINEAR = [module.name for module in BLOCKS if module.kind == "linear"]


def experts() -> tuple[ModuleShape, ...]:
    """Two layers of two experts, and a dense layer whose name ends alike."""
    found = [linear(f"model.layers.{block}.mlp.experts.{number}.up") for block in range(2) for number in range(2)]
    return (*found, linear("model.layers.2.mlp.up"), linear("up"))


@pytest.mark.parametrize(
    ("modules", "assignment", "expected"),
    [
        (BLOCKS, dict.fromkeys(LINEAR, "bf16"), {}),
        (
            BLOCKS,
            {name: "fp8" if "down_proj" in name else "bf16" for name in LINEAR},
            {"*.mlp.down_proj": "fp8"},
        ),
        (
            BLOCKS,
            {name: "fp8" if "down_proj" in name else "bf16" for name in LINEAR}
            | {"model.layers.1.mlp.down_proj": "fp32", "model.layers.0.mlp.up_proj": "fp8", "lm_head": "fp32"},
            {
                "*.mlp.down_proj": "fp8",
                "model.layers.0.mlp.up_proj": "fp8",
                "model.layers.1.mlp.down_proj": "fp32",
                "lm_head": "fp32",
            },
        ),
        (
            BLOCKS,
            dict.fromkeys(LINEAR, "fp8") | {"model.layers.2.mlp.up_proj": "bf16", "lm_head": "bf16"},
            None,
        ),
        (
            experts(),
            {module.name: "fp8" if "experts" in module.name else "fp32" for module in experts()},
            {"*.up": "fp8"} | {"model.layers.2.mlp.up": "fp32", "up": "fp32"},
        ),
        (gpt2_modules(), {module.name: "fp32" for module in gpt2_modules() if module.kind != "embedding"}, None),
    ],
)
def test_patterns_plan_to_the_very_assignment_that_they_were_made_of(
    modules: tuple[ModuleShape, ...], assignment: dict[str, str], expected: dict[str, str] | None
) -> None:
    multiplying = {module.name for module in modules if module.kind in ("linear", "conv1d")}
    assignment = {name: kind for name, kind in assignment.items() if name in multiplying}
    patterns = to_patterns(assignment, modules)
    if "up" in multiplying:  # `*.up` would mean the dense layer too
        expected = {"model.layers.*.mlp.experts.*.up": "fp8", "model.layers.2.mlp.up": "fp32", "up": "fp32"}
    if expected is not None:
        assert patterns == expected
    section = PrecisionSection(mode=Precision.BF16, layers=patterns or None, allow_emulation=True)
    planned = choose_layers(section, Precision.BF16, modules, machine=parse_machine("cpu"), fp8=None).value
    if patterns:
        assert planned is not None
        assert {entry["name"]: entry["precision"] for entry in planned["modules"]} == assignment
    else:
        assert set(assignment.values()) == {"bf16"}


def test_the_block_keeps_what_says_nothing_of_formats_and_fp8_s_own_keys_only_where_there_is_fp8() -> None:
    asked = PrecisionSection.model_validate(
        {"mode": "fp8", "allow_emulation": True, "reduce_dtype": "bf16", "layers": {"*.mlp": "fp8"}}
        | {"fp8": {"recipe": "rowwise", "keep_first": 4}}
    )
    kept = {"allow_emulation": True, "reduce_dtype": "bf16"}
    lowered = dict.fromkeys(LINEAR, "bf16") | {"model.layers.0.mlp.up_proj": "fp8"}
    assert to_section(lowered, BLOCKS, asked) == {
        "mode": "bf16", **kept, "fp8": {"recipe": "rowwise"}, "layers": {"model.layers.0.mlp.up_proj": "fp8"},
    }  # fmt: skip
    assert to_section(dict.fromkeys(LINEAR, "bf16"), BLOCKS, asked) == {"mode": "bf16", **kept}
    assert to_section(dict.fromkeys(LINEAR, "fp32"), BLOCKS, asked) == {"mode": "fp32", **kept}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: d\n", "data: d\n\nNEW\n"),
        ("data: d", "data: d\n\nNEW\n"),
        ("precision: bf16\ndata: d\n", "NEW\ndata: d\n"),
        ("data: d\nprecision: bf16", "data: d\nNEW\n"),
        (
            "# a\nprecision:  # old\n  mode: bf16\n\n  # of layers\n  layers: {a: fp32}\n\n# b\ndata: d\n",
            "# a\nNEW\n\n# b\ndata: d\n",
        ),
        ("precision: {mode: bf16,\n  layers: {a: fp32}}\ndata: d\n", "NEW\ndata: d\n"),
        ("data:\n  precision: 1\n", "data:\n  precision: 1\n\nNEW\n"),
    ],
)
def test_only_the_block_changes_in_a_recipe_s_text(text: str, expected: str) -> None:
    assert replace_block(text, "NEW\n") == expected


def subject(machine: str = "H100", packages: frozenset[str] = PACKAGES, **changes: object) -> Subject:
    config = LLAMA | {"hidden_size": 2048, "intermediate_size": 4096}
    recipe = Recipe.model_validate(
        {"model": {"config": config}, "tokenizer": {"train": "byte_level_bpe", "vocab_size": 320}}
        | {"data": {"source": "builtin:python-reference", "sequence_length": 128}}
        | changes
    )
    return Subject(
        name="test",
        recipe=recipe,
        facts=learn_model_facts(recipe),
        modules=llama_modules(config),
        target=parse_machine(machine),
        here=parse_machine("cpu"),
        is_named=True,
        packages=packages,
    )


@pytest.mark.parametrize(
    ("machine", "precision", "left", "says"),
    [
        ("H100", "bf16", ("fp32", "bf16", "fp8"), None),
        ("A100", "bf16", ("fp32", "bf16"), "fp8 is left out: "),
        ("A100", {"mode": "bf16", "allow_emulation": True}, ("fp32", "bf16", "fp8"), None),
        ("T4", {"mode": "bf16", "allow_emulation": True}, ("fp32", "bf16", "fp8"), None),
        ("T4", "auto", None, "nothing to search on .*T4"),
    ],
)
def test_unasked_the_candidates_are_what_the_machine_computes(
    machine: str, precision: object, left: tuple[str, ...] | None, says: str | None
) -> None:
    if left is None:
        with pytest.raises(UnsupportedError, match=says):
            choose_candidates(subject(machine, precision=precision), None)
        return
    taken, notes = choose_candidates(subject(machine, precision=precision), None)
    assert taken == left
    assert [note.startswith(says or "") for note in notes] == ([True] if says else [])


def test_an_asked_candidate_that_can_not_be_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match=r"candidate fp8: .* has no native fp8") as error:
        choose_candidates(subject("A100", precision="bf16"), ["fp8", "fp32"])
    assert error.value.remedy.endswith("Or leave fp8 out of --candidates.")
    with pytest.raises(UnsupportedError, match=r"candidate fp8: .* torchao, which is not installed"):
        choose_candidates(subject("H100", PACKAGES - {"torchao"}), ["fp8", "bf16"])


def test_layers_too_small_to_gain_stay_up_where_the_table_alone_speaks_and_the_recipe_s_own_rules_hold() -> None:
    on_h100 = barred_layers(subject("H100"), ("fp8",))
    assert set(on_h100) == {"lm_head"} | {name for name in LINEAR if name.endswith(("k_proj", "v_proj"))}
    assert "too small to gain" in on_h100["model.layers.0.self_attn.k_proj"]
    emulated = {"precision": {"mode": "bf16", "allow_emulation": True}}
    assert set(barred_layers(subject("A100", **emulated), ("fp8",))) == {"lm_head"}
    wished = {"precision": {"mode": "fp8", "fp8": {"keep_last": 1, "keep_high_precision": ["*.mlp.up_proj"]}}}
    kept = barred_layers(subject("A100", **wished), ("fp8",))
    assert {name for name in kept if "proj" in name} == {
        "model.layers.2.mlp.down_proj", *(f"model.layers.{block}.mlp.up_proj" for block in range(3)),
    }  # fmt: skip


def test_the_weight_gradient_of_frozen_weights_costs_nothing_and_is_not_judged() -> None:
    name = "model.layers.0.mlp.up_proj"
    seen = {"output": 30.0, "input_gradient": 25.0}
    entry = {"energy_db": seen, "channel_db": seen, "loss_changes": [0.0], "underflow": {}}
    answer = {"reference_loss": 1.0, "layers": {name: {"rows": 128, "formats": {"fp8": entry}, "seconds": {}}}}
    adapted = Recipe.model_validate({"model": "some/model", "data": "builtin:python-reference", "lora": {}})
    costs = []
    for searched in (subject(), replace(subject(), recipe=adapted)):
        evidence, _ = to_evidence(searched, ALL, {}, answer)
        found = next(layer for layer in evidence.layers if layer.name == name)
        assert found.reason_against("fp8") is None
        costs.append(found.costs["fp8"])
    assert costs[1] == pytest.approx(costs[0] * 2 / 3)


@pytest.mark.parametrize(
    ("candidates", "tolerance", "batches", "says"),
    [
        (["fp8", "int4"], 0.01, 8, "int4 can't be searched"),
        (["fp8"], 0.01, 8, "names one format"),
        (["fp8", "fp8"], 0.01, 8, "names one format"),
        ([], 0.01, 8, "names one format"),
        (None, 0.0, 8, "tolerance is 0"),
        (None, -1.0, 8, "tolerance is -1"),
        (None, math.nan, 8, "tolerance is nan"),
        (None, math.inf, 8, "tolerance is inf"),
        (None, 0.01, 0, "batches is 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    candidates: list[str] | None, tolerance: float, batches: int, says: str
) -> None:
    with pytest.raises(MptError, match=says):
        check_wish(candidates, tolerance, batches)


@pytest.mark.parametrize("mode", ["fp16", "bf16_pure", "mxfp8", "tf32"])
def test_modes_that_the_search_does_not_end_in_are_refused(mode: str) -> None:
    with pytest.raises(MptError, match=f"precision {mode} was asked for"):
        check_recipe(subject(precision=mode).recipe)


def test_quantised_weights_and_missing_packages_are_refused() -> None:
    wish = {"model": "some/model", "data": "builtin:python-reference", "lora": {}, "quantization": {}}
    with pytest.raises(MptError, match="quantises"):
        check_recipe(Recipe.model_validate(wish))
    with pytest.raises(UnsupportedError, match="datasets, torch is not installed"):
        check_packages(PACKAGES - {"torch", "datasets"})


def test_a_recipe_s_file_with_the_block_in_it_is_the_recipe_that_was_found(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# mine\nmodel: gpt2  # short\nprecision:\n  mode: fp8\ndata: builtin:python-reference\n")
    section = {"mode": "bf16", "layers": {"*.mlp.up_proj": "fp8", "lm_head": "fp32"}}
    found = with_section(load_recipe(path), section)
    path.write_text(replace_block(path.read_text(), to_yaml(section, ["evidence: 1 %"])))
    assert load_recipe(path) == found
    assert path.read_text().startswith("# mine\nmodel: gpt2  # short\n# evidence: 1 %\nprecision:\n  mode: bf16\n")
