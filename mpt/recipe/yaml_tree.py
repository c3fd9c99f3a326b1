"""YAML events -> a tree of nodes with lines: anchors, merges, duplicate keys, and limits on what a text may hold.

Plain scalars follow the core schema of YAML 1.2.2 (section 10.3.2), not PyYAML's YAML 1.1: `2e-5` is a number, `no` and
`12:30` are text. Keys are the text that was written. The events are read with a stack of our own, so nesting can't
exhaust Python's, and what aliases expand to is counted before it is built.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_VALUES = 20_000
MAX_DEPTH = 40

INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = {word: value for text, value in (("null", None), ("true", True), ("false", False))
         for word in (text, text.title(), text.upper())} | {"~": None, "": None}  # fmt: skip
STANDARD_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Flaw:
    """Something wrong at a key path. `line` counts from 1; None: that of the path."""

    path: KeyPath
    problem: str
    suggestion: str
    line: int | None = None


class UnreadableError(Exception):
    """The text can't be read to its end."""

    def __init__(self, problem: str, suggestion: str, line: int | None = None, path: KeyPath = ()) -> None:
        super().__init__(problem)
        self.flaw = Flaw(path, problem, suggestion, line)


@dataclass(slots=True, eq=False)
class Node:
    """A value of the text. `value` is a scalar, a list of nodes, or a dict of (line of the key, node)."""

    line: int
    value: Any
    text: str | None = None  # as written; None for a collection
    is_left_out: bool = False
    size: int = 1
    depth: int = 1


@dataclass(slots=True, eq=False)
class _Open:
    """A collection whose end has not come yet."""

    line: int
    anchor: str | None
    is_map: bool
    items: list[Node] = field(default_factory=list)
    entries: dict[str, tuple[int, Node]] = field(default_factory=dict)
    merged: list[Node] = field(default_factory=list)
    key: Node | None = None

    @property
    def place(self) -> KeyPath:
        if not self.is_map:
            return (len(self.items),)
        return () if self.key is None else (self.key.text or "",)


def core_value(text: str) -> Any:
    """Resolve a plain scalar by the core schema of YAML 1.2.

    >>> core_value("2e-5"), core_value("no"), core_value("0o17"), core_value("1_000"), core_value("12:30")
    (2e-05, 'no', 15, '1_000', '12:30')
    """
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        if len(text) > 300:  # Python refuses to read more than 4300 digits, and no float holds 310
            return float("inf")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class TreeBuilder:
    """Make a tree of nodes out of the parser's events."""

    def __init__(self) -> None:
        self.flaws: list[Flaw] = []
        self._open: list[_Open] = []
        self._anchors: dict[str, Node | None] = {}  # None: its collection is still open
        self._root: Node | None = None

    def build(self, events: Iterator[Any]) -> Node | None:
        handlers: dict[type, Callable[[Any], None]] = {
            yaml.ScalarEvent: self._scalar,
            yaml.AliasEvent: self._alias,
            yaml.MappingStartEvent: self._start,
            yaml.SequenceStartEvent: self._start,
            yaml.MappingEndEvent: self._end,
            yaml.SequenceEndEvent: self._end,
            yaml.DocumentStartEvent: self._document,
        }
        for event in events:
            handler = handlers.get(type(event))
            if handler is not None:
                handler(event)
        return self._root

    @property
    def _path(self) -> KeyPath:
        return tuple(part for opened in self._open for part in opened.place)

    def _document(self, event: Any) -> None:
        if self._root is not None:
            raise UnreadableError(
                "a second document begins here", "write one recipe a file, without `---`", _line(event)
            )

    def _scalar(self, event: Any) -> None:
        node = Node(_line(event), event.value, event.value)
        tag = event.tag
        if tag is None and event.implicit[0]:
            node.value = core_value(event.value)
            node.is_left_out = event.value == ""
        elif tag not in (None, "!", f"{STANDARD_TAG}str"):
            node.value = self._tagged(tag, event)
        if event.anchor:
            self._anchors[event.anchor] = node
        self._add(node)

    def _tagged(self, tag: str, event: Any) -> Any:
        value = core_value(event.value)
        kind = type(value).__name__.replace("NoneType", "null")
        if tag == f"{STANDARD_TAG}{kind}":
            return value
        if tag == f"{STANDARD_TAG}float" and kind == "int":
            return float(value)
        self._flaw(f"the tag {_tag_text(tag)} does not fit or is not known here", "remove the tag", _line(event))
        return value

    def _alias(self, event: Any) -> None:
        if event.anchor not in self._anchors:
            raise UnreadableError(f"*{event.anchor} has no anchor", f"define &{event.anchor} above", _line(event))
        node = self._anchors[event.anchor]
        if node is None:
            raise UnreadableError(f"*{event.anchor} contains itself", "write the value out", _line(event))
        self._add(node)

    def _start(self, event: Any) -> None:
        is_map = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{STANDARD_TAG}map" if is_map else f"{STANDARD_TAG}seq"):
            self._flaw(f"the tag {_tag_text(event.tag)} is not known here", "remove the tag", _line(event))
        self._open.append(_Open(_line(event), event.anchor, is_map))
        self._check_depth(len(self._open), _line(event))
        if event.anchor:
            self._anchors[event.anchor] = None

    def _end(self, event: Any) -> None:
        opened = self._open.pop()
        node = Node(opened.line, opened.items)
        children = opened.items
        if opened.is_map:
            node.value = self._merge(opened)
            children = [child for _, child in node.value.values()]
        node.size += sum(child.size for child in children)
        node.depth += max((child.depth for child in children), default=0)
        if node.size > MAX_VALUES:
            raise UnreadableError(f"more than {MAX_VALUES} values, aliases counted", "write a recipe", opened.line)
        self._check_depth(len(self._open) + node.depth, opened.line)
        if opened.anchor:
            self._anchors[opened.anchor] = node
        self._add(node)

    def _check_depth(self, depth: int, line: int) -> None:
        if depth > MAX_DEPTH + 1:
            raise UnreadableError(f"nested more than {MAX_DEPTH} deep", "check the indentation and brackets", line)

    def _merge(self, opened: _Open) -> dict[str, tuple[int, Node]]:
        entries = dict(opened.entries)
        for merged in opened.merged:
            sources = merged.value if isinstance(merged.value, list) else [merged]
            for source in sources:
                if not isinstance(source.value, dict):
                    self._flaw("`<<` takes a map or a list of maps", "write `<<: *name`", merged.line)
                    continue
                for key, entry in source.value.items():
                    entries.setdefault(key, entry)
        return entries

    def _add(self, node: Node) -> None:
        if not self._open:
            self._root = node
            return
        opened = self._open[-1]
        if not opened.is_map:
            opened.items.append(node)
        elif opened.key is None:
            if node.text is None:
                raise UnreadableError("a list or a map can't be a key", "write a word as the key", node.line)
            opened.key = node
        else:
            self._add_entry(opened, opened.key, node)
            opened.key = None

    def _add_entry(self, opened: _Open, key: Node, node: Node) -> None:
        name = key.text or ""
        if name == "<<":
            opened.merged.append(node)
        elif name in opened.entries:
            first = opened.entries[name][0]
            self._flaw(f"is given twice, in lines {first} and {key.line}", "keep one of the two", key.line)
        else:
            opened.entries[name] = (key.line, node)

    def _flaw(self, problem: str, suggestion: str, line: int) -> None:
        self.flaws.append(Flaw(self._path, problem, suggestion, line))


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _tag_text(tag: str) -> str:
    return "!!" + tag.removeprefix(STANDARD_TAG) if tag.startswith(STANDARD_TAG) else tag
