"""What a preflight finds: facts in, findings out, each with its severity and the line that mends it."""

from dataclasses import replace
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.checks import MEANINGS, DataFacts, Finding, Severity, check_findings, judge
from mpt.planning.checks.data_facts import Count, TokenizerFacts
from mpt.planning.checks.finding import in_order
from mpt.planning.checks.learning_rates import usual_rates
from mpt.planning.checks.of_plan import trainable
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.catalog import find_recipe, list_recipes
from mpt.recipe.load import load_recipe
from mpt.recipe.schema import Recipe
from mpt.recipe.sections.preflight import NEVER_ACCEPTED
from mpt.terms import Check, Method, Task

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
TINY: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 128}},
    "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
    "data": {"source": "a.txt", "sequence_length": 64},
    "training": {"learning_rate": 1e-3},
}  # fmt: skip
SFT = {"task": "sft", "model": "Qwen/Qwen2.5-0.5B", "data": "a.jsonl", "training": {"learning_rate": 2e-5}}
TOKENIZER = TokenizerFacts(size=512, eos_id=0, pad_id=0, unknown_id=None)
CLEAN = DataFacts(TOKENIZER, samples=100, tokens=6400, highest_token=511, overlap=Count(0, 10))


def plan_of(machine: str = "cpu", recipe: dict[str, Any] | None = None, **keys: Any) -> Plan:
    read = Recipe.model_validate((TINY if recipe is None else recipe) | keys)
    return resolve(read, parse_machine(machine), learn_model_facts(read), name="a")


def found(facts: DataFacts | None, plan: Plan | None = None) -> dict[Check, Finding]:
    findings = judge(plan_of() if plan is None else plan, facts)
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def test_clean_data_and_a_usual_plan_have_no_finding() -> None:
    assert judge(plan_of(), CLEAN) == ()


@pytest.mark.parametrize(
    ("changes", "code", "severity"),
    [
        ({"truncated": Count(1, 100), "lost_tokens": 9}, Check.TRUNCATED, NOTE),
        ({"truncated": Count(5, 100), "lost_tokens": 9}, Check.TRUNCATED, WARNING),
        ({"truncated": Count(1, 100), "lost_tokens": 6400}, Check.TRUNCATED, WARNING),
        ({"nothing_learnt": Count(1, 1000)}, Check.NOTHING_LEARNT, NOTE),
        ({"nothing_learnt": Count(1, 100)}, Check.NOTHING_LEARNT, WARNING),
        ({"nothing_learnt": Count(100, 100)}, Check.NOTHING_LEARNT, ERROR),
        ({"empty": Count(1, 100)}, Check.EMPTY_ROWS, NOTE),
        ({"empty": Count(5, 100)}, Check.EMPTY_ROWS, WARNING),
        ({"duplicates": Count(9, 100)}, Check.DUPLICATE_ROWS, NOTE),
        ({"duplicates": Count(10, 1000)}, Check.DUPLICATE_ROWS, WARNING),
        ({"duplicates": Count(10, 1001)}, Check.DUPLICATE_ROWS, NOTE),
        ({"unknown": Count(1, 6400)}, Check.UNKNOWN_TOKENS, NOTE),
        ({"unknown": Count(7, 6400)}, Check.UNKNOWN_TOKENS, WARNING),
        ({"unknown": Count(640, 6400)}, Check.UNKNOWN_TOKENS, ERROR),
        ({"highest_token": 512}, Check.VOCABULARY, ERROR),
        ({"tokenizer": replace(TOKENIZER, size=513)}, Check.VOCABULARY, WARNING),
        ({"tokenizer": replace(TOKENIZER, size=300)}, Check.VOCABULARY, NOTE),
        ({"tokenizer": replace(TOKENIZER, eos_id=None)}, Check.END_OF_TEXT, WARNING),
        ({"overlap": Count(1, 1000)}, Check.EVALUATION_OVERLAP, NOTE),
        ({"overlap": Count(1, 100)}, Check.EVALUATION_OVERLAP, WARNING),
        ({"overlap": Count(9, 10)}, Check.EVALUATION_OVERLAP, WARNING),
        ({"overlap": Count(10, 20)}, Check.EVALUATION_OVERLAP, ERROR),
    ],
)  # fmt: skip
def test_what_is_wrong_with_data_is_found_as_badly_as_it_is(
    changes: dict[str, Any], code: Check, severity: Severity
) -> None:
    finding = found(replace(CLEAN, **changes))[code]
    assert finding.severity is severity
    assert finding.problem and finding.remedy


def test_an_evaluation_that_the_recipe_names_is_worthless_at_any_size() -> None:
    named = plan_of(data={"source": "a.txt", "eval_source": "b.txt", "sequence_length": 64})
    assert found(replace(CLEAN, overlap=Count(1, 2)), named)[Check.EVALUATION_OVERLAP].severity is ERROR
    assert found(replace(CLEAN, overlap=Count(1, 3)), named)[Check.EVALUATION_OVERLAP].severity is WARNING


@pytest.mark.parametrize("count", [Count(0, 100), Count(0, 0)])
def test_nothing_is_said_of_nothing(count: Count) -> None:
    names = ("truncated", "nothing_learnt", "empty", "duplicates", "unknown", "overlap")
    assert judge(plan_of(), replace(CLEAN, **dict.fromkeys(names, count))) == ()


def test_the_line_that_mends_truncation_stays_within_the_models_positions() -> None:
    cut = replace(CLEAN, truncated=Count(50, 100, ("the longest has 900 tokens",)), lost_tokens=6400)
    finding = found(cut)[Check.TRUNCATED]
    assert dict(finding.recipe) == {"data.sequence_length": 128}
    assert "50 of 100 (50 %) samples" in finding.problem and "6400 of 12800 (50 %) tokens are lost" in finding.problem
    assert finding.evidence == ("the longest has 900 tokens",)
    full = plan_of(data={"source": "a.txt", "sequence_length": 128})
    assert dict(found(cut, full)[Check.TRUNCATED].recipe) == {}


def test_tokens_that_nobody_counted_are_not_said_to_be_none() -> None:
    finding = found(replace(CLEAN, truncated=Count(50, 100), lost_tokens=None))[Check.TRUNCATED]
    assert finding.severity is WARNING and finding.problem.endswith("are cut")


def test_a_padding_token_is_missed_only_where_samples_are_padded() -> None:
    without = replace(CLEAN, tokenizer=replace(TOKENIZER, pad_id=None))
    assert judge(plan_of(), without) == ()
    padded = plan_of(data={"source": "a.txt", "sequence_length": 64, "packing": False})
    facts = replace(without, padding={"now": 0.05, "none": 0.05, "grouped": 0.01, "best_fit": 0.01})
    assert found(facts, padded)[Check.PADDING_TOKEN].severity is NOTE


@pytest.mark.parametrize(
    ("now", "best_fit", "is_told"), [(0.4, 0.02, True), (0.19, 0.0, False), (0.25, 0.2, False), (0.2, 0.1, True)]
)
def test_padding_is_told_where_it_is_much_and_packing_would_leave_less(
    now: float, best_fit: float, is_told: bool
) -> None:
    facts = replace(CLEAN, padding={"now": now, "none": now, "grouped": now, "best_fit": best_fit})
    assert (Check.PADDING in found(facts)) is is_told


def test_conversations_without_a_template_are_told_which_one_they_get() -> None:
    facts = replace(CLEAN, tokenizer=replace(TOKENIZER, has_template=False, template="chatml", marks_answers=True))
    finding = found(facts, plan_of(recipe=SFT))[Check.CHAT_TEMPLATE]
    assert dict(finding.recipe) == {"data.chat_template": "chatml"}
    named = plan_of(recipe=SFT | {"data": {"source": "a.jsonl", "chat_template": "chatml"}})
    assert Check.CHAT_TEMPLATE not in found(facts, named)
    unmarked = replace(CLEAN, tokenizer=replace(TOKENIZER, has_template=True, marks_answers=False))
    assert list(found(unmarked, plan_of(recipe=SFT))) == [Check.ANSWERS_UNMARKED]


@pytest.mark.parametrize(
    ("recipe", "rate", "is_far"),
    [
        ("full", 2e-5, False), ("full", 2e-4, True), ("full", 1e-6, True), ("full", 0.0, True),
        ("lora", 2e-4, False), ("lora", 5e-5, False), ("lora", 2e-5, True), ("lora", 5e-3, True),
        ("scratch", 1e-3, False), ("scratch", 5e-5, True), ("scratch", 0.1, True),
    ],
)  # fmt: skip
def test_a_learning_rate_is_far_off_by_what_the_method_is_used_with(recipe: str, rate: float, is_far: bool) -> None:
    seven_b = {"task": "sft", "model": "meta-llama/Llama-2-7b-hf", "data": "a.jsonl"}
    recipes = {"full": seven_b, "lora": seven_b | {"lora": {}}, "scratch": TINY}
    plan = plan_of("8xH100", recipes[recipe], training={"learning_rate": rate})
    told = [finding for finding in judge(plan, None) if finding.code is Check.LEARNING_RATE]
    assert bool(told) is is_far
    if told:
        assert told[0].severity is WARNING
        advised = plan_of("8xH100", recipes[recipe], training=_training(told[0]))
        assert Check.LEARNING_RATE not in [finding.code for finding in judge(advised, None)]


def _training(finding: Finding) -> dict[str, Any]:
    return {key.removeprefix("training."): value for key, value in finding.recipe.items()}


def test_optimizers_with_rates_of_their_own_are_left_alone_and_lion_is_lower() -> None:
    assert usual_rates(Method.FULL, Task.SFT, 10**9, "sgd", is_from_scratch=False) is None
    adam = usual_rates(Method.LORA, Task.SFT, 10**9, "paged_adamw_8bit", is_from_scratch=False)
    lion = usual_rates(Method.LORA, Task.SFT, 10**9, "lion_8bit", is_from_scratch=False)
    assert adam is not None and lion is not None
    assert lion.first == adam.first / 5


@pytest.mark.parametrize("name", [entry.name for entry in list_recipes()])
def test_the_built_in_recipes_have_usual_rates_and_aligned_sizes(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    plan = resolve(recipe, parse_machine("8xH100"), learn_model_facts(recipe), name=name)
    assert not {Check.LEARNING_RATE, Check.POSITIONS} & {finding.code for finding in judge(plan, None)}


def test_sizes_and_small_passes_matter_only_to_devices_with_tensor_cores() -> None:
    odd = {"model": {"config": TINY["model"]["config"] | {"intermediate_size": 130}}}
    assert Check.DIMENSIONS not in found(None, plan_of("cpu", **odd))
    assert Check.DIMENSIONS not in found(None, plan_of("P100", **odd))
    on_gpu = found(None, plan_of("A100-80GB", **odd))
    assert dict(on_gpu[Check.DIMENSIONS].recipe) == {"model.config.intermediate_size": 136}
    assert on_gpu[Check.SMALL_PASS].severity is NOTE
    gpt2 = found(None, plan_of("A100-80GB", {"model": "gpt2", "data": "a.txt", "training": {"learning_rate": 5e-5}}))
    assert gpt2[Check.DIMENSIONS].severity is NOTE and "50257" in gpt2[Check.DIMENSIONS].problem


def test_a_default_length_that_the_model_shortens_is_told() -> None:
    assert found(None, plan_of(data="a.txt"))[Check.POSITIONS].severity is NOTE
    assert Check.POSITIONS not in found(None, plan_of(data={"source": "a.txt", "sequence_length": 128}))


def test_what_train_refuses_is_an_error() -> None:
    big = plan_of("T4", {"model": "meta-llama/Llama-2-7b-hf", "data": "a.txt", "distributed": {"strategy": "single"}})
    assert [finding.code for finding in trainable(big)] == [Check.DOES_NOT_FIT]
    assert [finding.severity for finding in trainable(big)] == [ERROR]


def test_an_error_stops_a_run_unless_the_recipe_accepts_it() -> None:
    spoilt = replace(CLEAN, overlap=Count(10, 10, ("some text",)), highest_token=999)
    with pytest.raises(MptError, match=r"vocabulary: .*evaluation_overlap: 10 of 10") as refused:
        check_findings(judge(plan_of(), spoilt))
    assert refused.value.exit_code == 2
    assert "preflight: {ignore: [vocabulary, evaluation_overlap]}" in refused.value.remedy
    accepting = plan_of(preflight={"ignore": ["vocabulary", "evaluation_overlap"]})
    findings = judge(accepting, spoilt)
    check_findings(findings)
    assert all(finding.is_accepted for finding in findings)


def test_the_worst_comes_first_and_what_is_accepted_last() -> None:
    kinds = [
        (Check.PADDING, NOTE),
        (Check.VOCABULARY, ERROR),
        (Check.TRUNCATED, WARNING),
        (Check.UNKNOWN_TOKENS, ERROR),
    ]
    ordered = in_order([Finding(code, how, "p", "r") for code, how in kinds], [Check.VOCABULARY])
    assert [finding.code for finding in ordered] == [
        Check.UNKNOWN_TOKENS, Check.TRUNCATED, Check.PADDING, Check.VOCABULARY,
    ]  # fmt: skip


def test_findings_and_facts_read_back_equal_those_written() -> None:
    facts = replace(CLEAN, truncated=Count(1, 2, ("a",)), padding={"now": 0.25}, limits=("the first 9",), overlap=None)
    assert DataFacts.from_json(facts.to_json()) == facts
    finding = Finding(Check.TRUNCATED, NOTE, "p", "r", ("e",), {"data.sequence_length": 8}, is_accepted=True)
    assert Finding.from_json(finding.to_json()) == finding


def test_every_code_has_its_meaning_and_those_without_a_run_can_not_be_accepted() -> None:
    assert set(MEANINGS) == set(Check)
    for code in NEVER_ACCEPTED:
        with pytest.raises(ValueError, match="no run can start"):
            Recipe.model_validate(TINY | {"preflight": {"ignore": [code.value]}})
