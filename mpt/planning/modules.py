"""The modules of a model by name and size, for decisions about single layers. Learnt from the model itself, built on
the meta device by a child process (`mpt.training.facts`), and remembered by the content it follows from.

`learn_modules` is called where a recipe speaks of layers (`precision.layers`, fp8, adapters and quantisation by name);
other plans do without.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mpt.planning.model_facts import ask_about_modules
from mpt.recipe.schema import Recipe

# torch's linear layer itself, a subclass of it, and GPT-2's transposed linear layer.
MATMULS = ("linear", "linear subclass", "conv1d")
WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module that holds parameters of its own.

    `kind` is one of MATMULS, or "experts" (a mixture's, fused: each of its parameters is a matrix per expert),
    "embedding" or "other"; `in_features` and `out_features` are 0 where it is none of MATMULS. `tied_to` names the
    module whose parameter this one shares.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    parameters: int
    is_head: bool = False
    tied_to: str | None = None


def learn_modules(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    run_child: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[ModuleShape, ...] | None:
    """List the recipe's modules in the model's order; None where the recipe's plan does not depend on them.

    Raises MptError for a model that could not be learnt.
    """
    if not recipe.needs_modules:
        return None
    answer = ask_about_modules(recipe, cache=cache, run_child=run_child, environ=environ)
    return tuple(ModuleShape(**entry) for entry in answer)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a module: by its own name, or by that of a module that holds it.

    >>> matches("model.layers.3.mlp.down_proj", "*.mlp"), matches("lm_head", "lm_*"), matches("lm_head", "head")
    (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_named(name: str, word: str) -> bool:
    """Whether a word names a module as peft and transformers do: its whole name, its ending, or what holds it.

    >>> [is_named("model.layers.3.mlp.down_proj", word) for word in ("down_proj", "mlp", "model.layers.3", "proj")]
    [True, True, True, False]
    """
    return f".{word}." in f".{name}."


def strength(pattern: str, name: str) -> int:
    """Rank a pattern that means a module: its own name, then the name of what holds it, then wildcards.

    >>> strength("lm_head", "lm_head"), strength("model", "model.norm"), strength("*.norm", "model.norm")
    (2, 1, 0)
    """
    return 2 if pattern == name else 0 if WILDCARDS & set(pattern) else 1


def near_patterns(pattern: str, names: Sequence[str]) -> list[str]:
    """Propose up to two patterns that mean some of `names` and resemble one that means none.

    >>> near_patterns("LM_haed", ["model.embed_tokens", "lm_head"]), near_patterns("modle", ["model.norm", "lm_head"])
    (['lm_head'], ['model'])
    """
    # What would match: whole names, and their parts behind a wildcard; the first part stands for itself.
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    known = {part.lower(): form for part in parts for form in (part, f"*.{part}") if _means_any(form, names)}
    known |= {name.lower(): name for name in names}
    plain = "".join(sign for sign in pattern if sign not in WILDCARDS).strip(".").lower()
    for word in (plain.rpartition(".")[2], plain):
        near = [word] if word in known else get_close_matches(word, sorted(known), 2, 0.6)
        if near:
            return [known[found] for found in near]
    return []


def ends_of(modules: Sequence[ModuleShape]) -> str:
    """List the last parts of modules' names, each once."""
    return ", ".join(sorted({module.name.rpartition(".")[2] for module in modules}))


def _means_any(pattern: str, names: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names)
