"""What a model wrote on the way and at the end of a run, for a terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 160


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, the step whose weights wrote it (None: a run of an older mpt), and what it goes on from; in a chat it
    answers that."""

    step: int | None
    prompt: str
    text: str
    is_answer: bool

    @property
    def whole(self) -> str:
        """The prompt with what follows it."""
        return f"{self.prompt}{chr(10) if self.is_answer else ''}{self.text}"


def gather_samples(events: Sequence[Mapping[str, Any]]) -> tuple[Sample, ...]:
    """List a run's samples by step; where steps were made again, the later ones count."""
    found: dict[tuple[int | None, str], Sample] = {}
    for event in events:
        if event["kind"] == "sample":
            sample = Sample(event.get("step"), event["prompt"], event["text"], bool(event.get("is_answer")))
            found.pop((sample.step, sample.prompt), None)
            found[sample.step, sample.prompt] = sample
    return tuple(sorted(found.values(), key=lambda sample: sample.step or 0))


def last_samples(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Give those of the last step that has any."""
    return tuple(sample for sample in samples if sample.step == samples[-1].step)


def printable(text: str) -> str:
    r"""Leave out what would steer the terminal: a model may generate anything.

    >>> printable("a\x1b[2Jb\n\tc")
    'a[2Jb\n\tc'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def one_line(text: str) -> str:
    """Write a text on one line, shortened.

    >>> one_line("The  end\\n of it")
    'The end of it'
    """
    line = re.sub(r"\s+", " ", printable(text)).strip()
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
