"""Which module computes in which precision: the recipe's patterns and fp8's choice of layers, as one list. Pure.

Islands are modules that compute in another format than the model around them. Called by `mpt.planning.plan`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.float8 import FUSED_EXPERTS, check_some_converted, choose_float8_layers
from mpt.planning.modules import MATMULS, ModuleShape, matches, near_patterns, strength
from mpt.planning.number_formats import SIXTEEN_BIT
from mpt.planning.precision import require_fp8
from mpt.recipe.schema import PrecisionSection
from mpt.terms import FP8_MODES, Feature, Precision

MLP_ENDS = ("down_proj", "wo")
# Which formats a module may have inside a model of which precision.
ISLANDS: dict[Precision, tuple[str, ...]] = {
    Precision.FP32: ("fp32", "bf16"),
    Precision.TF32: ("bf16",),
    Precision.FP16: ("fp32", "fp16", "bf16"),
    Precision.BF16: ("fp32", "bf16", "fp8"),
    Precision.BF16_PURE: ("fp32", "bf16", "fp8"),
    Precision.FP8: ("fp32", "bf16", "fp8"),
    Precision.MXFP8: ("fp32", "bf16", "fp8"),
}
# Why a format is missing above, and the modes that have it.
MISSING: dict[str, tuple[str, str]] = {
    "fp32": ("TF32 is one switch for every fp32 multiplication", "mode fp32"),
    "fp16": ("fp16 gradients need a loss scale", "mode fp16"),
    "fp8": ("fp8 layers hand bf16 to one another", "mode bf16 or fp8"),
}


def choose_layers(
    section: PrecisionSection,
    precision: Precision,
    modules: Sequence[ModuleShape] | None,
    *,
    machine: Machine,
    fp8: Mapping[str, Any] | None,
) -> Decision[dict[str, Any] | None]:
    """List every matrix multiplication and every island with its precision and the reason.

    None where the whole model computes in `precision`. `fp8` is the plan's value of that name. Raises MptError for a
    pattern that matches nothing or fights another, and for a format that the mode can't hold; UnsupportedError for one
    that the machine can't compute.
    """
    if section.layers is None and precision not in FP8_MODES:
        return Decision(None, Origin.DERIVED, f"every matrix multiplication computes in {precision}")
    assert modules is not None, "the caller learns the modules where the recipe speaks of layers"
    _check_formats(section, precision, machine)
    asked = _asked(section.layers or {}, modules)
    base = _base(precision)
    fp8_word = precision.value if precision in FP8_MODES else "fp8"
    converted: dict[str, tuple[bool, str]] = {}
    if precision in FP8_MODES:
        converted = _converted(section, modules, fp8 or {})
    listed = []
    for module in modules:
        pattern, wanted = asked.get(module.name, ("", ""))
        if wanted and not (wanted == "fp8" and _is_kept(module, pattern, section)):
            chosen, reason = (fp8_word if wanted == "fp8" else wanted), f"precision.layers: {pattern}"
            if wanted == "fp8":
                _check_convertible(module, pattern, fp8_word)
        elif module.name in converted:
            is_fp8, reason = converted[module.name]
            chosen = fp8_word if is_fp8 else base
        elif module.kind in MATMULS:
            chosen, reason = base, f"the mode is {precision}"
        elif module.kind == "experts":
            has_fp8 = precision in FP8_MODES or "fp8" in (section.layers or {}).values()
            chosen, reason = base, FUSED_EXPERTS if has_fp8 else f"the mode is {precision}"
        else:
            continue
        listed.append({"name": module.name, "precision": chosen, "reason": reason})
    if precision in FP8_MODES:
        check_some_converted({entry["name"]: (entry["precision"] == fp8_word, entry["reason"]) for entry in listed})
    origin = Origin.ASKED if section.layers else Origin.AUTO
    layers = {"modules": listed}
    return Decision(layers, origin, count_layers(layers))


def count_layers(layers: Mapping[str, Any]) -> str:
    """Count a plan's `layers` by precision, the most frequent first.

    >>> count_layers({"modules": [{"precision": "bf16"}, {"precision": "fp8"}, {"precision": "fp8"}]})
    '2 in fp8, 1 in bf16'
    """
    counts = Counter(entry["precision"] for entry in layers["modules"])
    return ", ".join(f"{number} in {name}" for name, number in counts.most_common())


def island_dtypes(layers: Mapping[str, Any] | None, precision: Precision) -> dict[str, str]:
    """Give the modules that compute in another format than the model around them, fp8 ones left out.

    >>> island_dtypes({"modules": [{"name": "lm_head", "precision": "fp32", "reason": ""}]}, Precision.BF16)
    {'lm_head': 'fp32'}
    """
    listed = () if layers is None else layers["modules"]
    base = _base(precision)
    return {
        entry["name"]: entry["precision"]
        for entry in listed
        if entry["precision"] != base and entry["precision"] not in FP8_MODES
    }


def mixed_layers(layers: Mapping[str, Any] | None, precision: Precision) -> dict[str, str]:
    """Give the modules that compute in another format than the mode's own, by name.

    >>> mixed_layers({"modules": [{"name": "lm_head", "precision": "bf16", "reason": ""}]}, Precision.FP8)
    {'lm_head': 'bf16'}
    """
    own = precision.value if precision in FP8_MODES else _base(precision)
    listed = () if layers is None else layers["modules"]
    return {entry["name"]: entry["precision"] for entry in listed if entry["precision"] != own}


def keeps_mlp_wide(layers: Mapping[str, str], modules: Sequence[ModuleShape]) -> bool:
    """Whether every layer that ends an MLP is kept out of fp16: where T5 and Gemma leave its range.

    huggingface/transformers#5651 (66246 in T5DenseReluDense) and #39972 (Gemma 3's residual growth).
    """
    ends = [module.name for module in modules if module.name.rpartition(".")[2] in MLP_ENDS]
    wide = [pattern for pattern, wanted in layers.items() if wanted != "fp16"]
    return bool(ends) and all(any(matches(name, pattern) for pattern in wide) for name in ends)


def check_tied(layers: Mapping[str, Any] | None, precision: Precision, modules: Sequence[ModuleShape] | None) -> None:
    """Raise MptError where bf16_pure would have to keep one weight in fp32 and in bf16."""
    islands = island_dtypes(layers, precision)
    if not islands or precision is not Precision.BF16_PURE:
        return
    for module in modules or ():
        if module.tied_to and (module.name in islands) != (module.tied_to in islands):
            raise MptError(
                f"precision.layers makes only one of {module.tied_to} and {module.name} fp32, and they share one "
                "weight (tied embeddings)",
                remedy="Name both, or neither.",
            )


def _base(precision: Precision) -> str:
    return SIXTEEN_BIT.get(precision, "fp32")


def _asked(layers: Mapping[str, str], modules: Sequence[ModuleShape]) -> dict[str, tuple[str, str]]:
    """Find each module's pattern and format."""
    hits: dict[str, list[str]] = {}
    for pattern, wanted in layers.items():
        for module in _meant(pattern, wanted, modules):
            hits.setdefault(module.name, []).append(pattern)
    return {name: _strongest(name, patterns, layers) for name, patterns in hits.items()}


def _meant(pattern: str, wanted: str, modules: Sequence[ModuleShape]) -> list[ModuleShape]:
    """List the modules that a pattern means: those that can compute in the format, so no norm inside an fp8 block."""
    hits = [module for module in modules if matches(module.name, pattern)]
    if not hits:
        raise _matches_nothing(pattern, modules)
    experts = next((module.name for module in hits if module.kind == "experts"), None)
    if experts is not None and wanted != "fp32" and not any(module.kind in MATMULS for module in hits):
        why = FUSED_EXPERTS if wanted == "fp8" else "fused experts compute in the model's own precision or in fp32"
        raise MptError(
            f'precision.layers: "{pattern}": {wanted} means {experts}, and {why}',
            remedy="Leave the pattern out, or ask for fp32.",
        )
    meant = [module for module in hits if wanted == "fp32" or module.kind in MATMULS]
    if not meant:
        raise MptError(
            f'precision.layers: "{pattern}": {wanted} matches no linear layer, only {hits[0].name}',
            remedy=f"{wanted} is for matrix multiplications: name linear layers, such as "
            f"{next((module.name for module in modules if module.kind in MATMULS), '*.mlp')}, or ask for fp32.",
        )
    return meant


def _strongest(name: str, patterns: Sequence[str], layers: Mapping[str, str]) -> tuple[str, str]:
    """Choose among the patterns that mean a module."""
    strongest = max(strength(pattern, name) for pattern in patterns)
    first, *others = (pattern for pattern in patterns if strength(pattern, name) == strongest)
    for other in others:
        if layers[other] != layers[first]:
            raise MptError(
                f'precision.layers: "{first}": {layers[first]} and "{other}": {layers[other]} fight over {name}',
                remedy=f"Make one of the patterns narrower, or add the module's own name: `{name}: {layers[other]}`.",
            )
    return first, layers[first]


def _matches_nothing(pattern: str, modules: Sequence[ModuleShape]) -> MptError:
    names = [module.name for module in modules]
    near = near_patterns(pattern, names)
    ends = sorted({name.rpartition(".")[2] for name in names})
    return MptError(
        f'precision.layers: "{pattern}" matches no module of the model'
        + (f"; did you mean {' or '.join(near)}?" if near else ""),
        remedy=f"A pattern is matched against whole names, such as {names[min(1, len(names) - 1)]}; they end in "
        f"{', '.join(ends[:20])}{', ...' if len(ends) > 20 else ''}.",
    )


def _check_formats(section: PrecisionSection, precision: Precision, machine: Machine) -> None:
    base = _base(precision)
    for pattern, wanted in (section.layers or {}).items():
        if wanted not in ISLANDS[precision]:
            why, modes = MISSING[wanted]
            raise MptError(
                f'precision.layers: "{pattern}": {wanted} does not go with mode {precision}: {why}',
                remedy=f"Ask for {modes}, or for {' or '.join(ISLANDS[precision])} there.",
            )
        if wanted == base or wanted not in ("bf16", "fp8") or (wanted == "fp8" and precision in FP8_MODES):
            continue  # the mode itself is checked before
        if not section.allow_emulation and not machine.all_compute(Feature(wanted)):
            raise UnsupportedError(
                f'precision.layers: "{pattern}": {wanted} was asked for and {machine.label} has no native {wanted}',
                remedy=f"Ask for {base} there, or add `allow_emulation: true` to the precision block.",
            )
        if wanted == "fp8":
            require_fp8(machine)


def _converted(
    section: PrecisionSection, modules: Sequence[ModuleShape], fp8: Mapping[str, Any]
) -> dict[str, tuple[bool, str]]:
    return choose_float8_layers(
        modules,
        recipe=fp8["recipe"],
        keep_patterns=tuple(fp8["keep_high_precision"]),
        keep_first=fp8["keep_first"],
        keep_last=fp8["keep_last"],
        auto_filter=fp8["auto_filter"],
    )


def _check_convertible(module: ModuleShape, pattern: str, fp8_word: str) -> None:
    if module.kind != "linear":
        what = "a Conv1D, which has no fp8 kernel" if module.kind == "conv1d" else "a subclass of torch.nn.Linear"
        raise MptError(
            f'precision.layers: "{pattern}": {module.name} is {what}',
            remedy="Leave it out: fp8 is for torch.nn.Linear.",
        )
    multiple = 32 if fp8_word == Precision.MXFP8 else 16
    if module.in_features % multiple or module.out_features % multiple:
        raise MptError(
            f'precision.layers: "{pattern}": {module.name} is {module.in_features} x {module.out_features}, and '
            f"{fp8_word} kernels need multiples of {multiple}",
            remedy="Leave it out, or change the model's sizes.",
        )


def _is_kept(module: ModuleShape, pattern: str, section: PrecisionSection) -> bool:
    """Whether `keep_high_precision` means a module more closely than the pattern that asks for fp8.

    Raises MptError where both mean it equally closely.
    """
    kept_by = [kept for kept in section.fp8.keep_high_precision if matches(module.name, kept)] if section.fp8 else []
    if not kept_by:
        return False
    kept = max(kept_by, key=lambda kept: strength(kept, module.name))
    if strength(kept, module.name) == strength(pattern, module.name):
        raise MptError(
            f'precision.layers: "{pattern}": fp8 and precision.fp8.keep_high_precision: "{kept}" fight over '
            f"{module.name}",
            remedy="Make one of the patterns narrower: a module's own name goes before the name of what holds it, and "
            "that before wildcards.",
        )
    return strength(kept, module.name) > strength(pattern, module.name)
