"""A row of a data set -> a conversation, whichever of the known layouts it has. Pure, without torch.

A conversation is a plain map, so that it can be kept as JSON: `messages` ({role, content, ...}) with `prompt`, how many
of them are given and never learnt, and `tools` where the row has some; or `text`, a prompt and its completion that are
taken as they stand. Called by `mpt.training.conversation_rows`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
# The words of ShareGPT and its kin (LLaMA-Factory 0.9, axolotl) -> roles.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
# Layout -> the columns that a row of it must have. data.messages_column renames the one column of a conversation.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
MESSAGE_KEYS = '{"role": "user", "content": "..."}'


class BadRowError(ValueError):
    """A row that is no conversation: what is wrong with it, and what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def columns_of(layout: str, messages_column: str) -> tuple[str, ...]:
    """Name the columns that a row of a layout must have.

    >>> columns_of("sharegpt", "messages"), columns_of("sharegpt", "chat")
    (('conversations',), ('chat',))
    """
    if layout == "messages" or (layout == "sharegpt" and messages_column != "messages"):
        return (messages_column,)
    return LAYOUTS[layout]


def layout_of(columns: Sequence[str], messages_column: str) -> str | None:
    """Know a layout by the columns; None where it is none of the known ones.

    >>> layout_of(["id", "conversations"], "messages"), layout_of(["text"], "messages")
    ('sharegpt', None)
    """
    for layout in LAYOUTS:
        if set(columns_of(layout, messages_column)) <= set(columns):
            return layout
    return None


def known_layouts(messages_column: str) -> str:
    """List the layouts with their columns, for a message."""
    return "; ".join(f"{layout} ({', '.join(columns_of(layout, messages_column))})" for layout in LAYOUTS)


def to_conversation(row: Mapping[str, Any], layout: str, messages_column: str, *, needs_answer: bool) -> dict[str, Any]:
    """Make a conversation of a row. Raises BadRowError, also for one without an answer where it `needs_answer`."""
    missing = [name for name in columns_of(layout, messages_column) if row.get(name) is None]
    if missing:
        raise BadRowError(
            f"has no {' and no '.join(missing)} (it has {', '.join(row) or 'nothing'}), which {layout} needs",
            "One source has one layout: mend the row, or move rows of another layout into a file of their own.",
        )
    made = _MAKERS[layout](row, messages_column)
    if "text" in made:
        return made
    tools = _tools(row.get("tools"))
    if tools:
        made["tools"] = tools
    learnable = made["messages"][made["prompt"] :]
    if needs_answer and not any(map(_is_answer, learnable)):
        raise BadRowError(
            "has no answer to learn from: no assistant turn with text, and of a weight above 0",
            "Remove the row, give it an answer, or learn every token with data.train_on: all.",
        )
    return made


def _is_answer(message: Mapping[str, Any]) -> bool:
    said = message.get("content", "").strip() or message.get("tool_calls")
    return bool(message["role"] == "assistant" and said and message.get("weight") != 0)


# --- the layouts


def _from_messages(row: Mapping[str, Any], messages_column: str) -> dict[str, Any]:
    return {"messages": _messages(row[messages_column], messages_column), "prompt": 0}


def _from_prompt_completion(row: Mapping[str, Any], messages_column: str) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRowError("has an empty completion: there is nothing to learn from", "Remove the row.")
        return {"text": [prompt, completion]}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    if isinstance(completion, str):
        after = [{"role": "assistant", "content": completion}]
    else:
        after = _messages(completion, "completion")
    return {"messages": [*before, *after], "prompt": len(before)}


def _from_alpaca(row: Mapping[str, Any], messages_column: str) -> dict[str, Any]:
    said = {name: "" if row.get(name) is None else row[name] for name in ("instruction", "input", "output", "system")}
    for name, value in said.items():
        _check_text(value, name)
    messages = [{"role": "system", "content": said["system"]}] if said["system"] else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        raise BadRowError(
            "history holds something else than pairs of texts", "Write it as [[instruction, output], ...]."
        )
    for turn in history:
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = "\n\n".join(filter(None, (said["instruction"], said["input"])))
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said["output"]}]
    return {"messages": messages, "prompt": 0}


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _from_sharegpt(row: Mapping[str, Any], messages_column: str) -> dict[str, Any]:
    (column,) = columns_of("sharegpt", messages_column)
    turns = row[column]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return {"messages": _messages(turns, column), "prompt": 0}
    _check_list(turns, column, '{"from": "human", "value": "..."}')
    messages = [_sharegpt_message(turn, f"{column}[{number}]") for number, turn in enumerate(turns)]
    system = row.get("system")
    if system:
        _check_text(system, "system")
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "prompt": 0}


_MAKERS = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
}


# --- messages


def _messages(found: Any, name: str) -> list[dict[str, Any]]:
    _check_list(found, name, MESSAGE_KEYS)
    return [_message(message, f"{name}[{number}]") for number, message in enumerate(found)]


def _check_list(found: Any, name: str, example: str) -> None:
    if not isinstance(found, list):
        raise BadRowError(f"{name} is {_kind(found)}, not a list of messages", f"Write it as [{example}, ...].")
    if not found:
        raise BadRowError(f"{name} is an empty list", "Remove the row, or give it its messages.")
    for number, message in enumerate(found):
        if not isinstance(message, dict):
            raise BadRowError(f"{name}[{number}] is {_kind(message)}, not a message", f"Write it as {example}.")


def _message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    role = message.get("role")
    if role is None:
        instead = "Set data.layout: sharegpt." if "from" in message else f"Write it as {MESSAGE_KEYS}."
        raise BadRowError(f"{name} has no role (it has {', '.join(message) or 'nothing'})", instead)
    if role not in ROLES:
        meant = SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
        hint = f"write {meant}" if meant in ROLES else "write one of these"
        raise BadRowError(
            f"{name} has the role {role!r}, which is unknown", f"The roles are {', '.join(ROLES)}; {hint}."
        )
    made = {key: value for key, value in message.items() if value is not None} | _weight(message, name)
    if "tool_calls" in made:
        made["tool_calls"] = [_tool_call(call, f"{name}.tool_calls") for call in _list(made, "tool_calls", name)]
        if not made["tool_calls"]:
            del made["tool_calls"]
    if "content" in made:
        made["content"] = _text(made["content"], f"{name}.content")
    elif role != "assistant" or "tool_calls" not in made:
        raise BadRowError(f"{name} has no content", f"Write it as {MESSAGE_KEYS}.")
    return made


def _sharegpt_message(turn: Mapping[str, Any], name: str) -> dict[str, Any]:
    speaker = turn.get("from")
    if speaker is None:
        raise BadRowError(
            f"{name} has no `from`, which says who speaks (it has {', '.join(turn)})",
            'Write it as {"from": "human", "value": "..."}.',
        )
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise BadRowError(
            f"{name} is from {speaker!r}, which is unknown", f"Known speakers are {', '.join(SHAREGPT_ROLES)}."
        )
    if turn.get("value") is None:
        raise BadRowError(f"{name} has no value", 'Write it as {"from": "human", "value": "..."}.')
    role, text = SHAREGPT_ROLES[speaker], _text(turn["value"], f"{name}.value")
    weight = _weight(turn, name)
    if role != "function_call":
        return {"role": role, "content": text} | weight
    call = _json(text, f"{name}.value")
    calls = call if isinstance(call, list) else [call]
    if not calls:
        raise BadRowError(f"{name}.value holds no call", 'Write {"name": "...", "arguments": {}}, or remove the turn.')
    return {"role": "assistant", "tool_calls": [_tool_call(one, f"{name}.value") for one in calls]} | weight


def _weight(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read whether a turn is learnt, in OpenAI's words: 1, or 0 for one that is not."""
    weight = message.get("weight")
    if weight is None:
        return {}
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise BadRowError(f"{name} has the weight {weight!r}", "Write 1, or 0 for a turn that is not to be learnt.")
    return {"weight": weight}


def _text(content: Any, name: str) -> str:
    """Take a text, or join OpenAI's list of text parts."""
    if isinstance(content, list):
        if not content:
            raise BadRowError(f"{name} is an empty list", "Write a text.")
        return "".join(_part(part, f"{name}[{number}]") for number, part in enumerate(content))
    _check_text(content, name)
    return str(content)


def _part(part: Any, name: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRowError(f"{name} is {kind}, and sft learns from text alone", 'Write {"type": "text", "text": "..."}.')
    return str(part["text"])


def _check_text(content: Any, name: str) -> None:
    if not isinstance(content, str):
        raise BadRowError(f"{name} is {_kind(content)}, not text", "Write a text; numbers and maps go into quotes.")


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """Bring a call into the form that chat templates read: {type, function: {name, arguments as a map}}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(
            f"{name} holds a call without a name",
            'Write {"type": "function", "function": {"name": "...", "arguments": {}}}.',
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}: arguments")
    if not isinstance(arguments, dict):
        raise BadRowError(f"{name}: arguments is {_kind(arguments)}, not a map", "Write them as a map, by name.")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}}


def _tools(found: Any) -> list[dict[str, Any]]:
    """Read a row's tools: a list of JSON schemas, or its JSON text."""
    if isinstance(found, str) and found.strip():
        found = _json(found, "tools")
    if not found:
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRowError(f"tools is {_kind(found)}, not a list of JSON schemas", "Write a list of maps, or its JSON.")
    return found


def _list(message: Mapping[str, Any], key: str, name: str) -> list[Any]:
    found = message[key]
    if not isinstance(found, list):
        raise BadRowError(f"{name}.{key} is {_kind(found)}, not a list", "Write a list.")
    return found


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{name} is not JSON: {error.msg} at column {error.colno}", "Mend it.") from error


def _kind(value: Any) -> str:
    """Say in a word what a value is.

    >>> _kind(None), _kind([]), _kind({}), _kind(3), _kind("a")
    ('null', 'a list', 'a map', 'a number', 'a text')
    """
    if value is None:
        return "null"
    kinds = {list: "a list", dict: "a map", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)
