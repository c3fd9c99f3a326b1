"""A finding about a run: what is wrong, how one knows, and what to write into the recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a run that its owner may want to change. `recipe`: dotted keys with the values to write."""

    problem: str
    remedy: str
    evidence: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)


def to_lines(recipe: Mapping[str, Any]) -> list[str]:
    """Write recipe keys as YAML, dotted as overrides have them.

    >>> to_lines({"training.learning_rate": 2.5e-05, "precision": "bf16", "precision.layers": {"lm_head": "fp32"}})
    ['training.learning_rate: 2.5e-05', 'precision: bf16', 'precision.layers: {"lm_head": "fp32"}']
    """
    return [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in recipe.items()]


def times(count: int) -> str:
    """Spell how often something happened."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
