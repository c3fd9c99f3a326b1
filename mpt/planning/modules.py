"""The modules of a model by name and size, for decisions about single layers. Learnt from the model itself, built on
the meta device by a child process (`mpt.training.facts`), and remembered by the content it follows from.

`learn_modules` is called where a recipe speaks of layers (`precision.layers`, fp8); other plans do without.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mpt.planning.model_facts import ask_about_modules
from mpt.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module that holds parameters of its own.

    `kind` is "linear", "conv1d" (GPT-2's transposed linear layer), "embedding" or "other"; `in_features` and
    `out_features` are 0 where it multiplies no matrix. `tied_to` names the module whose parameter this one shares.
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
    if not recipe.precision.needs_modules:
        return None
    answer = ask_about_modules(recipe, cache=cache, run_child=run_child, environ=environ)
    return tuple(ModuleShape(**entry) for entry in answer)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a module: by its own name, or by that of a module that holds it.

    >>> matches("model.layers.3.mlp.down_proj", "*.mlp"), matches("lm_head", "lm_*"), matches("lm_head", "head")
    (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
