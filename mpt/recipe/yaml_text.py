"""YAML -> plain values, with the line of every key. What the keys mean is not known here."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mpt.recipe.yaml_tree import Flaw, KeyPath, Node, TreeBuilder, UnreadableError

MAX_BYTES = 2**20
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# The scanner's words -> ours.
SYNTAX = (
    ("mapping values are not allowed", "a second `: ` in the line", "put the text that contains `: ` in quotes"),
    ("could not find expected ':'", "a line without `: `", "write `key: value`"),
    ("did not find expected key", "the indentation or a bracket does not fit", "indent the keys of one map alike"),
    ("expected <block end>", "the indentation or a bracket does not fit", "indent the keys of one map alike"),
    ("did not find expected ','", "a bracket is opened and never closed, or a comma is missing", "close the bracket"),
    ("unexpected end of stream", "a quote is opened and never closed", "close the quote"),
    ("undefined alias", "an alias without an anchor", "define it above with `&name`"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """What a text says: plain values, the line of each key path, and what is wrong with it as YAML."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    flaws: tuple[Flaw, ...] = ()
    is_readable: bool = True


def read_yaml(raw: bytes | str) -> Document:
    """Read one YAML document. What is wrong with it comes back as flaws, never as an exception."""
    try:
        text = raw if isinstance(raw, str) else _decode(raw)
        _check_characters(text)
        builder = TreeBuilder()
        try:
            root = builder.build(yaml.parse(text, Loader=LOADER))
        except yaml.YAMLError as error:
            raise _syntax_error(error, text) from None
    except UnreadableError as error:
        return Document(None, flaws=(error.flaw,), is_readable=False)
    if root is None:
        return Document(None)
    lines: dict[KeyPath, int] = {}
    flaws = builder.flaws
    value = _plain(root, (), root.line, lines, flaws)
    return Document(value, lines, tuple(flaws))


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise UnreadableError("is larger than a mebibyte", "give a recipe: a short YAML file")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UnreadableError("is UTF-16", "save it as UTF-8", 1)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UnreadableError(f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8", line) from None


def _check_characters(text: str) -> None:
    found = UNPRINTABLE.search(text)
    if found:
        line = text[: found.start()].count("\n") + 1
        raise UnreadableError(f"the character U+{ord(found[0]):04X} has no place in YAML", "remove it", line)


def _syntax_error(error: yaml.YAMLError, text: str) -> UnreadableError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = None if mark is None else mark.line + 1
    lines = text.splitlines()
    near = lines[max(0, (line or 1) - 2) : line]
    if any(re.match(r" *\t", one) for one in near):
        return UnreadableError("a tab in the indentation", "indent with spaces", line)
    said = getattr(error, "problem", None) or str(error)
    if "mapping values are not allowed" in said and line and len(re.findall(r":(?:\s|$)", lines[line - 1])) < 2:
        return UnreadableError("is indented deeper than the line above allows", "indent keys of one map alike", line)
    for words, problem, suggestion in SYNTAX:
        if words in said:
            if "never closed" in problem and getattr(error, "context_mark", None):
                line = error.context_mark.line + 1  # type: ignore[attr-defined]
            return UnreadableError(problem, suggestion, line)
    return UnreadableError(f"is not YAML: {said}", "put text that holds any of : # [ ] { } @ ` in quotes", line)


def _plain(node: Node, path: KeyPath, line: int, lines: dict[KeyPath, int], flaws: list[Flaw]) -> Any:
    lines[path] = line
    if isinstance(node.value, dict):
        entries = node.value.items()
        return {key: _plain(child, (*path, key), key_line, lines, flaws) for key, (key_line, child) in entries}
    if isinstance(node.value, list):
        return [_plain(child, (*path, i), child.line, lines, flaws) for i, child in enumerate(node.value)]
    if node.is_left_out and path:
        flaws.append(
            Flaw(path, "has no value", "write one, or remove the line; `{}` gives a section its defaults", line)
        )
    if isinstance(node.value, float) and not abs(node.value) < float("inf"):
        flaws.append(Flaw(path, f"{node.text} is not a finite number", "write a number that a float can hold", line))
    return node.value
