"""The label of each row -> a class number, or for regression a number. Which classes there are, the training rows say.

Pure, but that a bad row is looked up in its file. Called by `mpt.training.tasks.sequence_classification`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.corpus import rows_with_places

# Hub data sets write it where a row of a test set has no label.
NO_LABEL = -1
SHOWN = 10
INTEGER = re.compile(r"[-+]?[0-9]{1,15}")
NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Column:
    """The labels of a table, and where they were read; `names` are those of a hub data set."""

    section: DataSection
    source: list[str]
    values: Sequence[Any]
    names: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        return self.section.label_column


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a data set: their names by number, and the number of each label."""

    names: tuple[str, ...]
    numbers: Mapping[Any, int]

    def number(self, column: Column) -> list[int]:
        """Number a column's labels. Raises MptError for one that is none of the classes."""
        for label in dict.fromkeys(column.values):
            if label not in self.numbers:
                raise MptError(
                    f"{_place(column, label)}: {column.key} is {label!r}, a class that no training row has",
                    remedy=f"The classes are {listed(self.names)}: mend the row, or train on some of that class too.",
                )
        return [self.numbers[label] for label in column.values]


def find_classes(column: Column, count: int | None = None, known: Sequence[str] = ()) -> Classes:
    """Find the classes of the training rows.

    `count` is what the recipe's model.config says, None: the labels say it. `known` are a checkpoint's own names in
    their order, which stays where they are the data's. Raises MptError with the place of a row whose label is missing,
    of another type than the others', or out of range, and where all rows are of one class.
    """
    check_labels(column)
    found = Counter(column.values)
    if len(found) < 2 and (count is None or count < 2):
        raise MptError(
            f"every one of the {len(column.values)} training rows is of the class {next(iter(found))!r}",
            remedy="A classifier needs two classes: check data.label_column, and whether data.source is sorted.",
        )
    names: tuple[str, ...]
    numbers: dict[Any, int]
    if column.names is not None:
        names, numbers = column.names, {number: number for number in range(len(column.names))}
    elif isinstance(next(iter(found)), str):
        order = list(known) if set(known) == set(found) else sorted(found)
        names, numbers = tuple(order), {name: number for number, name in enumerate(order)}
    else:
        names, numbers = _of_numbers(sorted(found), count, known)
    if count is not None:
        names = _counted(column, names, numbers, count)
    if (outside := next((label for label in found if label not in numbers), None)) is not None:
        raise _outside(column, outside, len(names))
    return Classes(names, numbers)


def classes_of_model(names: Sequence[str], column: Column) -> Classes:
    """Give the classes of a trained model, by the names in its configuration: rows that it is evaluated on may lack
    some, and number none. Whole numbers that are no names are the classes' own numbers."""
    check_labels(column)
    spelt = {
        label: label if isinstance(label, str) else _spelt(label) if column.names is None else column.names[label]
        for label in dict.fromkeys(column.values)
        if column.names is None or 0 <= label < len(column.names)
    }
    numbers: dict[Any, int] = {label: names.index(name) for label, name in spelt.items() if name in names}
    if not numbers and not any(isinstance(label, str) for label in column.values):
        numbers = {number: number for number in range(len(names))}
    return Classes(tuple(names), numbers)


def check_labels(column: Column) -> None:
    """Raise MptError for the first label that is missing, no label at all, or of another type than the first one."""
    kinds: dict[str, Any] = {}
    for label in column.values:
        kind = _kind(label)
        if kind is None:
            raise MptError(
                f"{_place(column, label)}: {_said(column.key, label)}",
                remedy="Give each row one class, a whole number or a name; `data.labels: regression` learns fractions.",
            )
        kinds.setdefault(kind, label)
        if len(kinds) > 1:
            (first, sample), (other, odd) = kinds.items()
            raise MptError(
                f"{_place(column, odd)}: {column.key} is {other} ({odd!r}), and in rows before {first} ({sample!r})",
                remedy="Write every label in one way: all as numbers, or all as names.",
            )


def read_as_written(values: Sequence[Any], kind: type) -> Sequence[Any]:
    """Give the labels as numbers where a file could write them as text alone, as a csv does; others as they are.

    >>> read_as_written(["0", "10", "2"], int), read_as_written(["0", "x"], int), read_as_written(["0.5", "1"], float)
    ([0, 10, 2], ['0', 'x'], [0.5, 1.0])
    """
    pattern = INTEGER if kind is int else NUMBER
    is_text = bool(values) and all(isinstance(value, str) and pattern.fullmatch(value.strip()) for value in values)
    return [kind(value) for value in values] if is_text else values


def to_numbers(column: Column) -> list[float]:
    """Take the labels for the numbers that a regression learns. Raises MptError for one that is no finite number."""
    for label in column.values:
        is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
        if not is_number or not math.isfinite(label):
            raise MptError(
                f"{_place(column, label)}: {column.key} is {label!r}, no finite number",
                remedy="Regression learns numbers: mend the row, or leave `data.labels: regression` out for classes.",
            )
    return [float(label) for label in column.values]


def listed(names: Sequence[str]) -> str:
    """Write class names, the first ones of many.

    >>> listed(["no", "yes"]), listed([str(number) for number in range(12)])
    ('no, yes', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more')
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _of_numbers(found: list[Any], count: int | None, known: Sequence[str]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Number the classes that are written as numbers (or true and false): 0 to n-1 stay what they are."""
    if count is not None or (found == list(range(len(found))) and not isinstance(found[0], bool)):
        size = len(found) if count is None else count
        names = tuple(known) if len(known) == size else tuple(str(number) for number in range(size))
        return names, {number: number for number in range(size)}
    return tuple(_spelt(label) for label in found), {label: number for number, label in enumerate(found)}


def _spelt(label: Any) -> str:
    """Write a label as a class's name.

    >>> _spelt(3.0), _spelt(True), _spelt(-1)
    ('3', 'true', '-1')
    """
    if isinstance(label, bool):
        return str(label).lower()
    return str(int(label)) if isinstance(label, float) else str(label)


def _counted(column: Column, names: tuple[str, ...], numbers: Mapping[Any, int], count: int) -> tuple[str, ...]:
    """Hold what the data says against the number that the recipe gives; names that the data lacks are made up."""
    if len(names) > count:
        label = next(label for label, number in numbers.items() if number >= count)
        raise MptError(
            f"{_place(column, label)}: {label!r} is one class more than model.config.num_labels, which is {count}",
            remedy=f"The classes are {listed(names)}: leave num_labels out (the data says it), or mend the labels.",
        )
    return names + tuple(f"LABEL_{number}" for number in range(len(names), count))


def _outside(column: Column, label: Any, count: int) -> MptError:
    if label == NO_LABEL and column.names is not None:
        return MptError(
            f"{_place(column, label)} has the label -1, which stands for none",
            remedy="Choose a split that has labels with data.split or data.eval_split: a test set often has none.",
        )
    return MptError(
        f"{_place(column, label)}: {column.key} is {label!r}, outside the range 0 to {count - 1} of {count} classes",
        remedy="Mend the row, or set model.config.num_labels higher, or leave it out: then the data says it.",
    )


def _kind(label: Any) -> str | None:
    """Name the type of a label; None where it is no label."""
    if isinstance(label, bool):
        return "true or false"
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return "a number"
    return "text" if isinstance(label, str) and label else None


def _said(key: str, label: Any) -> str:
    if label is None or label == "":
        return f"the row has no {key}"
    if isinstance(label, float):
        return f"{key} is {label!r}, no class"
    return f"{key} is {'a list' if isinstance(label, list) else type(label).__name__}, no class"


def _place(column: Column, label: Any) -> str:
    """Say where a label stands: file and line, or the row where no file can tell."""
    is_missing = label is None or label == ""

    def is_it(row: Mapping[str, Any]) -> bool:
        there = row.get(column.key)
        if is_missing:
            return there is None or there == ""
        return there == label if type(there) is type(label) else str(there) in (str(label), _written(label))

    for place, row in rows_with_places(column.section, column.source):
        if is_it(row):
            return place
    number = next(number for number, value in enumerate(column.values, 1) if value == label or value is label)
    return f"{', '.join(column.source)}: row {number}"


def _written(label: Any) -> str:
    """Spell a number that a table may have widened: 1.0 for 1."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
