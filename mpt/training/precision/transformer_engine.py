"""The fp8 layers of a model by NVIDIA's Transformer Engine: its linear layers with our weights, and its autocast.

Only for CUDA devices, and only where the package is installed: the names below are those of its public source (2.x,
`transformer_engine/pytorch/quantization.py` and `transformer_engine/common/recipe/__init__.py`). Its modules compute
fp8 only inside its autocast, which the caller enters around the model's forward pass.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from mpt.errors import UnsupportedError
from mpt.planning.float8 import TE_INSTALL, to_te_recipe
from mpt.training.precision.float8 import refuse_others

Context = Callable[[], AbstractContextManager[Any]]


def convert(model: nn.Module, names: frozenset[str], *, recipe: str, te: Any = None) -> int:
    """Put Transformer Engine's linear layer in the place of each named `torch.nn.Linear`, with the same parameters.

    Gives their number. `te` is `transformer_engine.pytorch`; None: imported. Raises MptError for a name that is no
    linear layer of the model, UnsupportedError without the package.
    """
    refuse_others(model, names)
    te = te or _import("transformer_engine.pytorch")

    class Linear(te.Linear):
        if recipe != "delayed":
            # These scale by what they see and have no state to save; the empty `_extra_state` entries would make
            # checkpoints of their own kind.
            get_extra_state = nn.Module.get_extra_state
            set_extra_state = nn.Module.set_extra_state

    for name in names:
        old = model.get_submodule(name)
        # On the meta device: a ZeRO-3 weight is divided and can't be copied, a whole one need not be.
        new = Linear(
            old.in_features, old.out_features, bias=old.bias is not None, params_dtype=old.weight.dtype, device="meta"
        )
        new.weight = old.weight
        if old.bias is not None:
            new.bias = old.bias
        new.name_in_model = name
        model.set_submodule(name, new.train(old.training))
    return len(names)


def autocast(recipe: str, *, te: Any = None, recipes: Any = None) -> Context:
    """Give a function that makes the context in which converted layers compute fp8.

    One recipe object serves every step: delayed scaling keys its history by it. Raises MptError for a recipe without
    an equivalent, UnsupportedError without the package or where its version lacks the recipe.
    """
    name = to_te_recipe(recipe)
    te = te or _import("transformer_engine.pytorch")
    scaling = build_recipe(name, recipes or _import("transformer_engine.common.recipe"))
    if hasattr(te, "autocast"):
        return lambda: te.autocast(enabled=True, recipe=scaling)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=scaling)  # its older name


def build_recipe(name: str, recipes: Any) -> Any:
    """Build the recipe of that class name from `transformer_engine.common.recipe`, with its version's own defaults."""
    if hasattr(recipes, name):
        return getattr(recipes, name)()
    there = sorted(known for known in vars(recipes) if known.endswith("Scaling"))
    raise UnsupportedError(
        f"the installed Transformer Engine has no recipe {name}, only {', '.join(there) or 'none'}",
        remedy=f"Install a newer one: {TE_INSTALL}",
    )


def checkpoint_contexts(context: Context) -> Callable[[], tuple[AbstractContextManager[Any], ...]]:
    """Give `torch.utils.checkpoint` its `context_fn`: the forward pass as it is, the recomputation in `context`.

    The recomputation runs in the backward pass, outside of the autocast around the model, where Transformer Engine
    would compute bf16 without a word.
    """
    return lambda: (nullcontext(), context())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a CUDA library that it loads is missing
        raise UnsupportedError(
            f"{name} can't be imported: {' '.join(str(error).split())[:300]}", remedy=f"Install it: {TE_INSTALL}"
        ) from error
