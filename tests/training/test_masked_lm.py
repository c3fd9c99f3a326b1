"""Masked language modelling: what is masked, and a tiny BERT that learns to guess it."""

import json
import math
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from mpt.training.collation import IGNORED
from mpt.training.data_order import keyed_randomness
from mpt.training.masking import FixedMasks, MaskedCollator
from mpt.training.tokenizer import train_tokenizer
from tests.training.tiny_runs import BERT, Run, continue_from

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((topics[name] for name in sorted(topics)[:20]), 400, marks_text=True)


def collate(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]], probability: float = 0.15) -> dict[str, Any]:
    with keyed_randomness(1, 2, 3):
        return MaskedCollator(tokenizer, probability)([{"input_ids": row} for row in rows])


def test_a_tokenizer_for_reading_both_ways_marks_texts_and_pairs(tokenizer: PreTrainedTokenizerFast) -> None:
    single, pair = tokenizer("yes"), tokenizer("yes", "no")
    assert tokenizer.decode(single["input_ids"]) == "[CLS]yes[SEP]"
    assert tokenizer.decode(pair["input_ids"]) == "[CLS]yes[SEP]no[SEP]"
    assert 1 in pair["token_type_ids"] and 1 not in single["token_type_ids"]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("naïve 🙂")["input_ids"], skip_special_tokens=True) == "naïve 🙂"


def test_of_the_tokens_a_share_is_to_be_guessed_and_most_of_it_is_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [tokenizer(topics[name])["input_ids"][:400] for name in sorted(topics)[:60]]
    batch = collate(tokenizer, rows)
    tokens, labels = batch["input_ids"], batch["labels"]
    plain = torch.tensor([len(row) - 1 for row in rows]).sum()  # each begins with [CLS], and most are cut before [SEP]
    chosen = labels != IGNORED
    assert chosen.sum() / plain == pytest.approx(0.15, abs=0.01)  # four standard deviations of 20,000 draws
    assert (tokens[chosen] == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (tokens[chosen] == labels[chosen]).float().mean() == pytest.approx(0.1, abs=0.03)
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(labels[chosen], special).any()
    unchanged = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    assert torch.equal(torch.where(chosen, labels, tokens), unchanged)


def test_a_sample_too_short_for_its_share_has_one_token_to_guess(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [tokenizer(word)["input_ids"] for word in ("a", "no", "yes", "x = 1")]
    labels = collate(tokenizer, rows, probability=0.01)["labels"]
    assert (labels != IGNORED).sum(dim=1).tolist() == [1, 1, 1, 1]


def test_what_is_evaluated_on_is_masked_alike_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": tokenizer(topics[name])["input_ids"][:50]} for name in sorted(topics)[:4]]
    masks = FixedMasks(rows, MaskedCollator(tokenizer, 0.15), seed=0)
    first = [masks[index] for index in range(4)]
    torch.rand(3)
    assert all(torch.equal(masks[index]["input_ids"], first[index]["input_ids"]) for index in (3, 1, 0, 2))
    assert len({tuple((one["labels"] != IGNORED).tolist()) for one in first}) == 4
    batch = MaskedCollator(tokenizer, 0.15)(first)
    assert torch.equal(batch["labels"], torch.stack([one["labels"] for one in first]))


@pytest.fixture(scope="module")
def bert_run(new_run: MakeRun) -> Run:
    """A finished run of a tiny BERT, evaluated twice."""
    every = {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6}
    run = new_run(task="masked_lm", model={"config": BERT}, training={"max_steps": 12, **every})
    assert run.train() == 0, run.log()
    return run


@pytest.mark.slow
def test_a_tiny_bert_learns_to_guess(bert_run: Run) -> None:
    losses = [row["loss"] for row in bert_run.steps.values()]
    evaluated = bert_run.texts("evaluated", "eval_loss")
    assert losses[-1] < losses[0] - 0.3
    assert evaluated[1] < evaluated[0] < losses[0]
    assert bert_run.texts("audit", "passed") == [True]
    model = AutoModelForMaskedLM.from_pretrained(bert_run.directory.final)
    tokenizer = AutoTokenizer.from_pretrained(bert_run.directory.final)
    assert (model.config.pad_token_id, tokenizer.mask_token) == (tokenizer.pad_token_id, "[MASK]")
    assert model.config.vocab_size == 512


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_masks_the_same_tokens(bert_run: Run, new_run: MakeRun) -> None:
    resumed = continue_from(bert_run, "checkpoint-6", new_run)
    assert resumed.trajectory == bert_run.trajectory
    assert resumed.last_word(2)["eval_loss"] == bert_run.last_word()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked_lm"])
def test_micro_batches_change_no_gradient(task: str, new_run: MakeRun) -> None:
    """transformers passes these models' losses, which are means, off as sums over the whole batch: the gradients of two
    micro batches would come out twice as large."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole, halved = (
        new_run(
            task=task,
            model={"config": BERT | still},
            data={"packing": True},
            micro_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            training={"max_steps": 1, "save_steps": 5},
        )
        for parts in (1, 2)
    )
    for run in (whole, halved):
        assert run.train() == 0, run.log()
    # The masks differ, because they follow from a batch's place.
    assert halved.steps[1]["loss"] == pytest.approx(whole.steps[1]["loss"], rel=0.02)
    assert halved.steps[1]["grad_norm"] == pytest.approx(whole.steps[1]["grad_norm"], rel=0.2)


@pytest.mark.slow
def test_documents_alone_keep_their_marks_and_a_stream_is_masked_too(new_run: MakeRun, tmp_path: Any) -> None:
    source = tmp_path / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")
    for changes in ({"packing": False}, {"packing": True, "streaming": True, "eval_source": str(source)}):
        data = {"source": str(source), "mask_probability": 0.3, **changes}
        run = new_run(task="masked_lm", model={"config": BERT}, data=data, training={"max_steps": 2, "save_steps": 2})
        assert run.train() == 0, run.log()
        assert math.isfinite(run.last_word()["eval_loss"])


def test_masked_lm_without_a_mask_is_one_message(new_run: MakeRun) -> None:
    from mpt.errors import MptError
    from mpt.training.data import Documents
    from mpt.training.tasks import masked_lm

    plain = train_tokenizer(["some text"], 300)
    with pytest.raises(MptError, match="needs a tokenizer with a mask_token"):
        masked_lm.prepare_data(None, Documents(None, None), plain)  # type: ignore[arg-type]
