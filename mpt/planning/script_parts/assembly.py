"""Join pieces of Python text into one file: their imports at its head, once each; values written as literals.

A piece is a `.py.txt` beside this module, or a module of `mpt.training.precision` that needs torch alone; the latter is
read as text, never imported. Called by `mpt.planning.script`.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from textwrap import wrap
from typing import Any

WIDTH = 100
WIDEST = 120
PARTS = "mpt.planning.script_parts"
EMBEDDED = "mpt.training.precision"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a script: what it imports, as (module, name, alias); its text without them; what it defines."""

    imports: frozenset[tuple[str, str, str]]
    text: str
    names: tuple[str, ...]


def part(name: str) -> Piece:
    """Read a piece that stands beside this module."""
    return _split(files(PARTS).joinpath(f"{name}.py.txt").read_text(encoding="utf-8"), name)


def embed(name: str) -> Piece:
    """Take the text of `mpt.training.precision.<name>` as it stands; its docstring becomes a comment at its head.

    Imports of modules in the same package are left out: whoever embeds one embeds those too (`needed_by`). Raises
    ValueError for a module that imports anything else of mpt: its text alone would not run.
    """
    piece = _split(_module_text(name), name)
    foreign = sorted({module for module, _, _ in piece.imports if module.startswith("mpt") and not _is_sibling(module)})
    if foreign:
        raise ValueError(f"{EMBEDDED}.{name} can't stand alone: it imports {', '.join(foreign)}")
    kept = frozenset(entry for entry in piece.imports if not _is_sibling(entry[0]))
    return Piece(kept, piece.text, piece.names)


def needed_by(names: Iterable[str]) -> list[str]:
    """List the modules to embed for `names`: each after those that it imports."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        for module, imported, _ in sorted(_split(_module_text(name), name).imports):
            if _is_sibling(module):
                visit(module.removeprefix(f"{EMBEDDED}.") if module != EMBEDDED else imported)
        if name not in ordered:
            ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def join(pieces: Iterable[Piece]) -> tuple[str, str]:
    """Give the import lines of all pieces, and their texts, two blank lines apart.

    Raises ValueError where two pieces define one name: the later would silently replace the earlier.
    """
    pieces = list(pieces)
    seen: set[str] = set()
    for name in (name for piece in pieces for name in piece.names):
        if name in seen:
            raise ValueError(f"two pieces of the script define {name}")
        seen.add(name)
    imports = frozenset().union(*(piece.imports for piece in pieces))
    return _import_lines(imports), "\n\n\n".join(piece.text for piece in pieces)


def code(text: str) -> Piece:
    """Make a piece of text that was composed, not read."""
    return _split(text, "")


def literal(value: Any, *, indent: int = 0, before: int = 0, comments: Mapping[str, str] | None = None) -> str:
    """Write a JSON value as Python, over several lines where it does not fit on one.

    `before` counts the characters that stand on the line before it; `comments` go with the keys of the outermost map.

    >>> print(literal({"betas": [0.9, 0.999], "fused": True}))
    {"betas": [0.9, 0.999], "fused": True}
    """
    flat = _flat(value)
    if not comments and (len(flat) + before + indent <= WIDTH or not isinstance(value, (Mapping, list, tuple))):
        return flat
    inner = " " * (indent + 4)
    lines = []
    if isinstance(value, Mapping):
        opening, closing = "{", "}"
        for key, item in value.items():
            start = f"{_flat(key)}: "
            line = f"{inner}{start}{literal(item, indent=indent + 4, before=len(start))},"
            lines.append(_with_comment(line, (comments or {}).get(key), inner))
    else:
        opening, closing = "[", "]"
        lines = [f"{inner}{literal(item, indent=indent + 4)}," for item in value]
    return "\n".join([opening, *lines, " " * indent + closing])


def comment(text: str, *, indent: str = "", first: str = "# ", rest: str = "# ") -> str:
    """Write prose as comment lines; control characters, which could end a comment, are written as blanks.

    >>> comment("one\\ntwo")
    '# one two'
    """
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    lines = wrap(
        plain,
        WIDTH,
        initial_indent=indent + first,
        subsequent_indent=indent + rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) or (indent + first).rstrip()


def _with_comment(line: str, said: str | None, indent: str) -> str:
    if said is None:
        return line
    if "\n" not in line and len(line) + len(said) + 4 <= WIDTH:
        return f"{line}  # {said}"
    return f"{comment(said, indent=indent)}\n{line}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flat(key)}: {_flat(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flat(item) for item in value) + "]"
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)  # a JSON string is a Python string in double quotes
        return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _module_text(name: str) -> str:
    return files("mpt").joinpath(str(PurePosixPath("training", "precision", f"{name}.py"))).read_text(encoding="utf-8")


def _is_sibling(module: str) -> bool:
    return module == EMBEDDED or module.startswith(f"{EMBEDDED}.")


def _split(source: str, name: str) -> Piece:
    """Take the imports at the top level out of a source, and turn its docstring into comments."""
    tree = ast.parse(source)
    lines = source.splitlines()
    imports: set[tuple[str, str, str]] = set()
    names: list[str] = []
    said = ast.get_docstring(tree)
    for node in tree.body:
        is_docstring = node is tree.body[0] and said is not None
        if isinstance(node, ast.Import):
            imports |= {(alias.name, "", alias.asname or "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {(node.module or "", alias.name, alias.asname or "") for alias in node.names}
        elif not is_docstring:
            names += _defined(node)
            continue
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")
    if said is not None:
        paragraphs = [comment(" ".join(paragraph.split())) for paragraph in said.split("\n\n")]
        text = "\n#\n".join([f"# --- {name}", *paragraphs]).replace("\n#\n", "\n", 1) + f"\n\n\n{text}"
    return Piece(frozenset(imports), text, tuple(names))


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _import_lines(imports: frozenset[tuple[str, str, str]]) -> str:
    """Write imports as isort orders them: the standard library first; whole modules before names out of modules."""
    future = [entry for entry in imports if entry[0] == "__future__"]
    standard = [
        entry for entry in imports if entry[0].partition(".")[0] in sys.stdlib_module_names and entry not in future
    ]
    others = [entry for entry in imports if entry not in standard and entry not in future]
    return "\n\n".join("\n".join(_section(part)) for part in (future, standard, others) if part)


def _section(imports: list[tuple[str, str, str]]) -> list[str]:
    whole = sorted((module, alias) for module, name, alias in imports if not name)
    lines = [f"import {module} as {alias}" if alias else f"import {module}" for module, alias in whole]
    modules = sorted({module for module, name, _ in imports if name}, key=str.lower)
    for module in modules:
        found = {(name, alias) for where, name, alias in imports if where == module and name}
        lines += _from_lines(
            module, [f"{name} as {alias}" if alias else name for name, alias in sorted(found, key=_rank)]
        )
    return lines


def _from_lines(module: str, names: list[str]) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 88:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in names), ")"]


def _rank(entry: tuple[str, str]) -> tuple[int, str, str]:
    """Constants, then classes, then the rest, as ruff's `order-by-type`."""
    name = entry[0]
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name.lower(), entry[1]
