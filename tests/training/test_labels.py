"""Labels: which classes there are, and what is wrong with a row, with its file and line."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.labelled import hold_out, label_column, read_labelled
from mpt.training.labels import Classes, Column, check_labels, classes_of_model, find_classes, to_numbers


def column(values: list[Any], **keys: Any) -> Column:
    return Column(DataSection(source="builtin:python-reference"), ["hub:rows"], values, **keys)


def written(path: Path, rows: list[dict[str, Any]]) -> DataSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSection(source=str(path))


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([1, 0, 2], ("0", "1", "2"), [1, 0, 2]),
        ([5, 1, 3], ("1", "3", "5"), [2, 0, 1]),
        ([-1, 1], ("-1", "1"), [0, 1]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        ([True, False], ("false", "true"), [1, 0]),
    ],
)
def test_classes_are_what_the_rows_say(values: list[Any], names: tuple[str, ...], numbers: list[int]) -> None:
    found = find_classes(column(values))
    assert (found.names, found.number(column(values))) == (names, numbers)


def test_the_names_of_a_hub_data_set_and_of_a_checkpoint_keep_their_order() -> None:
    assert find_classes(column([1, 0], names=("yes", "no"))).names == ("yes", "no")
    assert find_classes(column(["no", "yes"]), known=("yes", "no")).number(column(["no", "yes"])) == [1, 0]
    assert find_classes(column([0, 1]), known=("yes", "no")).names == ("yes", "no")
    assert find_classes(column(["no", "yes"]), known=("a", "b")).names == ("no", "yes")


def test_a_number_of_classes_in_the_recipe_leaves_room_for_some_that_the_data_lacks() -> None:
    assert find_classes(column([0, 2]), 4).names == ("0", "1", "2", "3")
    assert find_classes(column(["a", "b"]), 3).names == ("a", "b", "LABEL_2")
    assert find_classes(column([1, 1]), 2).number(column([1, 1])) == [1, 1]


BAD: list[tuple[list[Any], int | None, str]] = [
    ([0, None, 1], None, "2: the row has no label"),
    (["a", "", "b"], None, "2: the row has no label"),
    ([0, 1, 0.5], None, "3: label is 0.5, no class"),
    ([0, 1, 7], 3, "3: label is 7, outside the range 0 to 2 of 3 classes"),
    ([0, 1, -1], 2, "3: label is -1, outside the range 0 to 1"),
    (["a", "b", "c"], 2, "3: 'c' is one class more than model.config.num_labels, which is 2"),
    ([4, 4, 4], None, "every one of the 3 training rows is of the class 4"),
]


@pytest.mark.parametrize(("values", "count", "problem"), BAD)
def test_a_bad_label_is_named_with_its_line(values: list[Any], count: int | None, problem: str, tmp_path: Path) -> None:
    section = written(tmp_path / "rows.jsonl", [{"text": "x", "label": value} for value in values])
    table = read_labelled(section.model_copy(update={"eval_fraction": 0}), seed=0).train
    with pytest.raises(MptError) as refused:
        find_classes(label_column(section, table, section.source_names), count)
    assert problem in refused.value.problem
    assert refused.value.problem.startswith((f"{tmp_path}/rows.jsonl:", "every one"))


def test_labels_of_mixed_types_are_refused_where_they_are_read(tmp_path: Path) -> None:
    section = written(tmp_path / "rows.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": "one"}])
    with pytest.raises(MptError, match=r"rows.jsonl:2: column label is text here and a whole number in"):
        read_labelled(section, seed=0)
    with pytest.raises(MptError, match=r"rows: row 2: label is text \('one'\), and in rows before a number \(1\)"):
        check_labels(column([1, "one"]))


def test_a_class_that_only_the_evaluation_has_is_refused(tmp_path: Path) -> None:
    section = written(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    table = read_labelled(section.model_copy(update={"eval_fraction": 0}), seed=0).train
    with pytest.raises(MptError, match=r"rows.jsonl:2: label is 'c', a class that no training row has"):
        Classes(("a", "b"), {"a": 0, "b": 1}).number(label_column(section, table, section.source_names))


def test_minus_one_is_no_label_in_a_hub_data_set() -> None:
    with pytest.raises(MptError, match="row 2 has the label -1, which stands for none") as refused:
        find_classes(column([0, -1, 1], names=("no", "yes")))
    assert "data.eval_split" in refused.value.remedy


def test_a_csv_says_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,0\nb,10\nc,2\n", encoding="utf-8")
    section = DataSection(source=str(path), eval_fraction=0)
    read = label_column(section, read_labelled(section, seed=0).train, section.source_names)
    assert find_classes(read).names == ("0", "2", "10")
    regression = section.model_copy(update={"labels": "regression"})
    assert to_numbers(label_column(regression, read_labelled(section, seed=0).train, ["x"])) == [0.0, 10.0, 2.0]
    path.write_text("text,label\na,0\nb,\nc,2\n", encoding="utf-8")
    empty = label_column(section, read_labelled(section, seed=0).train, section.source_names)
    with pytest.raises(MptError, match=r"rows.csv:3: the row has no label"):
        find_classes(empty)


@pytest.mark.parametrize("bad", ["high", None, float("nan"), True])
def test_a_regression_refuses_what_is_no_number(bad: Any) -> None:
    with pytest.raises(MptError, match=r"row 2: label is .*, no finite number"):
        to_numbers(column([0.5, bad, 1]))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label_column": "class"}, "has no column class; it has text, label, stars"),
        ({"text_column": "sentence"}, "has no column sentence"),
        ({"text_pair_column": "other"}, "has no column other"),
        ({"text_column": "stars"}, "rows.jsonl:1: stars is a number, not text"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(
    changes: dict[str, str], problem: str, tmp_path: Path
) -> None:
    rows = [{"text": "x", "label": 1, "stars": 3}, {"text": "y", "label": 0, "stars": 4}]
    section = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(MptError, match=problem):
        read_labelled(section.model_copy(update=changes), seed=0)


def test_a_row_without_its_second_text_is_named(tmp_path: Path) -> None:
    rows = [{"text": "x", "other": "y", "label": 1}, {"text": "x", "label": 0}]
    section = written(tmp_path / "rows.jsonl", rows).model_copy(update={"text_pair_column": "other"})
    with pytest.raises(MptError, match=r"rows.jsonl:2: other is null, not text"):
        read_labelled(section, seed=0)


def test_each_class_is_held_out_in_its_share_and_none_whole() -> None:
    labels = ["a"] * 90 + ["b"] * 10 + ["c"]
    rows = hold_out(labels, 0.2, seed=1)
    held_out = [labels[row] for row in rows]
    assert (held_out.count("a"), held_out.count("b"), held_out.count("c")) == (18, 2, 0)
    assert np.array_equal(rows, hold_out(labels, 0.2, seed=1))
    assert not np.array_equal(rows, hold_out(labels, 0.2, seed=2))
    assert len(hold_out([0.1 * row for row in range(50)], 0.1, seed=0)) == 5  # numbers are no classes


def test_too_few_rows_to_hold_any_out_are_all_trained_on(tmp_path: Path) -> None:
    section = written(tmp_path / "rows.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    documents = read_labelled(section, seed=0)
    assert isinstance(documents.train, datasets.Dataset)
    assert (len(documents.train), documents.held_out) == (2, None)
    assert "too few" in documents.notices[0]


@pytest.mark.parametrize(
    ("names", "values", "numbers"),
    [
        (("food", "tool", "weather"), ["weather", "food"], [2, 0]),
        (("0", "1"), [1, 1], [1, 1]),
        (("1", "3", "5"), [5, 3], [2, 1]),
        (("no", "yes"), [1, 0], [1, 0]),
    ],
)
def test_a_trained_model_says_which_classes_rows_to_evaluate_on_have(
    names: tuple[str, ...], values: list[Any], numbers: list[int]
) -> None:
    rows = column(values)
    assert classes_of_model(names, rows).number(rows) == numbers


def test_a_class_that_a_trained_model_lacks_is_refused(tmp_path: Path) -> None:
    section = written(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    rows = Column(section, section.source_names, [1, 2])
    with pytest.raises(MptError, match=r"rows.jsonl:2: label is 2"):
        classes_of_model(("0", "1"), rows).number(rows)
