"""Text from a model: the prompt as tokens, room for the answer, greedy or drawn. For samples and for the chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued. `dropped` messages were left out, oldest first; `is_cut`: the beginning of the rest too.

    `room` is how many tokens may follow.
    """

    tokens: list[int]
    room: int
    dropped: int = 0
    is_cut: bool = False


def to_prompt(
    tokenizer: Any, messages: Messages, *, max_new_tokens: int, max_positions: int | None, is_chat: bool
) -> Prompt:
    """Turn a conversation into tokens by the tokenizer's chat template; `is_chat` False: the last message is the text.

    A conversation that leaves less than a quarter of the model's positions loses its oldest turns, the system message
    never. Raises ValueError and jinja2's errors where the template refuses the conversation.
    """
    kept = list(messages)
    first = 1 if kept[0]["role"] == "system" else 0
    tokens = _encode(tokenizer, kept, is_chat)
    if max_positions is None:
        return Prompt(tokens, max_new_tokens)
    longest = max_positions - min(max_new_tokens, max(1, max_positions // 4))
    while len(tokens) > longest and len(kept) - first > 2:
        del kept[first : first + 2]
        tokens = _encode(tokenizer, kept, is_chat)
    cut = tokens[-(max_positions - 1) :]
    room = min(max_new_tokens, max_positions - len(cut))
    return Prompt(cut, room, len(messages) - len(kept), len(cut) < len(tokens))


def _encode(tokenizer: Any, messages: Messages, is_chat: bool) -> list[int]:
    if is_chat:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = messages[-1]["content"]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) or [tokenizer.eos_token_id or 0]


def generate(
    model: Any, tokenizer: Any, prompt: Prompt, *, device: torch.device, temperature: float, **keywords: Any
) -> list[int]:
    """Generate after a prompt and give the new tokens. Temperature 0 takes the likeliest token each time."""
    tokens = torch.tensor([prompt.tokens], device=device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": temperature}
    # What a model's own generation_config says of drawing would be warned about.
    likeliest = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=prompt.room,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=end_tokens(model, tokenizer),
            **(drawn if temperature > 0 else likeliest),
            **keywords,
        )
    return list(written[0][len(prompt.tokens) :].tolist())


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """List the tokens that end a text: the model's, and the tokenizer's, which a chat template may have changed."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
        listed.append(tokenizer.eos_token_id)
    return listed or None
