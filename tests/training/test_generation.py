"""A conversation becomes a prompt that fits the model."""

from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.training.generation import to_prompt
from mpt.training.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer((topics[name] for name in sorted(topics)[:20]), 400)


@pytest.fixture(scope="module")
def chatting(tokenizer: Any) -> Any:
    made = train_tokenizer((topics[name] for name in sorted(topics)[:20]), 400)
    made.chat_template = TEMPLATE
    return made


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(count)]


def prompt(tokenizer: Any, messages: list[dict[str, str]], new: int = 8, positions: int | None = None) -> Any:
    is_chat = tokenizer.chat_template is not None
    return to_prompt(tokenizer, messages, max_new_tokens=new, max_positions=positions, is_chat=is_chat)


def test_a_conversation_goes_through_the_chat_template(chatting: Any) -> None:
    made = prompt(chatting, [{"role": "system", "content": "be kind"}, *turns(3)])
    text = chatting.decode(made.tokens)
    assert text.startswith("<system>be kind") and text.endswith("<user>turn 2<|endoftext|><assistant>")
    assert (made.room, made.dropped, made.is_cut) == (8, 0, False)


def test_without_a_template_the_last_text_is_continued(tokenizer: Any) -> None:
    assert tokenizer.decode(prompt(tokenizer, turns(3)).tokens) == "turn 2"
    assert prompt(tokenizer, [{"role": "user", "content": ""}]).tokens == [tokenizer.eos_token_id]


def test_the_oldest_turns_go_first_and_the_system_message_stays(chatting: Any) -> None:
    messages = [{"role": "system", "content": "be kind"}, *turns(7)]
    whole = len(prompt(chatting, messages).tokens)
    made = prompt(chatting, messages, positions=whole)
    text = chatting.decode(made.tokens)
    assert made.dropped == 2 and not made.is_cut
    assert "be kind" in text and "turn 0" not in text and "turn 1" not in text and "turn 2" in text
    assert len(made.tokens) + made.room <= whole


@pytest.mark.parametrize("positions", [2, 3, 10, 11])
def test_a_text_that_is_too_long_loses_its_beginning(tokenizer: Any, positions: int) -> None:
    made = prompt(tokenizer, [{"role": "user", "content": "lambda expressions yield function objects"}], 100, positions)
    assert made.is_cut and len(made.tokens) == positions - 1 and made.room == 1
