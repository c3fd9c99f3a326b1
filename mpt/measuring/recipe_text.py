"""A recipe's text with overrides and a new `precision:` block in it, every other line kept where lines allow it. Pure.

YAML can be written in ways that lines do not show, so every edit is read back, and what can't be edited is written
anew from the values as they stand in the text. Called by the command `mpt search-precision`.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import yaml

from mpt.measuring.precision_block import replace_block
from mpt.recipe.overrides import Override, apply_override, read_override
from mpt.recipe.yaml_text import read_yaml


def with_overrides(text: str, block: str, arguments: Sequence[str]) -> tuple[str, bool]:
    """Put `key.path=value` arguments and the block over a recipe's text; say whether its lines could be kept.

    Arguments about `precision` are left out: the block says it all. The arguments must be ones that a recipe takes.

    >>> with_overrides("name: a  # one\\nlora: {rank: 2}\\n", "precision: bf16\\n", ["lora.rank=3", "name=b"])
    ('name: b  # one\\nlora: {rank: 3}\\n\\nprecision: bf16\\n', True)
    """
    overrides = [override for argument in arguments if (override := read_override(argument)[0]) is not None]
    edited: str | None = text
    for override in overrides:
        if override.path[0] != "precision":
            edited = edited and _edit(edited, override)
    if edited is not None:
        return replace_block(edited, block), True
    values = deepcopy(read_yaml(text).value)
    for override in overrides:
        apply_override(values, override)
    values.pop("precision", None)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) + "\n" + block, False


def _edit(text: str, override: Override) -> str | None:
    """Change one value, in the words of the argument; None where no edit of a line says just that."""
    wanted = deepcopy(read_yaml(text).value)
    apply_override(wanted, override)
    return next((edited for edited in _edits(text, override) if _same(read_yaml(edited).value, wanted)), None)


def _edits(text: str, override: Override) -> Iterator[str]:
    """Try the key's own line, as a block and inside braces; then a new line, below its section or at the end."""
    value = override.argument.partition("=")[2].strip()
    known = read_yaml(text).lines
    lines = text.splitlines(keepends=True)
    if override.path in known:
        place = known[override.path] - 1
        key = rf"((?:^|[\s{{,])['\"]?{re.escape(override.path[-1])}['\"]?\s*:\s+)"
        for rest in (r"(?:[^\s#]|(?<!\s)#|[^\S\n]+(?![\s#]))+", r"[^,{}\[\]#\n]*[^,{}\[\]#\s]"):
            changed = re.sub(key + rest, lambda match: match[1] + value, lines[place], count=1)
            yield "".join([*lines[:place], changed, *lines[place + 1 :]])
    elif len(override.path) == 1:
        yield text + ("" if text.endswith("\n") else "\n") + f"{override.path[0]}: {value}\n"
    elif override.path[:-1] in known:
        place = known[override.path[:-1]]
        own, below = ("" if place > len(lines) else lines[place - 1]), "".join(lines[place : place + 1])
        indent = re.match(r"\s*", below)[0] if below.strip() else re.match(r"\s*", own)[0] + "  "  # type: ignore[index]
        yield "".join([*lines[:place], f"{indent}{override.path[-1]}: {value}\n", *lines[place:]])


def _same(one: Any, other: Any) -> bool:
    """Compare values with their types: 3 is not 3.0, and not true."""
    return yaml.safe_dump(one) == yaml.safe_dump(other)


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 would misread; this also quotes what YAML 1.2 reads as another type, such as 1e5."""


def _text_node(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if read_yaml(value).value == value else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text_node)
