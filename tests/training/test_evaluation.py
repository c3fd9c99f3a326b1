"""What evaluations compute beside the loss."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState

from mpt.reporting.summary import summarise
from mpt.training.collation import IGNORED
from mpt.training.metrics import count_right, of_classes, of_numbers, share
from mpt.training.trainer import PlanTrainer
from tests.training.tiny_runs import BERT, Run, continue_from


def test_classes_are_judged_as_scikit_learn_does_with_the_average_that_fits_their_number() -> None:
    three = np.eye(3)[[0, 0, 1, 2, 2, 2]]  # what is said, as logits
    labels = np.array([0, 1, 1, 2, 2, 0])
    found = of_classes(["accuracy", "f1", "f1_macro", "f1_weighted", "precision", "recall", "matthews"], three, labels)
    # Class 0: 1 of 2 said right, 1 of 2 found; class 1: 1 of 1 and 1 of 2; class 2: 2 of 3 and 2 of 2.
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == found["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)
    assert found["precision"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert found["recall"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    two = of_classes(["f1", "matthews"], np.eye(2)[[1, 1, 0, 0]], np.array([1, 0, 0, 0]))
    assert two["f1"] == pytest.approx(2 / 3)
    assert two["matthews"] == pytest.approx(1 / math.sqrt(3))
    assert of_classes(["f1"], np.eye(3)[[0, 0]], np.array([0, 0]))["f1"] == pytest.approx(1 / 3)  # of three classes


def test_numbers_that_are_all_the_same_correlate_with_nothing() -> None:
    same = of_numbers(["pearson", "mse"], np.full((4, 1), 2.0), np.arange(4.0))
    assert math.isnan(same["pearson"]) and same["mse"] == pytest.approx(1.5)
    ordered = of_numbers(["spearman", "pearson"], np.array([[1.0], [10.0], [100.0]]), np.array([0.1, 0.2, 0.3]))
    assert ordered["spearman"] == pytest.approx(1.0) and ordered["pearson"] < 0.95


def test_of_the_tokens_that_are_asked_for_a_share_is_guessed_right() -> None:
    guessed = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), 9).float()
    next_ones = torch.tensor([[0, 1, 2, 0], [IGNORED, 5, IGNORED, IGNORED]])
    assert count_right(guessed, next_ones, shift=True).tolist() == [[2, 3], [1, 1]]
    in_place = torch.tensor([[1, IGNORED, 3, 0], [IGNORED] * 4])
    counts = count_right(guessed, in_place, shift=False)
    assert counts.tolist() == [[2, 3], [0, 0]]
    assert share(counts.numpy()) == pytest.approx(2 / 3)
    assert math.isnan(share(np.zeros((2, 2))))


@pytest.mark.slow
def test_a_language_model_is_told_its_perplexity_and_how_many_tokens_it_guesses(new_run: Callable[..., Run]) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "perplexity"}
    run = new_run(metrics=["perplexity", "token_accuracy"], training=every | best | {"report_to": "tensorboard"})
    assert run.train() == 0, run.log()
    word = run.last_word()
    assert word["metrics"]["perplexity"] == pytest.approx(math.exp(word["eval_loss"]))
    assert 0 < word["metrics"]["token_accuracy"] < 0.5
    rows = [json.loads(line) for line in run.directory.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_perplexity" in row][:2] == [4, 8]
    state = json.loads((run.directory.checkpoints / "checkpoint-8" / "trainer_state.json").read_text())
    seen = run.texts("evaluated", "metrics")
    assert state["best_metric"] == seen[1]["perplexity"] < seen[0]["perplexity"]  # less is better


@pytest.mark.slow
def test_a_run_without_a_gain_ends_early_and_counts_on_where_it_was_interrupted(new_run: Callable[..., Run]) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 20}
    run = new_run(early_stopping={"patience": 2, "threshold": 50.0}, training=every)
    assert run.train() == 0, run.log()
    word = run.last_word()
    assert (word["kind"], word["step"], max(run.steps)) == ("finished", 6, 6)
    assert word["stopped_early"] == {
        "metric": "loss",
        "best": run.texts("evaluated", "eval_loss")[2],  # a gain below the threshold is the best all the same
        "best_step": 6,
        "patience": 2,
    }
    assert summarise(run.directory)["stopped_early"]
    after_one = continue_from(run, "checkpoint-4", new_run)
    assert after_one.trajectory == run.trajectory
    at_the_end = continue_from(run, "checkpoint-6", new_run)
    for resumed in (after_one, at_the_end):
        assert resumed.last_word(2)["step"] == 6
        assert resumed.last_word(2)["stopped_early"] == word["stopped_early"]


@pytest.mark.slow
def test_a_run_that_gains_to_its_end_has_not_stopped_early(new_run: Callable[..., Run]) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    run = new_run(early_stopping={"patience": 1}, training=every)
    assert run.train() == 0, run.log()
    assert (run.last_word()["step"], run.last_word()["stopped_early"]) == (6, None)
    assert not summarise(run.directory)["stopped_early"]


def test_a_metric_that_is_no_number_is_never_the_best() -> None:
    trainer = PlanTrainer.__new__(PlanTrainer)
    trainer.state = TrainerState()
    trainer.args = SimpleNamespace(metric_for_best_model="pearson", greater_is_better=True, save_strategy="steps")
    for value, is_best in ((math.nan, False), (0.2, True), (math.nan, False), (0.1, False), (0.3, True)):
        assert trainer._determine_best_metric({"eval_pearson": value}, None) is is_best
    assert trainer.state.best_metric == 0.3


@pytest.mark.slow
def test_the_loss_is_the_mean_over_tokens_however_they_are_divided(new_run: Callable[..., Run], tmp_path: Path) -> None:
    texts = ["Yes.", "No.", topics["lambda"], "Perhaps.", topics["assert"], "Never.", "A b.", topics["del"], "Why?"]
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"packing": False, "eval_source": str(held_out)}

    def evaluated(batch: int, processes: int = 1, **changes: Any) -> float:
        training = {"max_steps": 1, "per_device_eval_batch_size": batch}
        if processes > 1:
            changes["distributed"] = {"processes_per_node": processes}
        run = new_run(data=data, global_batch_size=8, micro_batch_size=4, training=training, **changes)
        assert run.train(processes=processes) == 0, run.log()
        return float(run.last_word()["eval_loss"])

    one = evaluated(1)
    assert evaluated(9) == pytest.approx(one, abs=1e-5)
    # The last batches of two processes are filled up with samples that were evaluated by then.
    assert evaluated(2, processes=2) == pytest.approx(one, abs=1e-5)
    masked = {"task": "masked_lm", "model": {"config": BERT}}
    assert evaluated(2, **masked) == pytest.approx(evaluated(1, **masked), abs=1e-5)
