"""Runs on packed documents, and on batches grouped by length: what they learn, count, tell and resume."""

import json
from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpt.planning.plan import Plan
from mpt.recipe.schema import DistributedSection
from mpt.terms import Strategy
from mpt.training.collation import PaddedCollator
from mpt.training.packing import LENGTHS
from mpt.training.tasks import causal_lm
from mpt.training.tokenizer import read_tokenizer
from tests.training.tiny_runs import Run, continue_from

EVALUATED = {"max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Short documents: paragraphs of the language reference."""
    path = tmp_path_factory.mktemp("text") / "paragraphs.jsonl"
    texts = [part for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:900]))
    return str(path)


@pytest.fixture(scope="module")
def packed_run(new_run: Callable[..., Run], paragraphs: str) -> Run:
    data = {"source": paragraphs, "packing": "best_fit", "pad_to_multiple_of": 8}
    run = new_run(data=data, training=EVALUATED, micro_batch_size=4, global_batch_size=8)
    assert run.train() == 0, run.log()
    return run


def test_a_packed_run_learns_is_audited_and_tells_its_padding(packed_run: Run) -> None:
    run = packed_run
    losses = [row["loss"] for row in run.steps.values()]
    assert losses[-1] < losses[0] - 0.1
    assert run.audit()["documents apart"] < 1e-5
    assert run.audit()["global_batch_size"] == 8
    assert all(0.9 * 8 * 64 < row["tokens"] <= 8 * 64 for row in run.steps.values())
    assert len({row["tokens"] for row in run.steps.values()}) > 1  # of bins, which are not all full
    told = next(event for event in run.events if event["kind"] == "padding")
    assert told["shares"]["best_fit"] < 0.05 < told["shares"]["none"]
    notices = run.texts("notice", "text")
    assert any("a document a row would have" in text for text in notices)
    assert any("documents packed into" in text for text in notices)


def test_a_packed_run_is_resumed_bit_for_bit(packed_run: Run, new_run: Callable[..., Run]) -> None:
    resumed = continue_from(packed_run, "checkpoint-3", new_run)
    assert {step: row for step, row in packed_run.trajectory.items() if step > 3} == {
        step: row for step, row in resumed.trajectory.items() if step > 3
    }


def test_held_out_documents_are_evaluated_apart_too(packed_run: Run, new_run: Callable[..., Run]) -> None:
    """The loss of the final weights over the held-out tokens, document by document, is what the run came to."""
    plan = Plan.from_json(json.loads(packed_run.directory.attempt(1).plan.read_text()))
    tokenizer = read_tokenizer(packed_run.directory.tokenizer)
    samples = causal_lm.prepare_data(plan, causal_lm.read_documents(plan, seed=42), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(packed_run.directory.final)
    packed = [samples.held_out[index] for index in range(len(samples.held_out))]
    total = tokens = 0
    for document in (part for sample in packed for part in sample["input_ids"].split(sample[LENGTHS])):
        with torch.no_grad():
            total += float(model(**PaddedCollator(0)([{"input_ids": document}])).loss) * (len(document) - 1)
        tokens += len(document) - 1
    expected = total / tokens
    assert packed_run.texts("evaluated", "eval_loss")[-1] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_leaks_is_stopped_by_the_measurement(new_run: Callable[..., Run]) -> None:
    """A plan that no mpt makes: BLOOM's attention, which does not mind where documents begin, and packed documents."""
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4}
    run = new_run(model={"config": bloom}, data={"packing": "none"}, training={"max_steps": 2, "save_steps": 2})
    run.prepare()
    plan = json.loads(run.directory.attempt(1).plan.read_text())
    plan["values"]["packing"]["value"] = "best_fit"
    run.directory.attempt(1).plan.write_text(json.dumps(plan))
    assert run.start().wait(timeout=400) == 3, run.log()
    word = run.last_word()
    assert "see one another" in word["problem"] and "packing: none" in word["remedy"]
    assert "bloom" in word["problem"] and not run.directory.metrics.read_text()


def test_grouping_by_length_pads_less_than_the_random_order(new_run: Callable[..., Run], paragraphs: str) -> None:
    shares, rows = {}, {}
    for strategy in ("random", "group_by_length"):
        run = new_run(
            data={"source": paragraphs, "packing": "none"},
            training={"max_steps": 4, "save_steps": 4, "train_sampling_strategy": strategy},
        )
        assert run.train() == 0, run.log()
        rows[strategy] = [row["tokens"] for row in run.steps.values()]
        shares = next(event["shares"] for event in run.events if event["kind"] == "padding")
        notice = next(text for text in run.texts("notice", "text") if text.startswith("padding is"))
        assert f"{shares['grouped' if strategy == 'group_by_length' else 'none']:.0%}".replace("%", " %") in notice
    assert shares["grouped"] < shares["none"]
    assert rows["random"] != rows["group_by_length"]


def test_two_processes_pack_and_train_what_one_does(
    packed_run: Run, new_run: Callable[..., Run], paragraphs: str
) -> None:
    data = {"source": paragraphs, "packing": "best_fit", "pad_to_multiple_of": 8}
    two = new_run(data=data, training=EVALUATED, micro_batch_size=4, global_batch_size=8)
    two.recipe = two.recipe.model_copy(
        update={"distributed": DistributedSection(strategy=Strategy.DDP, processes_per_node=2)}
    )
    assert two.train(processes=2) == 0, two.log()
    for step, row in packed_run.steps.items():
        assert two.steps[step]["tokens"] == row["tokens"]
        assert two.steps[step]["loss"] == pytest.approx(row["loss"], rel=1e-3)  # sums in another order, 6 steps on
    assert two.audit()["global_batch_size"] == 8


def test_a_stream_is_packed_a_thousand_documents_at_a_time(new_run: Callable[..., Run], paragraphs: str) -> None:
    run = new_run(
        data={"source": paragraphs, "packing": "best_fit", "streaming": True},
        training={"max_steps": 4, "save_steps": 4},
    )
    assert run.train() == 0, run.log()
    assert run.audit()["documents apart"] < 1e-5
    assert all(0.9 * 8 * 64 < row["tokens"] <= 8 * 64 for row in run.steps.values())
    assert "streaming packs 1,000 documents at a time" in run.texts("notice", "text")
    assert run.texts("evaluated", "eval_loss")[-1] < 7
