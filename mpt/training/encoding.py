"""Texts -> tokens. Called where tables are prepared, also in processes of their own (`mpt.training.shards`), which have
the tokenizer from its text and import no transformers.
"""

import json
from typing import TYPE_CHECKING, Any

import datasets
from tokenizers import Tokenizer

from mpt.training.row_files import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = "length"
"""The column that says how many tokens a row had before it was cut."""


class Encoder:
    """Texts -> tokens, a row a document: marked as the tokenizer marks one, or with an end of text after it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, marks_text: bool) -> None:
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self.marks_text = marks_text
        self.identity = (identify(tokenizer), marks_text)
        self._end = [] if tokenizer.eos_token_id is None or marks_text else [tokenizer.eos_token_id]
        # One token has no next one to predict, and marks alone are no text.
        self._fewest = 1 + tokenizer.num_special_tokens_to_add() if marks_text else 2
        self._backend = _plain_backend(tokenizer)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Encode the texts; those without a visible character are left out."""
        texts = [text for text in texts if text.strip()]
        if not texts:
            return []
        if self._backend is None:
            assert self.tokenizer is not None
            rows = self.tokenizer(texts, add_special_tokens=self.marks_text)["input_ids"]
        else:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=self.marks_text)
            rows = [encoding.ids for encoding in found]
        return [row + self._end for row in rows] if self._end else rows

    def is_enough(self, row: list[int]) -> bool:
        """Whether a row teaches anything by itself."""
        return len(row) >= self._fewest

    def cut(self, row: list[int], limit: int) -> list[int]:
        """Truncate a row; the mark at its end stays."""
        if len(row) <= limit or not self.marks_text:
            return row[:limit]
        return [*row[: limit - 1], row[-1]]

    def __getstate__(self) -> dict[str, Any]:
        if self._backend is None:
            return self.__dict__
        return self.__dict__ | {"tokenizer": None, "_backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if state["_backend"] is not None:
            self._backend = Tokenizer.from_str(state["_backend"])


class TokenRows:
    """Prepares a table of documents: the tokens of each, at most `limit` of them where one is given."""

    def __init__(self, encode: Encoder, limit: int | None) -> None:
        self.encode = encode
        self.limit = limit

    @property
    def identity(self) -> tuple[Any, ...]:
        return ("tokenised-4", *self.encode.identity, self.limit)

    @property
    def features(self) -> datasets.Features:
        features: dict[str, Any] = {"input_ids": datasets.List(datasets.Value("int32"))}
        if self.limit is not None:
            features[LENGTH] = datasets.Value("int32")
        return datasets.Features(features)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = self.encode(batch[TEXT])
        if self.limit is None:
            return {"input_ids": rows}
        limit = self.limit
        rows = [row for row in rows if self.encode.is_enough(row)]
        return {"input_ids": [self.encode.cut(row, limit) for row in rows], LENGTH: [len(row) for row in rows]}


def identify(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Write down what a tokenizer does; its pickle changes with use."""
    # Not in the engine's own text, and they change what comes out.
    settings = (tokenizer.eos_token_id, tokenizer.split_special_tokens, tokenizer.truncation_side)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"{tokenizer.name_or_path} {sorted(tokenizer.get_vocab().items())} {settings}"
    # How it last truncated and padded is state, and no part of what it does.
    parts = json.loads(backend.to_str()) | {"truncation": None, "padding": None, "settings": settings}
    return json.dumps(parts, ensure_ascii=False)


def _plain_backend(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
    """Give a copy of the tokenizer's own engine where a call of the tokenizer does nothing beyond asking it.

    Asked directly it takes less time: no offsets, no masks, no encodings that are kept (transformers 5.23).
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = type(tokenizer)
    is_plain = (
        issubclass(kind, TokenizersBackend)
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )
    if not is_plain:
        return None
    try:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # noqa: BLE001 - parts written in Python have no text; tokenizers raises nothing narrower
        return None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend
