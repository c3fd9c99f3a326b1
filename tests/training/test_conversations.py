"""Which tokens of a conversation are learnt, under each built-in template and under templates as models have them."""

from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.recipe.chat_template import BUILT_IN, read_template
from mpt.training.chat_format import choose_template, ready_tokenizer
from mpt.training.collation import IGNORED
from mpt.training.conversations import ConversationWriter, encode
from mpt.training.tokenizer import train_tokenizer

TALK = [
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "What is an atom?"},
    {"role": "assistant", "content": "The simplest\n\nexpression — naïve."},
    {"role": "user", "content": "And a slice?"},
    {"role": "assistant", "content": "A range of items. "},
]
# Qwen's, without marks: every turn has its header and its end.
QWEN = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Qwen 3's habit: what was thought stands in the last answer alone.
THINKS = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Mistral's: the instruction in brackets, the answer with the end of text.
MISTRAL = """{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
{%- endfor %}"""
# A mark that ends before the token that ends the turn.
SHORT = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}
{%- generation %}{{- message.content }}{%- endgeneration %}{% else %}{{- message.content }}{% endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}"""
# Qwen 2.5's habit: a system text of its own where the conversation has none.
GREETS = "{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' if messages[0].role != 'system' }}" + QWEN
PICKY = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + QWEN


def tokenizer_for(template: str, trim_offsets: bool = False) -> Any:
    tokens = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
              "<start_of_turn>", "<end_of_turn>")  # fmt: skip
    tokenizer = train_tokenizer((topics[name] for name in sorted(topics)[:20]), 600, special_tokens=tokens)
    if trim_offsets:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = read_template(template) if template in BUILT_IN else template
    return tokenizer


def learnt(tokenizer: Any, messages: Any = TALK, train_on: str = "assistant", prompt: int = 0) -> list[str]:
    """Give each stretch of tokens that is learnt, as text; every token must be that of the template."""
    conversation = {"messages": messages, "prompt": prompt}
    ((tokens, labels),) = encode(tokenizer, [ConversationWriter(tokenizer, train_on).write(conversation, "here:1")])
    assert list(tokens) == list(tokenizer.apply_chat_template(messages)["input_ids"])
    stretches: list[list[int]] = [[]]
    for token, label in zip(tokens, labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(int(label))
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("chatml", ["The simplest\n\nexpression — naïve.<|im_end|>", "A range of items. <|im_end|>"]),
        ("llama3", ["The simplest\n\nexpression — naïve.<|eot_id|>", "A range of items.<|eot_id|>"]),
        ("gemma", ["The simplest\n\nexpression — naïve.<end_of_turn>", "A range of items.<end_of_turn>"]),
        ("zephyr", ["The simplest\n\nexpression — naïve.<|endoftext|>", "A range of items. <|endoftext|>"]),
        ("vicuna", [" The simplest\n\nexpression — naïve.<|endoftext|>", " A range of items. <|endoftext|>"]),
        ("alpaca", ["The simplest\n\nexpression — naïve.<|endoftext|>", "A range of items. <|endoftext|>"]),
        (QWEN, ["The simplest\n\nexpression — naïve.<|im_end|>", "A range of items. <|im_end|>"]),
        (MISTRAL, [" The simplest\n\nexpression — naïve.<|endoftext|>", " A range of items.<|endoftext|>"]),
        (SHORT, ["The simplest\n\nexpression — naïve.<|im_end|>", "A range of items. <|im_end|>"]),
    ],
    ids=[*BUILT_IN, "qwen", "mistral", "short marks"],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_answers_with_their_ends_are_learnt_and_nothing_else(
    template: str, answers: list[str], trim_offsets: bool
) -> None:
    tokenizer = tokenizer_for(template, trim_offsets)
    assert learnt(tokenizer) == answers
    assert learnt(tokenizer, train_on="last_assistant") == answers[-1:]
    assert learnt(tokenizer, train_on="all") == [tokenizer.apply_chat_template(TALK, tokenize=False)]


@pytest.mark.parametrize("template", BUILT_IN)
def test_a_marked_template_learns_what_transformers_marks(template: str) -> None:
    tokenizer = tokenizer_for(template)
    made = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    writer = ConversationWriter(tokenizer, "assistant")
    ((_, labels),) = encode(tokenizer, [writer.write({"messages": TALK, "prompt": 0}, "here:1")])
    assert [int(label != IGNORED) for label in labels] == made["assistant_masks"]


@pytest.mark.parametrize("template", BUILT_IN)
def test_a_built_in_template_asks_for_an_answer_as_it_writes_one(template: str) -> None:
    tokenizer = tokenizer_for(template)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    asked = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    assert whole[len(asked) :].strip().startswith("A range of items.")


def test_an_answer_that_thinks_is_found_in_the_last_turn_and_several_turns_are_refused() -> None:
    tokenizer = tokenizer_for(THINKS)
    assert learnt(tokenizer, train_on="last_assistant") == ["<think>\n\n</think>\n\nA range of items. <|im_end|>"]
    with pytest.raises(MptError, match=r"here:1: .* otherwise where more turns follow") as caught:
        learnt(tokenizer)
    assert "last_assistant" in caught.value.remedy and "generation" in caught.value.remedy


@pytest.mark.parametrize("template", [*BUILT_IN, QWEN, GREETS], ids=[*BUILT_IN, "found", "with a system text"])
def test_a_conversation_that_begins_with_an_answer_learns_no_header(template: str) -> None:
    found = learnt(tokenizer_for(template), TALK[2:])
    assert [text.strip()[:10] for text in found] == ["The simple", "A range of"]


@pytest.mark.parametrize("template", ["chatml", QWEN], ids=["marked", "found"])
def test_a_turn_of_weight_0_and_the_turns_of_a_prompt_are_not_learnt(template: str) -> None:
    tokenizer = tokenizer_for(template)
    weighed = [*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    assert learnt(tokenizer, weighed) == ["A range of items. <|im_end|>"]
    assert learnt(tokenizer, [*TALK[:4], TALK[4] | {"weight": 0}], train_on="last_assistant") == []
    assert learnt(tokenizer, prompt=4) == ["A range of items. <|im_end|>"]
    assert learnt(tokenizer, train_on="completion", prompt=4) == ["A range of items. <|im_end|>"]


def test_a_prompt_and_its_completion_stand_as_they_are_with_the_end_of_text() -> None:
    tokenizer = tokenizer_for("chatml")
    writer = ConversationWriter(tokenizer, "assistant")
    ((tokens, labels),) = encode(tokenizer, [writer.write({"text": ["2 + 2 =", " 4"]}, "here:1")])
    assert tokenizer.decode(tokens) == "2 + 2 = 4<|endoftext|>"
    assert tokenizer.decode(labels[labels != IGNORED]) == " 4<|endoftext|>"


def test_a_template_that_refuses_a_conversation_says_why_and_where() -> None:
    with pytest.raises(MptError, match=r"here:1: .*System role not supported"):
        learnt(tokenizer_for(PICKY))


def test_gemma_refuses_a_system_text_that_has_no_user_turn_to_stand_in() -> None:
    with pytest.raises(MptError, match="has no system turn"):
        learnt(tokenizer_for("gemma"), [TALK[0], TALK[2]])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_a_template_would_leave_out_are_refused(key: str) -> None:
    messages = [TALK[1], TALK[2] | {key: "It is short."}]
    with pytest.raises(MptError, match=f"here:1: the conversation has {key}, and the chat template writes none"):
        learnt(tokenizer_for("chatml"), messages)
    writes = QWEN.replace("+ message.content", f"+ (message.{key} or '') + message.content")
    assert learnt(tokenizer_for(writes), messages) == ["It is short.The simplest\n\nexpression — naïve.<|im_end|>"]
    assert learnt(tokenizer_for("chatml"), [TALK[1], TALK[2] | {key: ""}])


@pytest.mark.parametrize("wrong", ["{{ 1 / 0 }}", "{{ 9.0 ** 999 }}", "{{ range(10 ** 7) }}", "{{ messages + 1 }}"])
def test_a_template_that_fails_as_it_writes_is_one_message(wrong: str) -> None:
    with pytest.raises(MptError, match="here:1: the chat template refuses this conversation"):
        learnt(tokenizer_for(QWEN + wrong))


def test_tools_that_a_template_would_leave_out_are_refused() -> None:
    tokenizer = tokenizer_for("chatml")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [TALK[1], {"role": "assistant", "tool_calls": [call]}]
    writer = ConversationWriter(tokenizer, "assistant")
    with pytest.raises(MptError, match="here:1: the conversation has tool_calls"):
        writer.write({"messages": messages, "prompt": 0}, "here:1")
    with pytest.raises(MptError, match="here:1: the conversation has tools"):
        writer.write({"messages": TALK, "prompt": 0, "tools": [{"name": "add"}]}, "here:1")


def test_tool_calls_are_learnt_as_the_template_writes_them() -> None:
    tokenizer = tokenizer_for(
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments | tojson }}{% else %}"
        "{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [TALK[1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}, TALK[4]]
    writer = ConversationWriter(tokenizer, "assistant")
    written = writer.write({"messages": messages, "prompt": 0, "tools": [{"name": "add"}]}, "here:1")
    assert written.text.startswith('[{"name": "add"}]\n')
    assert [written.text[start:end] for start, end in written.spans] == [
        '{"a": 1}<|im_end|>',
        "A range of items. <|im_end|>",
    ]


# --- the choice of a template


@pytest.mark.parametrize(
    ("has_own", "vocabulary", "room", "learns_tokens", "chosen", "added"),
    [
        (True, (), 0, True, None, ()),
        (False, ("<|im_start|>", "<|im_end|>"), 0, False, "chatml", ()),
        (False, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), 0, False, "llama3", ()),
        (False, ("<start_of_turn>", "<end_of_turn>"), 0, False, "gemma", ()),
        (False, ("<|im_start|>",), 2, True, "chatml", ("<|im_start|>", "<|im_end|>")),
        (False, (), 1, True, "vicuna", ()),
        (False, (), 100, False, "vicuna", ()),
    ],
)
def test_the_template_follows_from_what_tokenizer_and_model_have(
    has_own: bool, vocabulary: Any, room: int, learns_tokens: bool, chosen: str | None, added: Any
) -> None:
    choice = choose_template(None, has_own=has_own, vocabulary=vocabulary, room=room, learns_tokens=learns_tokens)
    assert (choice.template, choice.added) == (chosen, added)


@pytest.mark.parametrize(("room", "learns_tokens", "says"), [(1, True, "is full"), (9, False, "frozen")])
def test_a_named_template_whose_tokens_cant_be_had_is_refused(room: int, learns_tokens: bool, says: str) -> None:
    with pytest.raises(MptError, match=says) as caught:
        choose_template("chatml", has_own=True, vocabulary=(), room=room, learns_tokens=learns_tokens)
    assert "vicuna" in caught.value.remedy


def test_the_tokenizer_gets_tokens_template_and_the_end_of_an_answer() -> None:
    tokenizer = train_tokenizer((topics[name] for name in sorted(topics)[:9]), 300)
    told = ready_tokenizer(tokenizer, "chatml", vocab_size=310, learns_tokens=True)
    assert len(tokenizer) == 302
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert learnt(tokenizer)[1] == "A range of items. <|im_end|>"
    assert ["asks for it" in told[0], "<|im_start|>" in told[1], "<|im_end|> ends an answer" in told[2]] == [True] * 3


def test_a_template_that_writes_the_date_writes_the_same_one_each_day() -> None:
    dated = "Today is {{ strftime_now('%d %b %Y') }}.\n" + QWEN
    tokenizer = tokenizer_for(dated)
    told = ready_tokenizer(tokenizer, None, vocab_size=600, learns_tokens=True)
    assert told[0] == "the chat template writes the date: it is 26 Jul 2024 in every conversation"
    written = ConversationWriter(tokenizer, "assistant").write({"messages": TALK, "prompt": 0}, "here:1")
    assert written.text.startswith("Today is 26 Jul 2024.<|im_start|>system")
    assert tokenizer.chat_template == dated  # what is saved asks for the day


def test_a_template_whose_answers_have_no_end_is_told() -> None:
    tokenizer = tokenizer_for("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    told = ready_tokenizer(tokenizer, None, vocab_size=600, learns_tokens=True)
    assert "will not learn where to stop" in told[-1]


def test_the_tokenizers_own_template_with_a_wrong_syntax_is_refused_with_the_line() -> None:
    tokenizer = tokenizer_for("{% for message in messages %}\n{{ message.content }\n{% endfor %}")
    with pytest.raises(MptError, match=":2: the chat template's syntax is wrong"):
        ready_tokenizer(tokenizer, None, vocab_size=600, learns_tokens=True)
