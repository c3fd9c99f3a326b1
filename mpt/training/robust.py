"""The middle and the spread of the last values, by median and median absolute deviation.

Mean and standard deviation would not do: one outlier moves both, and hides the next one. Plain floats; whoever feeds a
window decides what may enter it.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator

# Of a Gaussian, the standard deviation is 1.4826 times the median absolute deviation: 1 / (quantile of 3/4).
MAD_TO_SIGMA = 1.4826


class Window:
    """The last `size` values, kept in their order and sorted.

    >>> window = Window(5)
    >>> window.extend([9.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    >>> list(window), window.median(), round(window.sigma(), 4)
    ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, 1.4826)
    """

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def add(self, value: float) -> None:
        """Take a finite value in; the oldest leaves where the window is full."""
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)

    def extend(self, values: Iterable[float]) -> None:
        """Take values in, the oldest first."""
        for value in values:
            self.add(value)

    def restart(self, values: Iterable[float]) -> None:
        """Forget all values, and begin with these."""
        self._values.clear()
        self._sorted.clear()
        self.extend(values)

    def median(self) -> float:
        """Give the middle value, or the mean of the middle two; the window must not be empty."""
        return middle(self._sorted)

    def sigma(self) -> float:
        """Estimate the standard deviation from the median absolute deviation."""
        centre = self.median()
        return MAD_TO_SIGMA * middle(sorted([abs(value - centre) for value in self._sorted]))


def middle(ordered: list[float]) -> float:
    """Give the median of sorted values."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
