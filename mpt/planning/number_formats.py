"""Which format holds weights, gradients, optimizer state and sums, given the precision and the engine. Pure.

The precision names only the format of the matrix multiplications. What else is kept in how many bits decides
whether small updates survive: an update below half a unit in the last place of a bf16 weight vanishes (Zamirai et
al. 2020, arXiv:2010.06192), and a bf16 moment with a beta near 1 stops short of its average.
"""

from collections.abc import Mapping
from typing import Any

from mpt.errors import MptError
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.moments import MAX_ERROR, moment_error, moments_fit_bf16
from mpt.recipe.schema import LossScaleSection, PrecisionSection
from mpt.terms import FP8_MODES, Method, Precision, Strategy

# The AdamW of torch, under both names that TrainingArguments has for it.
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
# Those of torch that keep their states in the format of the weights.
TORCH_OTHERS = ("sgd", "adagrad", "rmsprop")
FP16_MAX = 65504.0
SIXTEEN_BIT: dict[Precision, str] = {
    Precision.FP16: "fp16",
    Precision.BF16: "bf16",
    Precision.BF16_PURE: "bf16",
    Precision.FP8: "bf16",
    Precision.MXFP8: "bf16",
}


def choose_number_formats(
    section: PrecisionSection,
    precision: Precision,
    strategy: Strategy,
    method: Method,
    checkpoint_dtype: str | None,
    *,
    has_islands: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    optimizer: str = "adamw_torch_fused",
    quantized: str = "nf4",
) -> dict[str, Decision[Any]]:
    """Decide every format of a training step but that of the matrix multiplications themselves.

    `has_islands`: some modules compute in another format (`precision.layers`). `betas` are Adam's, `quantized`
    is the format of quantised weights. Raises MptError for a wish that the engine can't carry out.
    """
    half = SIXTEEN_BIT.get(precision)
    by_deepspeed = strategy.zero_stage is not None
    if method is not Method.FULL and precision is Precision.BF16_PURE:
        raise MptError(
            "precision bf16_pure was asked for with lora, whose adapters are small: pure bf16 would save nothing and "
            "round away their updates",
            remedy="Ask for `precision: bf16`: the frozen weights are bf16, the adapters fp32.",
        )
    if has_islands and by_deepspeed and precision in (Precision.FP16, Precision.BF16_PURE):
        raise MptError(
            f"precision.layers keeps modules out of {precision}, and under {strategy} DeepSpeed casts every weight",
            remedy="Ask for mode bf16, whose islands DeepSpeed bears, or for `distributed: {strategy: ddp}`.",
        )
    casts_copies = by_deepspeed and not has_islands  # DeepSpeed's 16-bit engine; islands go by its torch_autocast
    return {
        "autocast_dtype": _autocast(half, precision, casts_copies),
        **_stored(
            section, half, precision, strategy, casts_copies, method, checkpoint_dtype, betas, optimizer, quantized
        ),
        "rounding": _rounding(section, precision, optimizer),
        "reduce_dtype": _reduce_dtype(section.reduce_dtype, precision, strategy),
        "grad_accum_dtype": _grad_accum_dtype(section.grad_accum_dtype, precision, strategy),
        "loss_scale": _loss_scale(section.loss_scale, precision),
    }


def _autocast(half: str | None, precision: Precision, casts_copies: bool) -> Decision[str | None]:
    if half is None:
        return Decision(None, Origin.DERIVED, f"{precision} needs no casting")
    if casts_copies or precision is Precision.BF16_PURE:
        return Decision(None, Origin.DERIVED, f"the weights that compute are {half} already")
    return Decision(half, Origin.DERIVED, "torch.autocast casts what the matrix multiplications read")


def _stored(
    section: PrecisionSection,
    half: str | None,
    precision: Precision,
    strategy: Strategy,
    casts_copies: bool,
    method: Method,
    checkpoint_dtype: str | None,
    betas: tuple[float, float],
    optimizer: str,
    quantized: str,
) -> dict[str, Decision[Any]]:
    def every(dtype: str, reason: str) -> dict[str, Decision[Any]]:
        keys = ("weights_dtype", "master_weights_dtype", "gradient_dtype", "optimizer_state_dtype")
        return {key: Decision(dtype, Origin.DERIVED, reason) for key in keys}

    by_deepspeed = strategy.zero_stage is not None
    no_adapters = {"adapter_dtype": Decision(None, Origin.DERIVED, "no adapters")}
    if method is not Method.FULL:
        base = "the frozen base holds no update; only the adapters need fp32"
        stored = every("fp32", "adapters are small and stay fp32")
        narrow = half if half and (casts_copies or not by_deepspeed) else "fp32"  # islands under ZeRO: all in fp32
        weights = quantized if method is Method.QLORA else narrow
        casts = half is not None and casts_copies and strategy is not Strategy.ZERO3  # which takes them as they are
        computes = half if casts else "fp32"
        reason = f"DeepSpeed's {half} engine casts them; the masters are fp32" if casts else base
        stored |= {key: Decision(computes, Origin.DERIVED, reason) for key in ("adapter_dtype", "gradient_dtype")}
        return stored | {"weights_dtype": Decision(weights, Origin.DERIVED, base)}
    if half is None:
        return every("fp32", f"{precision} stores fp32") | no_adapters
    if precision is Precision.BF16_PURE:
        return every("bf16", "bf16_pure was asked for") | no_adapters | _pure(section, by_deepspeed, betas, optimizer)
    if casts_copies:
        split = every("fp32", "ZeRO keeps fp32 master weights and optimizer states, divided over the ranks")
        engine = f"DeepSpeed's {half} engine computes with {half} copies of the master weights"
        copies = {key: Decision(half, Origin.DERIVED, engine) for key in ("weights_dtype", "gradient_dtype")}
        return split | copies | no_adapters
    reason = "master weights, because in 16 bits small updates would vanish"
    if checkpoint_dtype in ("bf16", "fp16"):
        reason += f" (the checkpoint is {checkpoint_dtype}; transformers alone would train in it)"
    if by_deepspeed:
        reason = "islands keep fp32 weights, so DeepSpeed holds all in fp32 and casts by torch.autocast"
    return every("fp32", reason) | no_adapters


def _pure(
    section: PrecisionSection, by_deepspeed: bool, betas: tuple[float, float], optimizer: str
) -> dict[str, Decision[Any]]:
    """What bf16_pure keeps beside bf16 weights and gradients."""
    kept: dict[str, Decision[Any]] = {}
    if section.master_weights == "fp32":
        if by_deepspeed:
            raise MptError(
                "precision.master_weights fp32 was asked for in bf16_pure under ZeRO, which is what mode bf16 is there",
                remedy="Ask for `precision: bf16`.",
            )
        copy = "the recipe asks for an fp32 copy in the optimizer, which rounds it to the bf16 weights"
        kept["master_weights_dtype"] = Decision("fp32", Origin.ASKED, copy)
    else:
        kept["master_weights_dtype"] = Decision("bf16", Origin.DERIVED, "bf16_pure: the bf16 weights themselves")
    if optimizer in TORCH_OTHERS:
        reason = f"{optimizer} keeps its states in the format of the weights"
        kept["optimizer_state_dtype"] = Decision("bf16", Origin.DERIVED, reason)
    elif section.master_weights == "fp32":
        kept["optimizer_state_dtype"] = Decision("fp32", Origin.AUTO, "beside fp32 master weights")
    else:
        kept["optimizer_state_dtype"] = _moments(*betas)
    return kept


def _moments(beta1: float, beta2: float) -> Decision[str]:
    name, beta = max((("adam_beta1", beta1), ("adam_beta2", beta2)), key=lambda entry: entry[1])
    error = moment_error(beta)
    if moments_fit_bf16(beta1, beta2):
        reason = f"with {name} {beta:g} a bf16 moment stays within {error:.0%} of its average"
        return Decision("bf16", Origin.AUTO, reason)
    off = f"up to {error:.0%} off its average" if error < 1 else "anywhere"
    reason = f"with {name} {beta:g} a bf16 moment would stop {off}; {MAX_ERROR:.0%} is allowed (a beta of 0.95)"
    return Decision("fp32", Origin.AUTO, reason)


def _rounding(section: PrecisionSection, precision: Precision, optimizer: str) -> Decision[str | None]:
    if precision is not Precision.BF16_PURE:
        return Decision(None, Origin.DERIVED, "updates go into fp32 weights")
    if section.master_weights == "fp32":
        if optimizer not in TORCH_ADAMW:
            raise MptError(
                f"precision.master_weights fp32 is kept by mpt's own AdamW, and training.optim is {optimizer}",
                remedy="Leave training.optim out, or ask for `precision: bf16`, which keeps fp32 weights.",
            )
        return Decision("nearest", Origin.DERIVED, "the fp32 copy keeps what the bf16 weight can't hold")
    if optimizer not in TORCH_ADAMW and section.rounding != "nearest":
        raise MptError(
            f"precision bf16_pure rounds the update of AdamW, and training.optim is {optimizer}",
            remedy="Leave training.optim out, ask for `rounding: nearest` (small updates are lost), or for bf16.",
        )
    if section.rounding is not None:
        reason = "the recipe asks for it"
        if section.rounding == "nearest":
            reason += "; updates below half a unit in the last place are lost (2^-9 of a weight)"
        return Decision(section.rounding, Origin.ASKED, reason)
    reason = "unbiased: rounded to nearest, small updates are lost (Zamirai et al. 2020)"
    return Decision("stochastic", Origin.AUTO, reason, (Rejected("kahan", "2 more bytes a weight; exact to 16 bits"),))


def _reduce_dtype(asked: str | None, precision: Precision, strategy: Strategy) -> Decision[str]:
    own = "bf16" if precision is Precision.BF16_PURE else "fp32"
    if strategy is Strategy.SINGLE:
        if asked not in (None, own):
            raise MptError(
                f"precision.reduce_dtype: {asked} was asked for, and one process sums nothing over ranks",
                remedy="Leave it out where one device trains.",
            )
        return Decision(own, Origin.DERIVED, "one process: nothing is summed over ranks")
    if asked == "fp16" and precision is not Precision.FP16:
        raise MptError(
            f"precision.reduce_dtype: fp16 was asked for, and mode {precision} has no loss scale that keeps gradients "
            "inside fp16's range",
            remedy="Ask for bf16, or leave it out.",
        )
    if asked is not None:
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    if strategy.zero_stage is not None and precision is not Precision.BF16_PURE:
        return Decision(
            "fp32", Origin.AUTO, "gradients are summed over ranks in fp32; DeepSpeed alone would in 16 bits"
        )
    return Decision(own, Origin.DERIVED, "gradients are summed over ranks in the format of the weights")


def _grad_accum_dtype(asked: str | None, precision: Precision, strategy: Strategy) -> Decision[str]:
    what = "accumulated over micro batches"
    if asked == "fp16" and precision is not Precision.FP16:
        raise MptError(
            f"precision.grad_accum_dtype: fp16 was asked for, and mode {precision} has no loss scale that keeps "
            "gradients inside fp16's range",
            remedy="Ask for bf16, or leave it out.",
        )
    own = "bf16" if precision is Precision.BF16_PURE else "fp32"
    if strategy.zero_stage is not None:
        if strategy is Strategy.ZERO1 and precision is Precision.BF16_PURE and asked == "fp32":
            raise MptError(
                "precision.grad_accum_dtype: fp32 was asked for in bf16_pure under zero1, where DeepSpeed would take "
                "an optimizer with fp32 master weights",
                remedy="Leave it out, or ask for `distributed: {strategy: zero2}`.",
            )
        if asked is not None:
            return Decision(asked, Origin.ASKED, "the recipe asks for it")
        alone = "" if precision is Precision.BF16_PURE else "; DeepSpeed alone would in 16 bits"
        return Decision(own, Origin.AUTO, f"gradients are {what} in {own}{alone}")
    if asked in (None, own):
        origin = Origin.DERIVED if asked is None else Origin.ASKED
        return Decision(own, origin, f"gradients are {what} in the format of the weights")
    if own == "fp32" or asked != "fp32":
        other = "fp32" if own == "bf16" else "`distributed: {strategy: zero2}`, which has the choice"
        raise MptError(
            f"precision.grad_accum_dtype: {asked} was asked for, and {strategy} accumulates gradients in {own}",
            remedy=f"Leave it out, or ask for {other}.",
        )
    if strategy is not Strategy.SINGLE:
        raise MptError(
            f"precision.grad_accum_dtype: fp32 was asked for in bf16_pure, and {strategy} sums its buckets in the "
            "format of the weights",
            remedy="Leave it out, or ask for `precision: bf16`.",
        )
    return Decision("fp32", Origin.ASKED, "the recipe asks for it: 64 micro batches in bf16 are off by a percent")


def _loss_scale(
    section: LossScaleSection | None, precision: Precision
) -> Decision[dict[str, float | int | None] | None]:
    if precision is not Precision.FP16:
        if section is not None:
            raise MptError(
                f"precision.loss_scale was given, and the precision is {precision}, which needs none",
                remedy="Remove precision.loss_scale, or ask for `precision: {mode: fp16, loss_scale: ...}`.",
            )
        reason = f"{precision} has fp32's exponent range: gradients don't underflow"
        if precision in FP8_MODES:
            reason = "every fp8 factor has a scale of its own, and what is between the layers is bf16"
        return Decision(None, Origin.DERIVED, reason)
    if section is None:
        reason = "dynamic: halved on an overflow, whose step is skipped; doubled after clean steps"
        section, origin = LossScaleSection(), Origin.AUTO
    else:
        reason, origin = "the recipe asks for it", Origin.ASKED
    if section.static is not None:
        return Decision({"static": section.static}, origin, reason)
    return Decision(section.model_dump(exclude={"static"}), origin, reason)


def check_static_scale(loss_scale: Mapping[str, Any] | None, *, tokens: int) -> None:
    """Raise MptError for a fixed loss scale that overflows at the first step whatever the model.

    At the output, a token's gradient is its probability's error over the `tokens` that a rank averages over: about
    1 / `tokens` for the true token of an untrained model. Times the scale it must stay within fp16's 65504.
    """
    static = None if loss_scale is None else loss_scale.get("static")
    if static is not None and static > FP16_MAX * tokens:
        raise MptError(
            f"precision.loss_scale.static is {static:g}, and with {tokens} tokens a step the gradient of the loss is "
            f"beyond fp16's {FP16_MAX:g} at once: every step would be skipped",
            remedy="Write 65536 or less, or leave static out: a dynamic scale finds its height.",
        )
