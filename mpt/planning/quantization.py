"""What of a frozen model is quantised, and in what it computes. Pure.

bitsandbytes quantises every linear layer but the output head. Called by `mpt.planning.plan`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.linear_shapes import block_linears
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import MATMULS, ModuleShape, ends_of, is_named, near_patterns
from mpt.planning.number_formats import SIXTEEN_BIT
from mpt.recipe.schema import QuantizationSection, Recipe
from mpt.terms import Feature, Precision, Task

INSTALL = "pip install 'bitsandbytes>=0.50.2'"


def choose_quantization(
    recipe: Recipe,
    precision: Precision,
    machine: Machine,
    facts: ModelFacts,
    modules: Sequence[ModuleShape] | None,
    packages: frozenset[str] | None,
    islands: Mapping[str, str],
) -> Decision[dict[str, Any] | None]:
    """Decide how the frozen weights are quantised; None where they are not.

    `layers` is how many linear layers are quantised, None where nobody knows; `skipped` names those that are not, None:
    the output head alone. Raises UnsupportedError where the machine or the installation has no bitsandbytes, MptError
    for a layer to skip that the model has not, and for one that is to be quantised and to compute in a format of its
    own.
    """
    section = recipe.quantization
    if section is None:
        return Decision(None, Origin.DERIVED, "no quantization block")
    if not machine.all_compute(Feature.BITSANDBYTES):
        raise UnsupportedError(
            f"quantization was asked for, and bitsandbytes has no kernels for {machine.label}",
            remedy="Remove the quantization block: adapters train on 16-bit weights too.",
        )
    if packages is not None and "bitsandbytes" not in packages:
        raise UnsupportedError("quantization was asked for, and bitsandbytes is not installed here", remedy=INSTALL)
    skipped = _skipped(section.skip_modules, modules)
    _check_islands(islands, skipped or (), modules)
    compute = SIXTEEN_BIT.get(precision, "fp32")
    value: dict[str, Any] = {"bits": section.bits, "type": section.dtype, "compute_dtype": compute}
    if section.bits == 4:
        value |= {"double_quantization": section.double_quantization, "storage_dtype": section.storage_dtype}
        reason = f"4 bits and a constant for each 64 weights; multiplied in {compute}, the precision's format"
    else:
        value |= {"threshold": section.int8_threshold}
        reason = f"LLM.int8; the gradient of a layer's input is multiplied in {compute}"
    value |= {"skipped": skipped, "layers": _count(recipe, facts, modules, skipped or ())}
    return Decision(value, Origin.ASKED, reason)


def quantized_parameters(facts: ModelFacts, section: QuantizationSection, modules: Sequence[ModuleShape] | None) -> int:
    """Count the weights that are quantised: those of the blocks' linear layers, less what is skipped."""
    left = [m for m in modules or () if m.kind in MATMULS and any(is_named(m.name, s) for s in section.skip_modules)]
    return facts.linear_parameters - sum(module.in_features * module.out_features for module in left)


def _skipped(asked: Sequence[str], modules: Sequence[ModuleShape] | None) -> list[str] | None:
    """Name the linear layers that stay whole, by their whole names: transformers reads patterns in a way of its own."""
    if not asked or modules is None:
        return None
    linear = [module for module in modules if module.kind in MATMULS]
    for name in asked:
        if not any(is_named(module.name, name) for module in linear):
            near = near_patterns(name, [module.name for module in linear])
            raise MptError(
                f"quantization.skip_modules: {name} is no linear layer of the model, and holds none",
                remedy=f"Did you mean {' or '.join(near)}?" if near else f"Its layers are {ends_of(linear)}.",
            )
    return [m.name for m in linear if m.is_head or m.tied_to or any(is_named(m.name, name) for name in asked)]


def _check_islands(islands: Mapping[str, str], skipped: Sequence[str], modules: Sequence[ModuleShape] | None) -> None:
    for module in modules or ():
        if module.name in islands and module.kind in MATMULS and not module.is_head and module.name not in skipped:
            raise MptError(
                f"precision.layers has {module.name} compute in {islands[module.name]}, and it is quantised",
                remedy="Name it in quantization.skip_modules too, or remove it from precision.layers.",
            )


def _count(
    recipe: Recipe, facts: ModelFacts, modules: Sequence[ModuleShape] | None, skipped: Sequence[str]
) -> int | None:
    if modules is not None:
        whole = [m for m in modules if m.kind in ("linear", "conv1d") and not (m.is_head or m.tied_to)]
        return sum(module.name not in skipped for module in whole)
    shapes, is_known = block_linears(facts)
    skips = recipe.quantization is not None and recipe.quantization.skip_modules
    has_head = recipe.task in (Task.CAUSAL_LM, Task.SFT)
    return facts.layers * len(shapes) if is_known and has_head and not skips else None
