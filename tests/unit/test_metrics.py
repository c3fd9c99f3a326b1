"""Metrics: which a task is judged by, and what they need."""

from typing import Any

import pytest

from mpt.errors import UnsupportedError
from mpt.planning.metrics import choose_early_stopping, choose_metrics
from mpt.planning.training_arguments import to_training_arguments
from mpt.recipe.rules import broken_rules
from mpt.recipe.schema import Recipe
from mpt.terms import Precision

CLASSIFIER = {"task": "sequence_classification", "model": "bert", "data": "rows.jsonl"}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": True}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"model": "gpt2", "data": "builtin:python-reference"} | changes)


def flaws(**changes: Any) -> list[tuple[str, str]]:
    return [(".".join(map(str, flaw.path)), flaw.problem) for flaw in broken_rules(recipe(**changes))]


@pytest.mark.parametrize(
    ("changes", "metrics"),
    [
        ({}, ["perplexity"]),
        ({"task": "sft"}, ["perplexity"]),
        ({"task": "masked_lm", "metrics": ["token_accuracy"]}, ["token_accuracy"]),
        (CLASSIFIER, ["accuracy", "f1"]),
        (CLASSIFIER | {"metrics": ["matthews", "matthews"]}, ["matthews"]),
        (CLASSIFIER | {"metrics": []}, []),
        (CLASSIFIER | {"data": {"source": "rows.jsonl", "labels": "regression"}}, ["pearson", "spearman"]),
    ],
)
def test_a_task_has_its_usual_metrics_unless_the_recipe_names_others(changes: Any, metrics: list[str]) -> None:
    assert choose_metrics(recipe(**changes), frozenset({"sklearn", "scipy"})).value == metrics


def test_a_metric_whose_package_is_missing_is_refused_with_the_line_that_installs_it() -> None:
    assert choose_metrics(recipe(), frozenset()).value == ["perplexity"]
    assert choose_metrics(recipe(**CLASSIFIER), None).value == ["accuracy", "f1"]  # a named machine: nobody knows
    with pytest.raises(UnsupportedError, match="accuracy, f1 need scikit-learn") as refused:
        choose_metrics(recipe(**CLASSIFIER), frozenset({"scipy"}))
    assert "pip install 'mpt[classification]'" in refused.value.remedy
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"metrics": ["accuracy"]}, "metrics.0", "accuracy does not judge causal_lm"),
        (CLASSIFIER | {"metrics": ["f1", "pearson"]}, "metrics.1", "pearson does not judge sequence_classification"),
        (
            CLASSIFIER | {"data": {"source": "rows.jsonl", "labels": "regression"}, "metrics": ["accuracy"]},
            "metrics.0",
            "accuracy does not judge regression",
        ),
        (
            CLASSIFIER | {"training": EVALUATES | {"metric_for_best_model": "eval_matthews"}},
            "training.metric_for_best_model",
            "eval_matthews is not among what is computed: loss, accuracy, f1",
        ),
        ({"data": {"source": "a.jsonl", "labels": "regression"}}, "data.labels", "is for task sequence_classification"),
        ({"data": {"source": "a.jsonl", "mask_probability": 0.2}}, "data.mask_probability", "is for task masked_lm"),
        (CLASSIFIER | {"data": "builtin:python-reference"}, "data.source", "has no labels"),
        (CLASSIFIER | {"data": {"source": ["a.jsonl", "b.txt"]}}, "data.source", "b.txt has no labels"),
        (CLASSIFIER | {"data": {"source": "a.jsonl", "label_column": "text"}}, "data.label_column", "three columns"),
        (
            CLASSIFIER | {"model": {"config": {"model_type": "bert", "num_labels": 1}}},
            "model.config.num_labels",
            "1 is for regression, and data.labels is classes",
        ),
        (
            CLASSIFIER | {"model": {"config": {"model_type": "bert", "num_labels": "two"}}},
            "model.config.num_labels",
            "is 'two'",
        ),
        (
            CLASSIFIER
            | {
                "model": {"config": {"model_type": "bert"}},
                "tokenizer": {"train": "byte_level_bpe", "vocab_size": 259},
            },
            "tokenizer.vocab_size",
            "259 has no room",
        ),
    ],
)
def test_what_does_not_fit_the_task_is_a_broken_rule(changes: Any, key: str, problem: str) -> None:
    found = dict(flaws(**changes))
    assert problem in found.get(key, ""), found


def test_the_best_checkpoint_may_go_by_any_metric_that_is_computed() -> None:
    for metric in ("loss", "eval_loss", "f1", "eval_accuracy"):
        assert flaws(**CLASSIFIER, training=EVALUATES | {"metric_for_best_model": metric}) == []
    assert flaws(training=EVALUATES | {"metric_for_best_model": "perplexity"}) == []


def test_early_stopping_goes_by_evaluations_and_by_the_loss_unless_told() -> None:
    assert dict(flaws(early_stopping={"patience": 2})) == {
        "early_stopping": "goes by evaluations, and training.eval_strategy is no"
    }
    asked = recipe(early_stopping={"patience": 2}, training=EVALUATES)
    assert broken_rules(asked) == []
    assert choose_early_stopping(asked).value == {"metric": "loss", "patience": 2, "threshold": 0.0}
    assert choose_early_stopping(recipe()).value is None


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("eval_perplexity", False), ("token_accuracy", True), (None, None)]
)
def test_which_way_is_better_follows_from_the_metric(metric: str | None, greater: bool | None) -> None:
    best = {} if metric is None else {"metric_for_best_model": metric}
    keywords = to_training_arguments(
        recipe(training=EVALUATES | best, metrics=["perplexity", "token_accuracy"]),
        precision=Precision.FP32,
        on_cpu=True,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
    )
    assert keywords.get("greater_is_better") is greater
