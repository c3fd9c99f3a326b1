"""Conversations -> tokens, and labels for those that are learnt. Called by `mpt.training.tasks.sft`.

The whole conversation is written by the chat template and encoded once, exactly as `apply_chat_template` does it; which
of its characters are learnt says which tokens are. A template with `{% generation %}` says so itself; of any other the
answers are found by writing the conversation up to each of them, which needs a template that writes the beginning of a
conversation the same way whatever follows. A token that is learnt in part is learnt.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mpt.errors import MptError
from mpt.training.collation import IGNORED

DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""What day it is in every conversation, where a template writes the date: that of Llama 3.1's own template."""
TODAY = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")
"""What a message may say beside its content, in the words of the templates on the hub (Qwen 3, gpt-oss)."""
Tokens = np.ndarray[Any, np.dtype[np.int32]]
Span = tuple[int, int]
"""Characters of a text, from the first to behind the last."""


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as one text, and the characters of it that are learnt."""

    text: str
    spans: tuple[Span, ...]
    adds_special_tokens: bool = False
    """Whether the tokenizer puts its own around the text; a chat template has written them."""


class ConversationWriter:
    """Writes conversations as text by the tokenizer's chat template; `train_on` as in the recipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.ends = tuple(token for token in tokenizer.get_added_vocab() if token.strip())
        """What a template may end an answer with."""

    def write(self, conversation: dict[str, Any], place: str) -> Written:
        """Write a conversation. Raises MptError, naming the `place`, where the template can't."""
        if "text" in conversation:
            return self._as_it_stands(*conversation["text"])
        messages, tools = conversation["messages"], conversation.get("tools")
        try:
            return self._by_template(messages, tools, conversation["prompt"], place)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise MptError(
                f"{place}: the chat template refuses this conversation: {' '.join(str(error).split())[:400]}",
                remedy="Mend the conversation, or set data.chat_template to a template that takes it.",
            ) from error

    def _as_it_stands(self, prompt: str, completion: str) -> Written:
        text = f"{prompt}{completion}{self.tokenizer.eos_token or ''}"
        return Written(text, ((0 if self.train_on == "all" else len(prompt), len(text)),), adds_special_tokens=True)

    def _by_template(self, messages: list[dict[str, Any]], tools: Any, prompt: int, place: str) -> Written:
        template = self._template(tools)
        _check_nothing_is_lost(template, messages, tools, place)
        text, marked = self._render(messages, tools, template)
        if self.train_on == "all":
            return Written(text, ((0, len(text)),))
        if self.train_on == "completion":
            start = self._start(text, messages, tools, prompt, place)
            return Written(text, (self._with_its_end(text, (start, len(text))),))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = answers[-1:] if self.train_on == "last_assistant" else answers
        learnt = [i for i in asked if i >= prompt and messages[i].get("weight") != 0]
        if len(marked) == len(answers):
            spans = {i: span for i, span in zip(answers, marked, strict=True) if i in learnt}
        else:
            spans = {i: self._found(text, messages, tools, i, place) for i in learnt}
        return Written(text, tuple(self._with_its_end(text, span) for span in spans.values()))

    def _template(self, tools: Any) -> str:
        return on_a_fixed_day(self.tokenizer.get_chat_template(tools=tools))

    def _render(self, messages: Sequence[Any], tools: Any, template: str, **keys: Any) -> tuple[str, list[Span]]:
        """Write messages as `apply_chat_template` would; with what `{% generation %}` marks."""
        has_marks = not keys and MARKS.search(template) is not None
        texts, marks = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=has_marks,
            **self.tokenizer.special_tokens_map,
            **keys,
        )
        return texts[0], [tuple(span) for span in marks[0]] if has_marks else []

    def _found(self, text: str, messages: list[dict[str, Any]], tools: Any, answer: int, place: str) -> Span:
        """Find an answer by what the template writes up to it, and through it."""
        start = self._start(text, messages, tools, answer, place)
        if answer == len(messages) - 1:
            return start, len(text)
        through, _ = self._render(messages[: answer + 1], tools, self._template(tools))
        return start, self._checked_prefix(text, through, answer, place)

    def _start(self, text: str, messages: list[dict[str, Any]], tools: Any, first: int, place: str) -> int:
        """Find where message `first` begins behind its header, which is what asks for an answer."""
        template = self._template(tools)
        if first == 0:
            return self._start_of_all(text, tools, template)
        before, _ = self._render(messages[:first], tools, template)
        shortest = self._checked_prefix(text, before, first, place)
        asked, _ = self._render(messages[:first], tools, template, add_generation_prompt=True)
        # What asks for an answer may say more than stands before one that is given, such as a <think>.
        return max(shortest, _common_prefix(text, asked))

    def _start_of_all(self, text: str, tools: Any, template: str) -> int:
        """Find where a conversation's very first message begins, if it is an answer: behind the first header."""
        question = [{"role": "user", "content": "Is it so?"}]
        before, _ = self._render(question, tools, template)
        asked, _ = self._render(question, tools, template, add_generation_prompt=True)
        header = asked.removeprefix(before)
        found = text.find(header)
        return 0 if found < 0 else found + len(header)

    def _checked_prefix(self, text: str, prefix: str, number: int, place: str) -> int:
        if text.startswith(prefix):
            return len(prefix)
        raise MptError(
            f"{place}: the chat template writes what comes before message {number} otherwise where more turns follow, "
            "and marks no answers with {% generation %}: mpt can't tell which tokens are an answer",
            remedy="Set data.chat_template to a built-in one or to one with {% generation %} around the answers, or "
            "set data.train_on: last_assistant or all.",
        )

    def _with_its_end(self, text: str, span: Span) -> Span:
        """Let a span end with the token that ends the turn: neither short of it nor with the blanks behind it."""
        start, end = span
        following = next((token for token in self.ends if text.startswith(token, end)), None)
        written = text[start:end]
        if written.rstrip().endswith(self.ends):
            return start, start + len(written.rstrip())
        return (start, end + len(following)) if following else span


def encode(tokenizer: PreTrainedTokenizerBase, written: Sequence[Written]) -> list[tuple[Tokens, Tokens]]:
    """Encode texts; give the tokens of each, and labels that are IGNORED where nothing is learnt."""
    if not tokenizer.is_fast:
        raise MptError(
            f"the tokenizer {type(tokenizer).__name__} can't say which characters a token holds, as sft needs",
            remedy="Name a fast tokenizer with `tokenizer:`, one with a tokenizer.json.",
        )
    encoded = {adds: _encodings(tokenizer, written, adds) for adds in (False, True)}
    return [_labelled(one, *next(encoded[one.adds_special_tokens])) for one in written]


def _encodings(tokenizer: Any, written: Sequence[Written], adds: bool) -> Iterator[tuple[list[int], list[Span]]]:
    texts = [one.text for one in written if one.adds_special_tokens is adds]
    if texts:
        made = tokenizer(texts, add_special_tokens=adds, return_offsets_mapping=True, verbose=False)
        yield from zip(made["input_ids"], made["offset_mapping"], strict=True)


def _labelled(written: Written, ids: Sequence[int], offsets: Sequence[Span]) -> tuple[Tokens, Tokens]:
    tokens = np.asarray(ids, np.int32)
    learnt = np.zeros(len(written.text) + 1, np.int32)
    for start, end in written.spans:
        learnt[start + 1 : end + 1] = 1
    learnt = learnt.cumsum()  # how many of the characters before this one are learnt
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], places[:, 1]
    # Some tokenizers leave blanks out of a token's offsets, so that one of blanks alone ends where it begins.
    starts = np.where(starts < ends, starts, np.maximum(ends - 1, 0))
    return tokens, np.where(learnt[ends] > learnt[starts], tokens, IGNORED).astype(np.int32)


def on_a_fixed_day(template: str) -> str:
    """Let a template write one date: conversations that change overnight would be other data to a run that goes on.

    >>> on_a_fixed_day('{{ strftime_now("%d %b %Y") }}, {{ strftime_now(\\'%Y\\') }}')
    "{{ '26 Jul 2024' }}, {{ '2024' }}"
    """
    return TODAY.sub(lambda found: repr(DATE.strftime(ast.literal_eval(found[1]))), template)


def _check_nothing_is_lost(template: str, messages: Sequence[dict[str, Any]], tools: Any, place: str) -> None:
    """Refuse what the template would leave out without a word."""
    found = {name for name in BESIDE_CONTENT if any(message.get(name) for message in messages)}
    for name in sorted(found | ({"tools"} if tools else set())):
        if name not in template:
            raise MptError(
                f"{place}: the conversation has {name}, and the chat template writes none",
                remedy="Leave data.chat_template out where the tokenizer's own writes them, or give one that does.",
            )


def _common_prefix(one: str, other: str) -> int:
    """Count the characters that both texts begin with.

    >>> _common_prefix("abcd", "abx")
    2
    """
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)
