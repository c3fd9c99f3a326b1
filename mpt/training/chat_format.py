"""Which chat template a run writes its conversations with, and the tokenizer that goes with it.

`choose_template` decides and says why; `ready_tokenizer` gives the tokenizer its template, the tokens that it lacks,
and the end of an answer as its end of text, so that what is saved with the model answers and stops. Called by the task
sft before anything is tokenised.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mpt.errors import MptError
from mpt.recipe.chat_template import BUILT_IN, check_syntax, read_template
from mpt.training.collation import IGNORED
from mpt.training.conversations import DATE, ConversationWriter, encode, on_a_fixed_day

DEFAULT = "chatml"
WITHOUT_TOKENS = "vicuna"
ENDS_WITH_EOS = ("zephyr", "vicuna", "alpaca")
PROBE = {
    "messages": [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is so."}],
    "prompt": 0,
}


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A template by name or path, None: the tokenizer's own; the tokens to add to the tokenizer for it."""

    template: str | None
    added: tuple[str, ...]
    reason: str


def choose_template(
    asked: str | None, *, has_own: bool, vocabulary: Collection[str], room: int, learns_tokens: bool
) -> TemplateChoice:
    """Choose. `room`: how many tokens the model's vocabulary has beyond the tokenizer's; `learns_tokens`: whether the
    embeddings are trained. Raises MptError where a template that was asked for needs tokens that can't be had.

    >>> choose_template(None, has_own=False, vocabulary={"<|im_start|>", "<|im_end|>"}, room=0, learns_tokens=False)
    TemplateChoice(template='chatml', added=(), reason='the tokenizer has no chat template, but the tokens of chatml')
    """
    if asked is not None:
        missing = tuple(token for token in BUILT_IN.get(asked, ()) if token not in vocabulary)
        if missing and (not learns_tokens or len(missing) > room):
            raise MptError(
                f"data.chat_template: {asked} needs the tokens {' '.join(missing)}, which the tokenizer lacks, and "
                + ("adapters leave the embeddings frozen" if not learns_tokens else "the model's vocabulary is full"),
                remedy=f"Choose one that needs none ({', '.join(ENDS_WITH_EOS)}), or leave data.chat_template out."
                + ("" if learns_tokens else " Or train them: lora.modules_to_save: [embed_tokens, lm_head]."),
            )
        return TemplateChoice(asked, missing, "the recipe asks for it")
    if has_own:
        return TemplateChoice(None, (), "the tokenizer's own")
    for name, tokens in BUILT_IN.items():
        if tokens and all(token in vocabulary for token in tokens):
            return TemplateChoice(name, (), f"the tokenizer has no chat template, but the tokens of {name}")
    if learns_tokens and room >= len(BUILT_IN[DEFAULT]):
        return TemplateChoice(DEFAULT, BUILT_IN[DEFAULT], "the tokenizer has no chat template; its tokens are added")
    why = "the embeddings of new tokens would stay frozen" if not learns_tokens else "the model has no room for tokens"
    return TemplateChoice(WITHOUT_TOKENS, (), f"the tokenizer has no chat template, and {why}")


def ready_tokenizer(
    tokenizer: PreTrainedTokenizerBase, asked: str | None, *, vocab_size: int, learns_tokens: bool
) -> list[str]:
    """Give the tokenizer what conversations need; say what was changed. `vocab_size` is the model's.

    Raises MptError for a template that can't be had or whose syntax is wrong.
    """
    own = tokenizer.chat_template
    choice = choose_template(
        asked,
        has_own=own is not None,
        vocabulary=tokenizer.get_vocab(),
        room=vocab_size - len(tokenizer),
        learns_tokens=learns_tokens,
    )
    notices = []
    if choice.template is not None:
        if choice.template in ENDS_WITH_EOS and tokenizer.eos_token is None:
            raise MptError(
                f"the chat template {choice.template} ends an answer with the end-of-text token, and the tokenizer has "
                "none",
                remedy="Name a tokenizer with an eos_token, or a data.chat_template with a token of its own.",
            )
        tokenizer.chat_template = read_template(choice.template)
        notices.append(f"conversations are written as {choice.template}: {choice.reason}")
    else:
        for text in _texts(own):
            check_syntax(text, f"the chat template of {tokenizer.name_or_path}")
    if choice.added:
        tokenizer.add_tokens(list(choice.added), special_tokens=True)
        notices.append(f"added to the tokenizer, for the model to learn: {' '.join(choice.added)}")
    if any(on_a_fixed_day(text) != text for text in _texts(tokenizer.chat_template)):
        notices.append(f"the chat template writes the date: it is {DATE:%d %b %Y} in every conversation")
    return notices + _end_answers(tokenizer)


def _texts(template: Any) -> list[str]:
    """List the templates of a tokenizer that may have several, by their purpose."""
    return list(template.values()) if isinstance(template, dict) else [template]


def _end_answers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make the token that ends an answer the end of text, as chat models have it: generation stops there."""
    try:
        written = ConversationWriter(tokenizer, "assistant").write(PROBE, "a conversation of two turns")
    except (MptError, jinja2.TemplateError):
        return []  # the data's own conversations tell, with their places
    tokens, labels = encode(tokenizer, [written])[0]
    last = int(tokens[labels != IGNORED][-1])
    end = tokenizer.convert_ids_to_tokens(last)
    if end not in tokenizer.get_added_vocab():
        return ["the chat template ends an answer with no special token: the model will not learn where to stop"]
    if last == tokenizer.eos_token_id:
        return []
    before, tokenizer.eos_token = tokenizer.eos_token, end
    return [f"{end} ends an answer, and is the tokenizer's end of text now (before: {before})"]
