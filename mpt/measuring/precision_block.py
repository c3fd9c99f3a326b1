"""An assignment of precisions to layers -> the recipe's `precision:` block, and the recipe's text with it. Pure.

What is written is short where layers agree: a pattern for all of a kind, exact names for those that differ.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mpt.planning.modules import MATMULS, ModuleShape, matches
from mpt.recipe.schema import PrecisionSection, Recipe
from mpt.recipe.yaml_text import read_yaml

BASE = "bf16"  # what a layer computes in that the block does not name
# Of the recipe's own block these stay: they say nothing of what multiplies in which format.
KEPT_KEYS = ("allow_emulation", "reduce_dtype", "grad_accum_dtype", "master_weights")


def to_section(
    assignment: Mapping[str, str], modules: Sequence[ModuleShape], asked: PrecisionSection
) -> dict[str, Any]:
    """Write an assignment as a `precision:` block, with the keys of the asked one that still mean something.

    All in fp32 is the mode fp32; anything lower is the mode bf16, for fp8 layers hand bf16 to one another.
    """
    kept = {key: getattr(asked, key) for key in KEPT_KEYS if key in asked.model_fields_set}
    if set(assignment.values()) == {"fp32"}:
        return {"mode": "fp32", **kept}
    section: dict[str, Any] = {"mode": "bf16", **kept}
    if asked.fp8 is not None and "fp8" in assignment.values():
        fp8 = asked.fp8.model_dump(mode="json", include={"backend", "recipe"}, exclude_unset=True)
        section |= {"fp8": fp8} if fp8 else {}
    layers = to_patterns(assignment, modules)
    return section | ({"layers": layers} if layers else {})


def to_patterns(assignment: Mapping[str, str], modules: Sequence[ModuleShape]) -> dict[str, str]:
    """Name the layers that are not in bf16: by a pattern those of a kind, by name those that differ from their kind.

    The kind of `model.layers.3.mlp.up_proj` is `model.layers.*.mlp.up_proj`.
    """
    names = [module.name for module in modules if module.kind in MATMULS]
    kinds: dict[str, list[str]] = {}
    for name in assignment:
        kinds.setdefault(_kind(name), []).append(name)
    patterns: dict[str, str] = {}
    for kind, members in kinds.items():
        usual = Counter(assignment[name] for name in members).most_common(1)[0][0]
        pattern = _pattern(kind, members, names)
        if pattern is None or len(members) == 1:
            usual = BASE  # every other one by its name
        elif usual != BASE:
            patterns[pattern] = usual
        patterns |= {name: assignment[name] for name in members if assignment[name] != usual}
    return patterns


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _pattern(kind: str, members: Sequence[str], names: Sequence[str]) -> str | None:
    """Find the shortest pattern that means the members and no other layer."""
    for pattern in (f"*.{kind.rpartition('*.')[2]}", kind):
        if {name for name in names if matches(name, pattern)} == set(members):
            return pattern
    return None


def to_yaml(section: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """Write the block as YAML, under `comments`.

    >>> print(to_yaml({"mode": "bf16", "layers": {"*.mlp.up_proj": "fp8"}}, ["found"]), end="")
    # found
    precision:
      mode: bf16
      layers:
        '*.mlp.up_proj': fp8
    """
    remarks = "".join(f"# {comment}\n" for comment in comments)
    return remarks + yaml.safe_dump({"precision": dict(section)}, sort_keys=False, width=120)


def replace_block(text: str, block: str) -> str:
    """Put `block` in the place of a recipe's top-level `precision:`, or at its end; every other line stays.

    The caller reads the result back: YAML can be written in ways that lines do not show.

    >>> replace_block("model: a\\nprecision:\\n  mode: fp32\\n# text\\ndata: b\\n", "precision: x\\n")
    'model: a\\nprecision: x\\n# text\\ndata: b\\n'
    """
    line = read_yaml(text).lines.get(("precision",))
    lines = text.splitlines(keepends=True)
    if line is None:
        end = "" if text.endswith("\n") or not text else "\n"
        return f"{text}{end}\n{block}"
    after = line
    while after < len(lines) and not re.match(r"[^\s#]", lines[after]):
        after += 1
    while after > line and re.match(r"#|\s*$", lines[after - 1]):  # what stands above the next key belongs to it
        after -= 1
    return "".join([*lines[: line - 1], block, *lines[after:]])


def with_section(recipe: Recipe, section: Mapping[str, Any], **changes: Any) -> Recipe:
    """Give the recipe with another `precision:` block, checked as if it were written so; None removes a key."""
    data = recipe.model_dump(mode="json", exclude_unset=True) | {"precision": dict(section)} | changes
    return Recipe.model_validate({key: value for key, value in data.items() if value is not None})
