"""Conversations that come with Python: questions about its language reference and its functions, and their answers.

`builtin:python-questions` is there on every machine, so that supervised fine-tuning can be tried anywhere. Called by
`mpt.training.conversation_rows`.
"""

import builtins
import inspect
from pydoc_data.topics import topics
from typing import Any

ANSWER = 800  # characters: of a topic, the paragraphs that fit
KINDS = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, object)


def builtin_questions() -> list[dict[str, Any]]:
    """Write a conversation a topic of the reference, then one a built-in function, type or method; names in order."""
    asked = [(f"What does the Python reference say about {name}?", topics[name]) for name in sorted(topics)]
    asked += [(f"What does {name} do in Python?", said) for name, said in _described()]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": _beginning(answer)}]}
        for question, answer in asked
    ]


def _described() -> list[tuple[str, str]]:
    named = [(name, thing) for name, thing in vars(builtins).items() if not name.startswith("_")]
    named += [
        (f"{kind.__name__}.{name}", getattr(kind, name)) for kind in KINDS for name in dir(kind) if name[:1] != "_"
    ]
    found = [(name, inspect.getdoc(thing)) for name, thing in sorted(named) if callable(thing)]
    return [(name, said) for name, said in found if said]


def _beginning(text: str) -> str:
    first, *others = text.strip().split("\n\n")
    for paragraph in others:
        if len(first) + len(paragraph) > ANSWER:
            break
        first = f"{first}\n\n{paragraph}"
    return first
