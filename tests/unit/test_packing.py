"""How documents become samples and batches, and how much of those is padding: decided from lengths and names alone."""

import random
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.best_fit import count_bins, pieces, placements
from mpt.planning.explain import explain_short
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.packing import choose_packing, choose_pad_multiple, choose_padding_free
from mpt.planning.padding import PaddingShares, describe, padding_shares
from mpt.planning.plan import Plan, resolve
from mpt.recipe.rules import broken_rules
from mpt.recipe.schema import Recipe
from mpt.terms import Packing, Precision, Task


def recipe(task: str = "causal_lm", model_type: str = "llama", **data: Any) -> Recipe:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    training = data.pop("training", {})
    return Recipe.model_validate(
        {
            "task": task,
            "model": {"config": {"model_type": model_type, **sizes}},
            "data": {"source": "builtin:python-reference", **data},
            "training": training,
        }
    )


# --- the decision


@pytest.mark.parametrize(
    ("task", "model_type", "data", "chosen"),
    [
        ("causal_lm", "llama", {}, "blocks"),
        ("causal_lm", "bloom", {}, "blocks"),
        ("causal_lm", "llama", {"packing": True}, "blocks"),
        ("causal_lm", "llama", {"packing": False}, "none"),
        ("causal_lm", "llama", {"packing": "best_fit"}, "best_fit"),
        ("causal_lm", "llama", {"training": {"train_sampling_strategy": "group_by_length"}}, "none"),
        ("sft", "llama", {}, "best_fit"),
        ("sft", "llama", {"packing": True}, "best_fit"),
        ("sft", "llama", {"packing": "none"}, "none"),
        ("sft", "bloom", {}, "none"),
        ("sft", "somebodys_own", {}, "none"),
        ("sft", "llama", {"training": {"train_sampling_strategy": "group_by_length"}}, "none"),
        ("sequence_classification", "bert", {}, "none"),
        ("masked_lm", "bert", {}, "blocks"),
        ("masked_lm", "bert", {"packing": True}, "blocks"),
    ],
)
def test_packing_follows_the_task_and_what_the_models_attention_can_keep_apart(
    task: str, model_type: str, data: dict[str, Any], chosen: str
) -> None:
    decision = choose_packing(recipe(task, model_type, **data), model_type, "sdpa")
    assert decision.value == chosen and decision.reason


def test_a_model_that_lets_documents_see_one_another_is_refused_or_not_packed() -> None:
    with pytest.raises(MptError, match="gpt_oss is not known to keep documents apart with eager") as caught:
        choose_packing(recipe("sft", packing="best_fit"), "gpt_oss", "eager")
    assert "flash_attention_2" in caught.value.problem and "packing: none" in caught.value.remedy
    fallen_back = choose_packing(recipe("sft"), "gpt_oss", "eager")
    assert fallen_back.value == "none" and "gpt_oss" in fallen_back.reason
    assert choose_packing(recipe("sft"), "gpt_oss", "flash_attention_2").value == "best_fit"


@pytest.mark.parametrize(
    ("task", "packing", "attention", "model_type", "chosen"),
    [
        ("sft", "best_fit", "flash_attention_2", "llama", True),
        ("sft", "none", "flash_attention_3", "llama", True),
        ("causal_lm", "none", "kernels-community/flash-attn2", "llama", True),
        ("causal_lm", "blocks", "flash_attention_2", "llama", False),
        ("sft", "best_fit", "sdpa", "llama", False),
        ("sft", "none", "flash_attention_2", "falcon", False),
        ("sequence_classification", "none", "flash_attention_2", "llama", False),
    ],
)
def test_flash_attention_needs_no_padding(
    task: str, packing: str, attention: str, model_type: str, chosen: bool
) -> None:
    decision = choose_padding_free(Task(task), Packing(packing), attention, model_type)
    assert decision.value is chosen and decision.reason


@pytest.mark.parametrize(
    ("asked", "packing", "precision", "machine", "padding_free", "chosen"),
    [
        (None, "none", "bf16", "A100-80GB", False, 8),
        (None, "best_fit", "fp16", "T4", False, 8),
        (None, "none", "fp8", "H100", False, 16),
        (None, "none", "fp8", "H100", True, 16),
        (None, "none", "bf16", "H100", True, 1),
        (None, "none", "fp32", "H100", False, 1),
        (None, "none", "bf16", "cpu", False, 1),
        (None, "blocks", "bf16", "H100", False, 1),
        (64, "none", "bf16", "cpu", False, 64),
    ],
)
def test_batches_are_padded_to_what_the_matrix_units_take(
    asked: int | None, packing: str, precision: str, machine: str, padding_free: bool, chosen: int
) -> None:
    where = parse_machine(machine)
    decision = choose_pad_multiple(asked, Packing(packing), Precision(precision), where, padding_free=padding_free)
    assert decision.value == chosen and decision.reason


def test_the_plan_holds_all_three_and_reads_them_back() -> None:
    asked = recipe(packing="best_fit", pad_to_multiple_of=4)
    plan = resolve(asked, parse_machine("cpu"), learn_model_facts(asked), name="packed")
    assert [plan.value(key) for key in ("packing", "padding_free", "pad_to_multiple_of")] == ["best_fit", False, 4]
    assert Plan.from_json(plan.to_json()).values == plan.values
    on_gpu = resolve(
        asked, parse_machine("A100-80GB"), learn_model_facts(asked), name="packed", packages=frozenset({"flash-attn"})
    )
    assert (on_gpu.value("attention"), on_gpu.value("padding_free")) == ("flash_attention_2", True)
    assert dict(explain_short(on_gpu))["packing"] == "best_fit: the recipe asks for it, and no padding"
    assert "packing" not in dict(explain_short(resolve(recipe(), plan.machine, plan.facts, name="blocks")))


@pytest.mark.parametrize(
    ("task", "data", "key"),
    [
        ("sft", {"packing": "blocks"}, "packing"),
        ("masked_lm", {"packing": "best_fit"}, "packing"),
        ("sequence_classification", {"packing": "best_fit"}, "packing"),
        ("causal_lm", {"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ("causal_lm", {"packing": "best_fit", "training": {"use_cache": True}}, "use_cache"),
        ("sft", {"training": {"use_cache": True}}, "use_cache"),
        (
            "causal_lm",
            {"packing": "best_fit", "training": {"train_sampling_strategy": "group_by_length"}},
            "train_sampling_strategy",
        ),
    ],
)
def test_what_contradicts_or_has_no_effect_is_refused(task: str, data: dict[str, Any], key: str) -> None:
    flaws = [flaw for flaw in broken_rules(recipe(task, **data)) if flaw.path[-1] == key]
    assert len(flaws) == 1 and flaws[0].suggestion


# --- best-fit decreasing


def one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as its definition has it: the room left in each bin."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in left if room >= length]
        if fitting:
            left[left.index(min(fitting))] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


def placed(counts: dict[int, int], capacity: int) -> list[int]:
    left: list[int] = []
    for size, space, per_bin, bins in placements(counts, capacity):
        for _ in range(bins):
            if space is not None:
                left.remove(space)
            left.append((capacity if space is None else space) - size * per_bin)
    return sorted(left)


@pytest.mark.parametrize("seed", range(40))
def test_placing_whole_stretches_is_best_fit_decreasing(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([4, 16, 33, 100])
    lengths = [rng.randint(2, capacity) for _ in range(rng.randint(1, 120))]
    counts = {length: lengths.count(length) for length in lengths}
    assert placed(counts, capacity) == one_at_a_time(lengths, capacity)


@pytest.mark.parametrize(
    ("counts", "bins"),
    [({}, 0), ({1: 5}, 0), ({8: 3}, 3), ({4: 3}, 2), ({9: 1}, 1), ({10: 1}, 2), ({16: 2}, 4), ({3: 1, 5: 1}, 1)],
)
def test_documents_longer_than_a_bin_are_cut_and_lone_tokens_left_out(counts: dict[int, int], bins: int) -> None:
    assert count_bins(counts, 8) == bins
    assert all(2 <= size <= 8 for size in pieces(counts, 8))


# --- padding


def simulated(lengths: list[int], size: int, *, grouped: bool) -> float:
    rng = random.Random(0)
    rows = padding = 0
    for _ in range(200):
        order = rng.sample(lengths, len(lengths))
        if grouped:
            stretches = [order[at : at + 50 * size] for at in range(0, len(order), 50 * size)]
            order = [length for stretch in stretches for length in sorted(stretch, reverse=True)]
        batches = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
        rows += sum(max(batch) * len(batch) for batch in batches)
        padding += sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    return padding / rows


def test_the_shares_of_padding_are_those_of_real_batches() -> None:
    rng = random.Random(1)
    lengths = [min(256, 2 + int(rng.lognormvariate(4, 0.8))) for _ in range(800)]
    counts = {length: lengths.count(length) for length in lengths}
    shares = padding_shares(counts, sequence_length=256, micro_batch_size=8)
    # Expectations, held against 200 shuffled epochs; the stretches of a grouped epoch are drawn, not quantiles.
    assert shares.none == pytest.approx(simulated(lengths, 8, grouped=False), abs=0.01)
    assert shares.grouped == pytest.approx(simulated(lengths, 8, grouped=True), abs=0.02)
    assert shares.best_fit < shares.grouped < shares.none


@pytest.mark.parametrize(
    ("counts", "multiple", "none", "best_fit"),
    [
        ({}, 1, 0.0, 0.0),
        ({1: 9}, 1, 0.0, 0.0),
        ({10: 4}, 1, 0.0, 0.0),
        ({10: 4}, 8, 1 - 10 / 16, 0.0),
        ({100: 2}, 8, 0.0, 0.0),
        ({6: 3}, 1, 0.0, 1 - 6 / 10),
    ],
)
def test_shares_at_their_edges(counts: dict[int, int], multiple: int, none: float, best_fit: float) -> None:
    length = 40 if multiple == 8 else 10
    shares = padding_shares(counts, sequence_length=length, micro_batch_size=2, multiple=multiple)
    assert shares.none == pytest.approx(none)
    assert shares.best_fit == pytest.approx(best_fit)


def test_what_is_told_names_the_ways_that_are_open() -> None:
    shares = PaddingShares(none=0.31, grouped=0.04, best_fit=0.02)
    cases: dict[str, dict[str, Any]] = {
        "padding is 31 % of the positions; packing: best_fit would leave 2 %, "
        "train_sampling_strategy: group_by_length 4 %": {"packing": "none"},
        "padding is 4 % of the positions; packing: best_fit would leave 2 %": {"packing": "none", "is_grouped": True},
        "padding is 31 % of the positions; train_sampling_strategy: group_by_length would leave 4 %": {
            "packing": "none",
            "can_pack": False,
        },
        "padding is 4 % of the positions": {"packing": "none", "is_grouped": True, "can_pack": False},
        "padding is 2 % of the positions; a document a row would have 31 %, grouped by length 4 %": {
            "packing": "best_fit"
        },
        "no padding: documents lie side by side; in rows it would be 31 % of the positions": {
            "packing": "best_fit",
            "padding_free": True,
        },
    }
    for text, case in cases.items():
        assert describe(shares, **({"is_grouped": False, "padding_free": False} | case)) == text
