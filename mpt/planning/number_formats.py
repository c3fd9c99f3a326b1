"""Which format holds weights, gradients, optimizer state and sums, given the precision and the engine. Pure.

The precision names only the format of the matrix multiplications. What else is kept in how many bits decides
whether small updates survive: an update below half a unit in the last place of a bf16 weight vanishes (Zamirai et
al. 2020, arXiv:2010.06192), and a bf16 second moment with beta2 0.999 never decays.
"""

from typing import Any

from mpt.errors import MptError
from mpt.planning.decision import Decision, Origin
from mpt.recipe.schema import LossScaleSection, PrecisionSection
from mpt.terms import Method, Precision, Strategy

SIXTEEN_BIT: dict[Precision, str] = {
    Precision.FP16: "fp16",
    Precision.BF16: "bf16",
    Precision.BF16_PURE: "bf16",
    Precision.FP8: "bf16",
    Precision.MXFP8: "bf16",
}


def choose_number_formats(
    section: PrecisionSection, precision: Precision, strategy: Strategy, method: Method, checkpoint_dtype: str | None
) -> dict[str, Decision[Any]]:
    """Decide every format of a training step but that of the matrix multiplications themselves.

    Raises MptError for a wish that the engine can't carry out.
    """
    half = SIXTEEN_BIT.get(precision)
    by_deepspeed = strategy.zero_stage is not None
    return {
        "autocast_dtype": _autocast(half, precision, by_deepspeed),
        **_stored(half, precision, by_deepspeed, method, checkpoint_dtype),
        "reduce_dtype": _sum_dtype("reduce_dtype", section.reduce_dtype, precision, strategy),
        "grad_accum_dtype": _sum_dtype("grad_accum_dtype", section.grad_accum_dtype, precision, strategy),
        "loss_scale": _loss_scale(section.loss_scale, precision, by_deepspeed),
    }


def _autocast(half: str | None, precision: Precision, by_deepspeed: bool) -> Decision[str | None]:
    if half is None:
        return Decision(None, Origin.DERIVED, f"{precision} needs no casting")
    if by_deepspeed or precision is Precision.BF16_PURE:
        return Decision(None, Origin.DERIVED, f"the weights that compute are {half} already")
    return Decision(half, Origin.DERIVED, "torch.autocast casts what the matrix multiplications read")


def _stored(
    half: str | None, precision: Precision, by_deepspeed: bool, method: Method, checkpoint_dtype: str | None
) -> dict[str, Decision[str]]:
    def every(dtype: str, reason: str) -> dict[str, Decision[str]]:
        keys = ("weights_dtype", "master_weights_dtype", "gradient_dtype", "optimizer_state_dtype")
        return {key: Decision(dtype, Origin.DERIVED, reason) for key in keys}

    if method is not Method.FULL:
        base = "the frozen base holds no update; only the adapters need fp32"
        adapters = every("fp32", "adapters are small and stay fp32")
        weights = "nf4" if method is Method.QLORA else half or "fp32"
        return adapters | {"weights_dtype": Decision(weights, Origin.DERIVED, base)}
    if half is None:
        return every("fp32", f"{precision} stores fp32")
    if precision is Precision.BF16_PURE:
        return every("bf16", "bf16_pure was asked for: no fp32 master weights")
    if by_deepspeed:
        split = every("fp32", "ZeRO keeps fp32 master weights and optimizer states, divided over the ranks")
        engine = f"DeepSpeed's {half} engine computes with {half} copies of the master weights"
        return split | {key: Decision(half, Origin.DERIVED, engine) for key in ("weights_dtype", "gradient_dtype")}
    reason = "master weights, because in 16 bits small updates would vanish"
    if checkpoint_dtype in ("bf16", "fp16"):
        reason += f" (the checkpoint is {checkpoint_dtype}; transformers alone would train in it)"
    return every("fp32", reason)


def _sum_dtype(key: str, asked: str | None, precision: Precision, strategy: Strategy) -> Decision[str]:
    what = "summed over ranks" if key == "reduce_dtype" else "accumulated over micro batches"
    if strategy.zero_stage is not None:
        if asked is not None:
            return Decision(asked, Origin.ASKED, "the recipe asks for it")
        reason = f"gradients are {what} in fp32; DeepSpeed alone would in 16 bits"
        return Decision("fp32", Origin.AUTO, reason)
    of_gradients = "bf16" if precision is Precision.BF16_PURE else "fp32"
    if asked not in (None, of_gradients):
        raise MptError(
            f"precision.{key}: {asked} was asked for, and {strategy} sums gradients as they are, in {of_gradients}",
            remedy=f"Leave precision.{key} out, or ask for `distributed: {{strategy: zero2}}`, which has the choice.",
        )
    origin = Origin.DERIVED if asked is None else Origin.ASKED
    return Decision(of_gradients, origin, f"gradients are {what} in the format of the weights")


def _loss_scale(
    section: LossScaleSection | None, precision: Precision, by_deepspeed: bool
) -> Decision[dict[str, float | int | None] | None]:
    if precision is not Precision.FP16:
        if section is not None:
            raise MptError(
                f"loss_scale was given, and the precision is {precision}, which needs none",
                remedy="Remove precision.loss_scale, or ask for `precision: {mode: fp16, loss_scale: ...}`.",
            )
        return Decision(None, Origin.DERIVED, f"{precision} has fp32's exponent range: gradients don't underflow")
    if section is None:
        reason = "dynamic: halved on an overflow, whose step is skipped; doubled after clean steps"
        section, origin = LossScaleSection(), Origin.AUTO
    else:
        reason, origin = "the recipe asks for it", Origin.ASKED
    if section.static is not None:
        return Decision({"static": section.static}, origin, reason)
    if not by_deepspeed and (section.min is not None or section.hysteresis is not None):
        raise MptError(
            "precision.loss_scale.min and .hysteresis are DeepSpeed's, and this run does not go through DeepSpeed",
            remedy="Remove them, or ask for `distributed: {strategy: zero2}`.",
        )
    return Decision(section.model_dump(exclude={"static"}), origin, reason)
