"""By which kernels fp8 is computed: backend, scaling recipe, emulation, torch.compile. Pure.

Which layers are converted is `mpt.planning.float8`'s.
"""

from typing import Any

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin
from mpt.planning.float8 import check_backend, recomputes
from mpt.recipe.schema import Float8Section, PrecisionSection
from mpt.terms import FP8_MODES, DeviceKind, Feature, Precision

RULED = ("tensorwise", "rowwise")  # recipes for which torchao published which layers gain


def choose_float8(
    section: PrecisionSection, precision: Precision, machine: Machine, packages: frozenset[str] | None
) -> Decision[dict[str, Any] | None]:
    """Decide how fp8 is computed; None where nothing is.

    Raises UnsupportedError for a backend that is not installed or can't run here, MptError for a recipe it lacks.
    """
    has_layers = "fp8" in (section.layers or {}).values()
    if precision not in FP8_MODES and not has_layers:
        return Decision(None, Origin.DERIVED, f"nothing computes in fp8 in {precision}")
    asked = section.fp8 or Float8Section()
    is_mx = precision is Precision.MXFP8
    backend = asked.backend or ("transformer_engine" if is_mx else "torchao")
    recipe = asked.recipe or ("mxfp8" if is_mx else "tensorwise")
    emulated = not machine.all_compute(Feature.MXFP8 if is_mx else Feature.FP8)
    check_backend(
        backend,
        recipe,
        is_cpu=machine.is_cpu,
        is_cuda=machine.kind is DeviceKind.CUDA,
        emulated=emulated,
        packages=packages,
    )
    value: dict[str, Any] = {"backend": backend, "recipe": recipe, "emulated": emulated}
    if precision in FP8_MODES:  # else precision.layers names every fp8 layer
        value |= {
            "keep_high_precision": list(asked.keep_high_precision),
            "keep_first": asked.keep_first,
            "keep_last": asked.keep_last,
            # The rule is of speed, and emulation has none.
            "auto_filter": (not emulated and recipe in RULED) if asked.auto_filter is None else asked.auto_filter,
        }
    reason = "by torchao's float8 kernels" if backend == "torchao" else "by NVIDIA's Transformer Engine"
    if emulated:
        reason = "EMULATED: this machine has no fp8 units; right numbers, slower than bf16"
    origin = Origin.AUTO if section.fp8 is None else Origin.ASKED
    return Decision(value, origin, reason)


def check_recomputed(fp8: dict[str, Any] | None, *, gradient_checkpointing: bool) -> None:
    """Raise MptError where the backward pass would compute a forward pass again that fp8 can't repeat."""
    if fp8 is None or not gradient_checkpointing:
        return
    repeats, reason = recomputes(fp8["backend"], fp8["recipe"])
    if not repeats:
        raise MptError(
            f"gradient checkpointing does not go with precision.fp8.recipe {fp8['recipe']}: {reason}",
            remedy="Ask for precision.fp8.recipe tensorwise, or for `gradient_checkpointing: false`.",
        )
