"""Texts with labels: files and hub data sets as a `datasets` table of the columns `text`, `text_pair` and `label`.

Called by `mpt.training.tasks.sequence_classification`. What is wrong with a row is said with its file and line.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.bad_rows import BadRows
from mpt.training.corpus import explain_rows, read_rows
from mpt.training.data import Documents
from mpt.training.labels import Column, read_as_written
from mpt.training.row_files import TEXT, BadRow, json_kind

PAIR, LABEL = "text_pair", "label"


def read_labelled(section: DataSection, *, seed: int) -> Documents:
    """Read the recipe's rows and hold out what is evaluated on; a part of the source holds each class in its share."""
    train, notices = _read(section, section.source_names, section.split)
    if section.eval_source is not None or section.eval_split is not None:
        source = section.eval_source_names or section.source_names
        held_out, more = _read(section, source, section.eval_split or section.split)
        return Documents(train, held_out, (*notices, *more))
    if section.eval_fraction == 0:
        return Documents(train, None, notices)
    rows = hold_out(train[LABEL][:], section.eval_fraction, seed)
    kept = np.setdiff1d(np.arange(len(train)), rows)
    if len(rows) == 0:
        notice = f"{len(train)} rows are too few to hold {section.eval_fraction:.0%} of them out: nothing is evaluated"
        return Documents(train, None, (*notices, notice))
    return Documents(train.select(kept), train.select(rows), notices)


def hold_out(labels: Sequence[Any], fraction: float, seed: int) -> np.ndarray:
    """Choose rows to hold out, of each class its share and never all of it; the same ones for a seed.

    >>> hold_out(["a"] * 6 + ["b"] * 2 + ["c"], 0.34, 0).tolist()
    [2, 3, 7]
    """
    draw = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(repr(label), []).append(row)
    # Numbers that are learnt are no classes: each stands alone, and together they are one.
    groups = [range(len(labels))] if len(rows) > len(labels) / 2 else [rows[key] for key in sorted(rows)]
    chosen = []
    for group in groups:
        count = min(int(len(group) * fraction + 0.5), len(group) - 1)
        chosen += draw.permutation(np.asarray(group))[:count].tolist()
    return np.sort(np.asarray(chosen, dtype=np.int64))


def label_column(section: DataSection, table: datasets.Dataset, source: list[str]) -> Column:
    """Give a table's labels with where they came from."""
    feature = table.features[LABEL]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    kind = float if section.labels == "regression" else int
    return Column(section, source, read_as_written(table[LABEL][:], kind), names)


def _read(section: DataSection, source: list[str], split: str) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Read rows, and say what was left out."""
    bad = BadRows(section.max_bad_rows)
    table = read_rows(section, source, split=split, bad=bad)
    return _checked(section, table, source), tuple(bad.notices(len(table)))


def _checked(section: DataSection, table: datasets.Dataset, source: list[str]) -> datasets.Dataset:
    """Keep the columns that are asked for, under our names, and make sure that each row has its texts."""
    asked = {section.text_column: TEXT, section.label_column: LABEL}
    if section.text_pair_column is not None:
        asked[section.text_pair_column] = PAIR
    keys = {TEXT: "data.text_column", LABEL: "data.label_column", PAIR: "data.text_pair_column"}
    named = ", ".join(source)
    for column, ours in asked.items():
        if column not in table.column_names:
            raise MptError(
                f"{named} has no column {column}; it has {', '.join(table.column_names)}",
                remedy=f"Name the column of the {ours.replace('_', ' ')} with {keys[ours]}.",
            )
        if ours != LABEL:
            _check_text(section, table, column, source, keys[ours])
    table = table.select_columns(list(asked)).rename_columns({key: ours for key, ours in asked.items() if key != ours})
    for ours in (TEXT, PAIR):
        if ours in table.column_names:
            table = table.cast_column(ours, datasets.Value("string"))
    return table


def _check_text(section: DataSection, table: Any, column: str, source: list[str], key: str) -> None:
    """Raise MptError for a column that is not text, or the first row that has none."""

    def check(row: dict[str, Any]) -> BadRow | None:
        if isinstance(row.get(column), str):
            return None
        found = json_kind(row.get(column))
        return BadRow(f"{column} is {found}, not text", f"Give every row a text, or name its column with {key}.")

    kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
    missing = [number for number, chunk in enumerate(table.data.column(column).chunks) if chunk.null_count]
    if kind in ("string", "large_string") and not missing:
        return
    explain_rows(section, source, check)
    raise MptError(f"{source}: column {column} holds {kind}, or rows without it", remedy=f"Name a text with {key}.")
