"""How many rows of each data set a mixture takes. Pure."""

from collections.abc import Sequence

from mpt.recipe.sections.data import Mixing


def rows_of_mixture(lengths: Sequence[int], weights: Sequence[float], mixing: Mixing) -> list[int]:
    """Give the rows to take of each data set for shares that are as the weights.

    `oversample`: as few as hold every row of all of them, so that all but one data set are repeated (the
    `all_exhausted` of datasets' interleave_datasets). `undersample`: as many as there are without a repetition.

    >>> rows_of_mixture([100, 300], [1, 1], "oversample"), rows_of_mixture([100, 300], [1, 1], "undersample")
    ([300, 300], [100, 100])
    >>> rows_of_mixture([100, 300], [3, 1], "oversample")
    [900, 300]
    """
    choose = max if mixing == "oversample" else min
    unit = choose(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [max(1, round(unit * weight)) for weight in weights]
