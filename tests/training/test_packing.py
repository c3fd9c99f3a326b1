"""Documents packed into samples, and samples collated into batches."""

import random
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mpt.hardware.specs import parse_machine
from mpt.planning.best_fit import count_bins
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import resolve
from mpt.training.collation import (
    IGNORED,
    BinCollator,
    FlattenedCollator,
    PackedCollator,
    PaddedCollator,
    build_collator,
)
from mpt.training.packing import LENGTHS, BestFitBins, PackedBlocks, cut, fit, lengths_of, pack_rows
from tests.training.tiny_runs import tiny_recipe


def table_of(rows: list[list[int]], labels: list[list[int]] | None = None, chunks: int = 1) -> datasets.Dataset:
    """A tokenised table, in as many chunks as a long one would have."""
    columns = {"input_ids": rows} | ({} if labels is None else {"labels": labels})
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns})
    size = -(-len(rows) // chunks)
    parts = [
        datasets.Dataset.from_dict({name: rows[at : at + size] for name, rows in columns.items()}, features=features)
        for at in range(0, len(rows), size)
    ]
    return datasets.concatenate_datasets(parts)


def documents(count: int = 60, longest: int = 70, seed: int = 0) -> list[list[int]]:
    """Documents of uneven lengths, each token of its own, so that none can be taken for another."""
    rng, token = random.Random(seed), 0
    rows = []
    for _ in range(count):
        length = rng.randint(1, longest)
        rows.append(list(range(token, token + length)))
        token += length
    return rows


@pytest.mark.parametrize("chunks", [1, 7])
def test_every_document_is_in_one_bin_whole_or_in_pieces_of_the_bins_length(chunks: int) -> None:
    rows = documents()
    bins = BestFitBins(table_of(rows, chunks=chunks), 32)
    found: list[list[int]] = []
    for index in range(len(bins)):
        sample = bins[index]
        assert len(sample["input_ids"]) == sum(sample[LENGTHS]) <= 32
        found += [part.tolist() for part in sample["input_ids"].split(sample[LENGTHS])]
    pieces = [row[at : at + 32] for row in rows for at in range(0, len(row), 32)]
    assert sorted(found) == sorted(piece for piece in pieces if len(piece) > 1)
    lengths = [len(row) for row in rows]
    assert len(bins) == count_bins({length: lengths.count(length) for length in lengths}, 32)
    assert sum(len(sample) for sample in found) > 0.95 * 32 * len(bins)  # 60 documents fill their bins well
    with pytest.raises(IndexError):
        bins[len(bins)]


def test_bins_follow_the_order_of_the_documents_and_carry_their_labels() -> None:
    rows = documents()
    labels = [[IGNORED if token % 3 else token for token in row] for row in rows]
    bins = BestFitBins(table_of(rows, labels, chunks=3), 32)
    firsts = [int(bins[index]["input_ids"][0]) for index in range(len(bins))]
    assert firsts == sorted(firsts)
    for index in range(len(bins)):
        tokens, learnt = bins[index]["input_ids"], bins[index]["labels"]
        assert torch.equal(learnt, tokens.masked_fill(tokens % 3 != 0, IGNORED))
        assert tokens.tolist() == sorted(tokens.tolist())


def test_bins_repeat_and_don_t_depend_on_chunks_nor_on_an_index_of_rows() -> None:
    rows = documents()
    once, again = BestFitBins(table_of(rows), 32), BestFitBins(table_of(rows, chunks=9), 32)
    chosen = table_of([*rows[::-1], [1, 2, 3]]).select(range(len(rows) - 1, -1, -1))
    for other in (again, BestFitBins(chosen, 32)):
        assert len(other) == len(once)
        for index in range(len(once)):
            assert torch.equal(once[index]["input_ids"], other[index]["input_ids"])
            assert once[index][LENGTHS] == other[index][LENGTHS]


def test_a_million_documents_are_packed_full() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 2
    starts, sizes = cut(lengths, 2048)
    bins = fit(sizes, 2048)
    used = np.bincount(bins, weights=sizes)
    assert used.max() <= 2048 and used.mean() > 0.999 * 2048
    assert np.array_equal(np.sort(starts), starts) and int(sizes.sum()) > 0.999 * lengths.sum()


@pytest.mark.parametrize("rows", [[], [[1]], [[1], [2]]])
def test_what_holds_nothing_to_learn_makes_no_bin(rows: list[list[int]]) -> None:
    assert len(BestFitBins(table_of(rows) if rows else table_of([[1]]).select([]), 8)) == 0
    assert pack_rows({"input_ids": rows}, 8) == {"input_ids": [], LENGTHS: []}


def test_a_batch_of_a_stream_is_packed_as_a_table_is() -> None:
    rows = documents(20)
    packed = pack_rows({"input_ids": rows, "labels": rows}, 32)
    bins = BestFitBins(table_of(rows, rows), 32)
    assert packed[LENGTHS] == [bins[index][LENGTHS] for index in range(len(bins))]
    assert packed["labels"] == [bins[index]["labels"].tolist() for index in range(len(bins))]


def test_the_lengths_of_documents_are_known_packed_or_not_and_of_joined_ones_not() -> None:
    rows = documents(10)
    table = table_of(rows, chunks=2)
    lengths = [len(row) for row in rows]
    for samples in (table, BestFitBins(table, 32)):
        found = lengths_of(samples)
        assert found is not None and found.tolist() == lengths
    assert lengths_of(table.select([3, 1])).tolist() == [lengths[3], lengths[1]]  # type: ignore[union-attr]
    assert lengths_of(PackedBlocks(table, 8)) is None


# --- batches


SAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], LENGTHS: [3, 2]},
    {"input_ids": [4, 4], "labels": [IGNORED, 4]},
]


def test_a_row_of_documents_has_positions_that_begin_anew_and_no_mask() -> None:
    batch = BinCollator(0, multiple=4, limit=8)(SAMPLES)
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 4, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, 6, 7, i, 9, i, i, i], [i, 4, i, i, i, i, i, i]]


def test_a_flattened_batch_is_one_row_with_the_ends_of_its_documents() -> None:
    batch = FlattenedCollator(0)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, 4]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == batch["max_length_k"] == 3
    assert SAMPLES[1]["labels"] == [IGNORED, 4]  # the sample stays as it was
    rounded = FlattenedCollator(0, multiple=16)(SAMPLES)
    assert rounded["input_ids"].shape == (1, 16) and rounded["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 16]
    assert rounded["labels"][0, 7:].tolist() == [IGNORED] * 9
    assert rounded["position_ids"][0, 7:].tolist() == list(range(9))


@pytest.mark.parametrize(
    ("longest", "multiple", "limit", "width"),
    [(5, 1, 64, 5), (5, 8, 64, 8), (8, 8, 64, 8), (9, 8, 12, 12), (12, 8, 12, 12), (5, 8, None, 8), (5, 64, 64, 64)],
)
def test_a_padded_batch_is_as_wide_as_its_longest_sample_rounded_up_within_the_limit(
    longest: int, multiple: int, limit: int | None, width: int
) -> None:
    batch = PaddedCollator(9, multiple=multiple, limit=limit)([{"input_ids": [1] * longest}, {"input_ids": [1, 2]}])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, width)
    assert int(batch["attention_mask"].sum()) == longest + 2
    assert batch["labels"][1, 2:].eq(IGNORED).all() and batch["input_ids"][1, 2:].eq(9).all()


@pytest.mark.parametrize(
    ("data", "machine", "kind", "multiple"),
    [
        ({}, "cpu", PackedCollator, None),
        ({"packing": "none"}, "cpu", PaddedCollator, 1),
        ({"packing": "none"}, "T4", PaddedCollator, 8),
        ({"packing": "best_fit"}, "cpu", BinCollator, 1),
        ({"packing": "best_fit", "pad_to_multiple_of": 64}, "cpu", BinCollator, 64),
        ({"packing": "best_fit"}, "A100-80GB", FlattenedCollator, 1),
        ({"packing": "none"}, "A100-80GB", FlattenedCollator, 1),
    ],
)
def test_a_run_has_the_collator_that_its_plan_names(
    data: dict[str, Any], machine: str, kind: type, multiple: int | None
) -> None:
    recipe = tiny_recipe(data=data, precision="fp32" if machine == "cpu" else "fp16")
    where, packages = parse_machine(machine), frozenset({"flash-attn"})
    plan = resolve(recipe, where, learn_model_facts(recipe), name="tiny", packages=packages)
    collator = build_collator(plan, SimpleNamespace(pad_token_id=None, eos_token_id=3))
    assert type(collator) is kind
    if multiple is not None:
        assert collator.multiple == multiple and collator.pad_token_id == 3  # type: ignore[attr-defined]
    if isinstance(collator, PaddedCollator):
        assert collator.limit == 64


def test_real_text_is_packed_to_the_last_few_positions() -> None:
    rows = [list(text.encode()) for _, text in sorted(topics.items())]
    bins = BestFitBins(table_of(rows), 4096)
    used = sum(len(bins[index]["input_ids"]) for index in range(len(bins)))
    assert used / (len(bins) * 4096) > 0.98
    assert len(bins.notices) == 1 and "longer, and are in pieces" in bins.notices[0]
