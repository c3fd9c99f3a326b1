"""How many rows could not be used, and how many may not be: `data.max_bad_rows`. Readers report, the first beyond the
limit ends the preparation. A stream's are told while it is read (`told_to`): nobody knows yet how many there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mpt.errors import MptError

SHOWN = 5
LEAVE_OUT = "Or set data.max_bad_rows, and so many of them (below 1: such a share) are left out."


@dataclass(slots=True)
class BadRows:
    """Counts what is left out of one source, and keeps the first few with their places."""

    allowed: float = 0.0
    """As `data.max_bad_rows`: a number of rows, below 1 a share of all rows."""
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, problem: str, remedy: str) -> None:
        """Note a bad row. Raises MptError where it is one too many."""
        if self.allowed == 0:
            raise MptError(f"{place}: {problem}", remedy=f"{remedy} {LEAVE_OUT}")
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{place}: {problem}")
        self._check_count()

    def add_unnamed(self, count: int) -> None:
        """Note bad rows beyond the first few, which are known from an earlier reading."""
        self.count += max(count, 0)
        self._check_count()

    def check_share(self, good: int) -> None:
        """Raise MptError where too large a share of all rows was bad; asked when everything is read."""
        total = good + self.count
        if self.allowed < 1 and self.count > self.allowed * total:
            self._refuse(f"{self.count} of {total} rows can't be used, more than a share of {self.allowed:g}")

    def notices(self, good: int) -> list[str]:
        """Say what was left out, if anything was."""
        if not self.count:
            return []
        more = f"; and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return [f"{self.count} of {good + self.count} rows are left out: {'; '.join(self.examples)}{more}"]

    def _check_count(self) -> None:
        if self.allowed >= 1 and self.count > self.allowed:
            self._refuse(f"more than {self.allowed:.0f} rows can't be used")

    def _refuse(self, problem: str) -> None:
        listed = "".join(f"\n    {example}" for example in self.examples)
        raise MptError(
            f"{problem} (data.max_bad_rows); the first:{listed}",
            remedy="Mend or remove them, or set data.max_bad_rows higher.",
        )


@dataclass(slots=True)
class _Streamed:
    """The bad rows that this process met in streams: told are the first, the tenth, the hundredth and so on."""

    tell: Callable[[str], None]
    count: int = 0
    next: int = 1

    def add(self, place: str, problem: str) -> None:
        self.count += 1
        if self.count < self.next:
            return
        self.next *= 10
        last = f"{place}: {problem}"
        self.tell(
            f"streaming leaves out {last}; it says so again at the {self.next}th such row"
            if self.count == 1
            else f"streaming has left out {self.count} rows so far, each time that it read them; the last: {last}"
        )


_streamed: _Streamed | None = None  # of all threads: datasets reads a shuffled stream in one of its own


@contextmanager
def told_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Let `tell` hear of the rows that streams leave out; the loader's processes, which are forks, have it too."""
    global _streamed
    before, _streamed = _streamed, _Streamed(tell)
    try:
        yield
    finally:
        _streamed = before


def add_streamed(bad: BadRows, place: str, problem: str, remedy: str) -> None:
    """Note a stream's bad row in `bad`, and tell of it now and then. Raises MptError where it is one too many."""
    bad.add(place, problem, remedy)
    if _streamed is not None:
        _streamed.add(place, problem)
