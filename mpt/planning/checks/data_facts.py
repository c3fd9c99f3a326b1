"""What a preflight must know of the data and the tokenizer. `mpt.training.data_facts` gathers it, `mpt.planning.checks`
judges it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Count:
    """How many of `of` are so, and the first few of them in words."""

    count: int = 0
    of: int = 0
    examples: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share, 0 to 1; 0 of nothing."""
        return self.count / self.of if self.of else 0.0

    def __str__(self) -> str:
        """Say it.

        >>> str(Count(3, 200)), str(Count(1, 1_000_000))
        ('3 of 200 (1.5 %)', '1 of 1000000 (below 0.1 %)')
        """
        percent = 100 * self.share
        shown = "below 0.1" if 0 < percent < 0.1 else f"{percent:.1f}".removesuffix(".0")
        return f"{self.count} of {self.of} ({shown} %)"


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A tokenizer. `size` is its highest id and one; an id is None where it has no such token.

    `has_template` is of the chat template that came with it, `template` the name of a built-in one that is in use, and
    `marks_answers` whether the one in use has `{% generation %}`; None where no conversation is written.
    """

    size: int
    eos_id: int | None
    pad_id: int | None
    unknown_id: int | None
    has_template: bool | None = None
    template: str | None = None
    marks_answers: bool | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the data came to. Rows are the documents or conversations as they were read, samples what is trained on.

    `lost_tokens` were cut off at the sequence length, of `tokens` and these; None: nobody counted. `highest_token` is
    the largest id that occurs, -1 where there is none. `overlap` counts evaluation rows that training has too, None
    where nothing is held out. `padding` has the shares of `mpt.planning.padding`, and `now`: that of the batches as
    planned; empty where nothing is padded. `limits` says what was looked at only in part.
    """

    tokenizer: TokenizerFacts
    samples: int
    tokens: int
    empty: Count = Count()
    duplicates: Count = Count()
    truncated: Count = Count()
    lost_tokens: int | None = 0
    nothing_learnt: Count = Count()
    unknown: Count = Count()
    highest_token: int = -1
    overlap: Count | None = None
    padding: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Give the facts as JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DataFacts":
        """Read what `to_json` wrote."""
        read = dict(data)
        for name in ("empty", "duplicates", "truncated", "nothing_learnt", "unknown", "overlap"):
            value = read[name]
            read[name] = None if value is None else Count(value["count"], value["of"], tuple(value["examples"]))
        read |= {"tokenizer": TokenizerFacts(**read["tokenizer"]), "limits": tuple(read["limits"])}
        return cls(**read)
