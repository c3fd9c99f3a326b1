"""Classifiers: a BERT, pretrained and fine-tuned on a real labelled set; decoders, pairs, regression, adapters."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests.training.docstrings import PACKAGES, write_docstrings
from tests.training.tiny_runs import BERT, LLAMA, Run, continue_from, save_base

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]
CLASSIFY: dict[str, Any] = {"task": "sequence_classification", "model": {"config": BERT}, "micro_batch_size": 16}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_docstrings(tmp_path_factory.mktemp("docstrings") / "docstrings.jsonl"))


def classify(new_run: MakeRun, source: str, *, steps: int = 4, **changes: Any) -> Run:
    data = {"source": source, "label_column": "module", "sequence_length": 64, **changes.pop("data", {})}
    training = {"max_steps": steps, "save_steps": steps, **changes.pop("training", {})}
    run = new_run(**{**CLASSIFY, "data": data, "training": training, **changes})
    assert run.train(processes=changes.get("distributed", {}).get("processes_per_node", 1)) == 0, run.log()
    assert run.texts("audit", "passed") == [True]
    return run


@pytest.fixture(scope="module")
def pretrained(rows: str, new_run: MakeRun) -> Run:
    """A BERT that has learnt from the texts alone."""
    run = new_run(
        task="masked_lm",
        model={"config": BERT},
        tokenizer={"train": "byte_level_bpe", "vocab_size": 1024},
        data={"source": rows},
        micro_batch_size=16,
        training={"max_steps": 60, "save_steps": 60},
    )
    assert run.train() == 0, run.log()
    return run


@pytest.fixture(scope="module")
def fine_tuned(rows: str, pretrained: Run, new_run: MakeRun) -> Run:
    training = {"warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 100, "save_steps": 100}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    model = str(pretrained.directory.final)
    data = {"eval_fraction": 0.2}
    return classify(new_run, rows, steps=200, model=model, tokenizer=None, data=data, training=training | best)


def test_a_pretrained_bert_learns_which_package_a_docstring_is_from(fine_tuned: Run) -> None:
    word = fine_tuned.last_word()
    told = next(text for text in fine_tuned.texts("notice", "text") if "classes" in text)
    assert told.startswith(f"4 classes: {', '.join(PACKAGES)}; 29% of the ")  # a model that always says the same
    assert word["metrics"]["accuracy"] > 0.6
    assert 0 < word["metrics"]["f1"] < 1
    assert fine_tuned.texts("evaluated", "metrics")[-1] == word["metrics"]


def test_evaluations_stand_in_the_metrics_and_the_best_checkpoint_is_the_one_with_the_best_of_them(
    fine_tuned: Run,
) -> None:
    lines = [json.loads(line) for line in fine_tuned.directory.metrics.read_text().splitlines()]
    *during, at_the_end = [row for row in lines if "eval_accuracy" in row]
    evaluated = {row["step"]: row["eval_accuracy"] for row in during}
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    state = json.loads((fine_tuned.directory.checkpoints / "checkpoint-200" / "trainer_state.json").read_text())
    assert state["best_metric"] == evaluated[best]
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    assert (at_the_end["best_step"], at_the_end["eval_accuracy"]) == (best, evaluated[best])


def test_the_final_model_names_its_classes_and_works_in_a_pipeline(fine_tuned: Run) -> None:
    final = str(fine_tuned.directory.final)
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert list(model.config.id2label.values()) == list(PACKAGES)
    said = pipeline("text-classification", model=final, tokenizer=final)("Return the running event loop.")
    assert said[0]["label"] == "asyncio"


def test_a_classifier_goes_on_as_one_never_interrupted(fine_tuned: Run, new_run: MakeRun, rows: str) -> None:
    short = classify(new_run, rows, steps=6, training={"save_steps": 3})
    resumed = continue_from(short, "checkpoint-3", new_run)
    assert resumed.trajectory == short.trajectory
    assert resumed.last_word(2)["metrics"] == short.last_word()["metrics"]


def test_a_classifier_with_other_classes_than_its_data_is_refused(
    fine_tuned: Run, rows: str, new_run: MakeRun, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    lines = Path(rows).read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(line for line in lines if '"logging"' not in line), encoding="utf-8")
    run = new_run(
        **CLASSIFY | {"model": str(fine_tuned.directory.final), "tokenizer": None},
        data={"source": str(few), "label_column": "module"},
        training={"max_steps": 2},
    )
    assert run.train() == 2, run.log()
    assert "4 classes" in run.last_word()["problem"] and "3" in run.last_word()["problem"]


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure", {"mode": "fp16", "loss_scale": {"initial": 1024.0}}])
def test_regression_learns_numbers_in_every_precision(precision: Any, new_run: MakeRun, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    pairs = [(f"case {case}: {'very ' * count}good", count / 4) for case in range(8) for count in range(12)]
    source.write_text("text,score\n" + "".join(f"{text},{score}\n" for text, score in pairs))
    data = {"label_column": "score", "labels": "regression", "eval_fraction": 0.25}
    run = classify(new_run, str(source), steps=20, data=data, precision=precision)
    losses = [row["loss"] for row in run.steps.values()]
    assert losses[-1] < losses[0]
    assert set(run.last_word()["metrics"]) == {"pearson", "spearman"}
    model = AutoModelForSequenceClassification.from_pretrained(run.directory.final)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_decoder_judges_by_its_last_token_whatever_pads_the_batch(new_run: MakeRun, rows: str) -> None:
    run = classify(new_run, rows, model={"config": LLAMA})
    model = AutoModelForSequenceClassification.from_pretrained(run.directory.final)
    tokenizer = AutoTokenizer.from_pretrained(run.directory.final)
    texts = ["Return the running event loop.", "Log."]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    alone = tokenizer(texts[1:], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits[1], model(**alone).logits[0], atol=1e-5)


def test_adapters_take_the_head_along(new_run: MakeRun, rows: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    run = classify(new_run, rows, model=base, tokenizer=None, lora={"rank": 4})
    weights = load_file(run.directory.final / "adapter_model.safetensors")
    assert any("score" in name for name in weights)
    assert any("lora_A" in name for name in weights)


def test_pairs_are_told_apart_and_two_processes_train_what_one_does(new_run: MakeRun, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    words = ["red", "green", "blue", "grey"]
    cases = [(case, x, y) for case in range(4) for x in words for y in words]
    lines = [{"a": f"{case} is {x}", "b": f"it is {y}", "same": x == y} for case, x, y in cases]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    keys = {"text_column": "a", "text_pair_column": "b", "label_column": "same", "eval_fraction": 0.25}
    one, two, parts = (
        classify(
            new_run,
            str(source),
            data=keys,
            model={"config": BERT | still},
            micro_batch_size=8 // processes // passes,
            gradient_accumulation_steps=passes,
            distributed={"processes_per_node": processes},
        )
        for processes, passes in ((1, 1), (2, 1), (1, 4))
    )
    assert one.last_word()["metrics"].keys() == {"accuracy", "f1"}
    for other in (two, parts):
        for step, row in one.steps.items():
            # The Trainer would take these losses, which are means, for sums over the global batch.
            assert other.steps[step]["loss"] == pytest.approx(row["loss"], rel=1e-4)
            assert other.steps[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    assert math.isclose(two.last_word()["eval_loss"], one.last_word()["eval_loss"], rel_tol=1e-3)
