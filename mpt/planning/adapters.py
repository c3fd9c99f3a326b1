"""Which layers get an adapter, and how many parameters are trained: decided before torch is there. Pure.

The words of `lora.target_modules` become whole names here, so that the worker's peft has nothing to interpret; only
`all-linear` of a common family is left to it, and counted by formula. Called by `mpt.planning.plan` and, for what a
layout needs, by `mpt.planning.sharding`.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mpt.errors import MptError
from mpt.planning.decision import Decision, Origin
from mpt.planning.linear_shapes import block_linears
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import MATMULS, WILDCARDS, ModuleShape, ends_of, is_named, near_patterns
from mpt.planning.number_formats import SIXTEEN_BIT
from mpt.planning.quantization import quantized_parameters
from mpt.recipe.schema import LoraSection, Recipe
from mpt.terms import Precision, Strategy, Task

# What peft trains beside the adapters of a sequence classifier (peft 0.21, PeftModelForSequenceClassification).
CLASSIFIER_HEADS = ("classifier", "score")


def choose_adapters(
    recipe: Recipe, facts: ModelFacts, modules: Sequence[ModuleShape] | None
) -> Decision[dict[str, Any] | None]:
    """Decide the layers and count what is trained; None without adapters.

    `layers`: how many have an adapter, None where nobody knows. `trainable_parameters` is exact where `is_exact`, and
    else what a block of the usual shape would have. `inputs` and `outputs` sum the adapted layers' widths. Raises
    MptError for a word that means no linear layer, and for an adapter file that does not fit the model.
    """
    section = recipe.lora
    if section is None:
        return Decision(None, Origin.DERIVED, "no lora block: every weight is trained")
    if section.adapter is not None:
        return _continued(section.adapter, facts, modules)
    saved = _saved(section, recipe, modules)
    if modules is None:
        shapes, is_known = block_linears(facts)
        value = _value([(section.rank, *shape) for shape in shapes] * facts.layers, section.dora)
        if (
            not is_known or recipe.needs_modules
        ):  # what is asked for by name, where nobody knows the names: at most this
            value |= {"layers": None, "is_exact": False}
    else:
        adapted = _adapted(section, modules, [name for name, _ in saved])
        ranks = _ranks(section, [module.name for module in adapted])
        value = _value([(ranks[m.name], m.in_features, m.out_features) for m in adapted], section.dora)
        if section.names_modules:
            value["target_modules"] = [module.name for module in adapted]
        if section.bias != "none":
            value["trainable_parameters"] += sum(m.parameters - m.in_features * m.out_features for m in adapted)
            value["is_exact"] = section.bias == "lora_only"
    value["trainable_parameters"] += sum(count for _, count in saved)
    value |= _saved_words(section, modules)
    return Decision(value, Origin.ASKED, _reason(value, facts, f"rank {section.rank}"))


def _value(shapes: Sequence[tuple[int, ...]], dora: bool) -> dict[str, Any]:
    """Count adapters of these (rank, in, out): rank x (in + out), and with DoRA a size for each output."""
    count = sum(rank * (into + out) + (out if dora else 0) for rank, into, out in shapes)
    return {
        "layers": len(shapes),
        "trainable_parameters": count,
        "is_exact": True,
        "target_modules": "all-linear",
        "inputs": sum(into for _, into, _ in shapes),
        "outputs": sum(out for _, _, out in shapes),
    }


def _reason(value: Mapping[str, Any], facts: ModelFacts, how: str) -> str:
    trained = value["trainable_parameters"]
    about = "" if value["is_exact"] else "about "
    where = f"{value['layers']} linear layers" if value["layers"] is not None else "the linear layers"
    beside = f" and {', '.join(value['modules_to_save'])} whole" if value.get("modules_to_save") else ""
    share = trained / (facts.parameters + trained)
    return f"{where}, {how}{beside}: {about}{trained:,} parameters are trained, {share:.2%} of the model"


def _continued(path: str, facts: ModelFacts, modules: Sequence[ModuleShape] | None) -> Decision[dict[str, Any] | None]:
    found = facts.adapter
    assert found is not None, "mpt.planning.model_facts reads the adapter that the recipe names"
    _check_fits(path, found, modules)
    value = _value([tuple(shape) for shape in found["layers"].values()], dora=False)
    value |= {
        "trainable_parameters": found["parameters"],
        "modules_to_save": found["modules_to_save"],
        "ties_weights": False,
    }
    return Decision(value, Origin.ASKED, _reason(value, facts, f"going on from {path}, rank {found['rank']}"))


def _check_fits(path: str, adapter: Mapping[str, Any], modules: Sequence[ModuleShape] | None) -> None:
    """Raise MptError for the first layer of an adapter that the model has not, or has in another size."""
    if modules is None:
        return
    known = {module.name: module for module in modules}
    for name, (_, into, out) in adapter["layers"].items():
        module = known.get(name)
        if module is None:
            problem = f"it has an adapter for {name}, which this model has not"
        elif (module.in_features, module.out_features) != (into, out):
            problem = f"its {name} is for {into} x {out}, and here it is {module.in_features} x {module.out_features}"
        else:
            continue
        raise MptError(
            f"lora.adapter: {path} is for another model: {problem}",
            remedy="Name the model that it was trained on, or leave lora.adapter out.",
        )


def _saved(section: LoraSection, recipe: Recipe, modules: Sequence[ModuleShape] | None) -> list[tuple[str, int]]:
    """List what is trained whole: (name, parameters), tied weights once."""
    if modules is None:
        return []
    words = list(section.modules_to_save)
    for word in words:
        if not any(is_named(module.name, word) for module in modules):
            _refuse("modules_to_save", word, modules)
    if recipe.task is Task.SEQUENCE_CLASSIFICATION:
        words += CLASSIFIER_HEADS
    named = [module for module in modules if any(is_named(module.name, word) for word in words)]
    names = {module.name for module in named}
    if recipe.quantization is not None:
        skipped = recipe.quantization.skip_modules
        for module in named:
            if module.kind in MATMULS and not module.is_head and not any(is_named(module.name, s) for s in skipped):
                raise MptError(
                    f"lora.modules_to_save: {module.name} is quantised, and can't be trained whole",
                    remedy="Name it in quantization.skip_modules too, or leave it out.",
                )
    return [(m.name, 0 if m.tied_to in names else m.parameters) for m in named]


def _saved_words(section: LoraSection, modules: Sequence[ModuleShape] | None) -> dict[str, Any]:
    """Say what peft is to train whole, and whether a tied table and head stay one.

    peft ties what it copies only where the table goes by this name (peft 0.21, EMBEDDING_LAYER_NAMES).
    """
    words = list(section.modules_to_save)
    tied = next((m for m in modules or () if m.tied_to is not None), None)
    if tied is None or not any(is_named(name, word) for name in (tied.name, str(tied.tied_to)) for word in words):
        return {"modules_to_save": words, "ties_weights": False}
    table = str(tied.tied_to).rpartition(".")[2]
    if table != "embed_tokens":
        raise MptError(
            f"lora.modules_to_save: the model's {tied.name} is its {table} (tied weights), and peft would train both",
            remedy=f"Leave {tied.name} and {table} out, or train every weight: remove the lora block.",
        )
    others = [word for word in words if not is_named(tied.name, word) and word != table]
    return {"modules_to_save": [table, *others], "ties_weights": True}


def _adapted(section: LoraSection, modules: Sequence[ModuleShape], saved: Sequence[str]) -> list[ModuleShape]:
    linear = [module for module in modules if module.kind in MATMULS and module.name not in saved]
    if section.is_all_linear:
        chosen = [module for module in linear if not module.is_head]
    else:
        chosen = _meant("target_modules", section.target_modules, linear)
    if section.exclude_modules:
        excluded = {module.name for module in _meant("exclude_modules", section.exclude_modules, linear)}
        chosen = [module for module in chosen if module.name not in excluded]
    if section.layers_to_transform is not None:
        blocks = {block_of(module.name) for module in linear} - {None}
        for number in section.layers_to_transform:
            if number not in blocks:
                raise MptError(
                    f"lora.layers_to_transform: the model has no block {number}",
                    remedy=f"Its {len(blocks)} blocks are counted from 0.",
                )
        chosen = [module for module in chosen if block_of(module.name) in section.layers_to_transform]
    if not chosen:
        raise MptError(
            "lora: exclude_modules and layers_to_transform leave no layer that target_modules means",
            remedy=f"The linear layers are {ends_of(linear)}.",
        )
    return chosen


def check_strategy(recipe: Recipe, facts: ModelFacts, strategy: Strategy, precision: Precision) -> None:
    """Raise MptError for adapters that ZeRO-3, which divides every weight, can't make or train."""
    section = recipe.lora
    if section is None or strategy is not Strategy.ZERO3:
        return
    remedy = "Ask for `distributed: {strategy: zero2}` or ddp."
    if section.changes_base:
        raise MptError(
            f"lora.init {section.init} takes a part out of each weight, and under zero3 no rank has a whole one",
            remedy=remedy,
        )
    if section.merge:
        raise MptError("lora.merge needs whole weights to merge into, and under zero3 no rank has them", remedy=remedy)
    saved = section.modules_to_save or (facts.adapter or {}).get("modules_to_save")
    if precision in SIXTEEN_BIT and (saved or section.bias != "none"):
        what = "modules_to_save" if saved else "bias"
        raise MptError(
            f"lora.{what} trains weights of the model in fp32, and under zero3 its {SIXTEEN_BIT[precision]} layers "
            "can't multiply by them",
            remedy=f"{remedy} Under zero3 `precision: fp32` does.",
        )


def trained_sizes(recipe: Recipe, facts: ModelFacts, modules: Sequence[ModuleShape] | None) -> dict[str, Any]:
    """Give the fields of `mpt.planning.workload.Workload` that follow from adapters and quantised weights."""
    adapters = choose_adapters(recipe, facts, modules).value
    if adapters is None:
        return {}
    sizes = {
        "adapter_parameters": adapters["trainable_parameters"],
        "adapter_inputs": adapters["inputs"],
        "adapter_outputs": adapters["outputs"],
        "has_dora": (recipe.lora is not None and recipe.lora.dora) or bool((facts.adapter or {}).get("dora")),
    }
    if recipe.quantization is not None:
        sizes["quantized_parameters"] = quantized_parameters(facts, recipe.quantization, modules)
    return sizes


def block_of(name: str) -> int | None:
    """Find the number of the block that a module stands in: the first number of its name.

    >>> block_of("model.layers.3.experts.7.up_proj"), block_of("lm_head")
    (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _meant(key: str, words: str | Sequence[str], linear: Sequence[ModuleShape]) -> list[ModuleShape]:
    """Find the linear layers that a text or a list of `lora.<key>` means; each word must mean some."""
    if isinstance(words, str):
        pattern = re.compile(words)
        found = [module for module in linear if pattern.fullmatch(module.name)]
        if not found and not any(is_named(module.name, words) for module in linear):
            _refuse(key, words, linear, "; a text is a regular expression for whole names")
        return found or [module for module in linear if is_named(module.name, words)]
    for word in words:
        if not any(means(module.name, word) for module in linear):
            _refuse(key, word, linear)
    return [module for module in linear if any(means(module.name, word) for word in words)]


def means(name: str, word: str) -> bool:
    """Whether a word of a list means a module: by its whole name, its ending or what holds it; `*` is anything.

    >>> [means("model.layers.3.mlp.up_proj", word) for word in ("up_proj", "mlp", "layers.3.*", "*.q_proj")]
    [True, True, True, False]
    """
    if not WILDCARDS & set(word):
        return is_named(name, word)
    return any(fnmatchcase(name, pattern) for pattern in (word, f"*.{word}", f"{word}.*", f"*.{word}.*"))


def _refuse(key: str, word: str, modules: Sequence[ModuleShape], how: str = "") -> None:
    near = near_patterns(word, [module.name for module in modules])
    what = "module" if key == "modules_to_save" else "linear layer"
    raise MptError(
        f"lora.{key}: {word} means no {what} of the model{how}",
        remedy=f"Did you mean {' or '.join(near)}? " * bool(near) + f"Its {what}s are {ends_of(modules)}.",
    )


def _ranks(section: LoraSection, names: Sequence[str]) -> dict[str, int]:
    """Give each layer its rank: that of the first pattern that means it (peft/utils/other.py, get_pattern_key)."""
    for key, patterns in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for pattern in patterns:
            if not any(_is_pattern_of(pattern, name) for name in names):
                raise MptError(
                    f"lora.{key}: {pattern} means no layer that gets an adapter",
                    remedy="Write the ending of a layer's name, such as down_proj, or a regular expression for it.",
                )
    return {
        name: next((rank for key, rank in section.rank_pattern.items() if _is_pattern_of(key, name)), section.rank)
        for name in names
    }


def _is_pattern_of(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
