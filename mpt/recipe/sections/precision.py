"""The number formats of training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Flag, Integer, Number, Text
from mpt.recipe.sections.base import Dtype, PositiveInt, Section
from mpt.terms import Precision

# torch counts in int32, and a scale is an fp32 number that still must grow.
Count = Annotated[Integer, Field(gt=0, lt=2**31)]
LARGEST_SCALE = 2.0**126


class LossScaleSection(Section):
    """Loss scaling of fp16 (Micikevicius et al. 2018). Reaches torch's GradScaler and DeepSpeed's fp16 block alike."""

    initial: Annotated[Number, Field(ge=1, le=LARGEST_SCALE)] = 65536.0
    """First scale. DeepSpeed takes the exponent, so there it must be a power of two."""
    growth_factor: Annotated[Number, Field(gt=1)] = 2.0
    """The scale grows by this factor after `growth_interval` clean steps in a row. DeepSpeed knows only 2."""
    backoff_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """The scale shrinks by this factor on an overflow, and the step is skipped. DeepSpeed knows only 0.5."""
    growth_interval: Count = 2000
    """Clean steps in a row before the scale grows."""
    min: Annotated[Number, Field(gt=0, le=LARGEST_SCALE)] | None = None
    """The scale never goes below this; an overflow there ends the run. Left out: no floor (DeepSpeed: 1)."""
    hysteresis: Count | None = None
    """Overflows before the scale shrinks; each skips its step. Left out: 1 (DeepSpeed: 2)."""
    static: Annotated[Number, Field(gt=0, le=LARGEST_SCALE)] | None = None
    """A fixed scale instead of a dynamic one."""

    @model_validator(mode="after")
    def _static_alone(self) -> Self:
        dynamic = sorted(self.model_fields_set - {"static"})
        if self.static is not None and dynamic:
            raise ValueError(f"static fixes the scale, the others move it; remove {', '.join(dynamic)} or static")
        if self.min is not None and self.min > self.initial:
            raise ValueError(f"min is {self.min:g}, above the first scale; write at most {self.initial:g}, or raise it")
        return self


class Float8Section(Section):
    """How fp8 and mxfp8 compute: which kernels scale what, and which layers stay in bf16."""

    backend: Literal["torchao", "transformer_engine"] | None = None
    """torchao, or NVIDIA's Transformer Engine. Left out: torchao, and for mxfp8 the other."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed", "mxfp8"] | None = None
    """What a scale covers. tensorwise (left out: this): a tensor, by its present maximum. rowwise: a row, safer and
    slower; rowwise_with_gw_hp: the weight gradient in bf16 too. delayed: a tensor, by past maxima; transformer_engine
    only. mxfp8: 32 values, the same as `mode: mxfp8`."""
    keep_high_precision: list[Text] = Field(default=[])
    """Patterns of module names that stay in bf16, such as `*.self_attn.*`. The output head always does."""
    keep_first: Annotated[Integer, Field(ge=0)] = 1
    """Linear layers at the model's beginning that stay in bf16."""
    keep_last: Annotated[Integer, Field(ge=0)] = 1
    """Linear layers at its end, before the output head, that stay in bf16."""
    auto_filter: Flag | None = None
    """Leave out layers too small to gain (torchao's published rule). Left out: true, and false under emulation."""


class PrecisionSection(Section):
    """The number formats of training. `precision: bf16` is short for `precision: {mode: bf16}`."""

    mode: Literal["auto"] | Precision = "auto"
    """Format of the matrix multiplications. Master weights stay fp32 except in `bf16_pure`. fp8 is never automatic."""
    loss_scale: LossScaleSection | None = None
    """Loss scaling; only fp16 has one."""
    fp8: Float8Section | None = None
    """How fp8 computes; for the modes fp8 and mxfp8, and for layers in fp8."""
    layers: (
        Annotated[dict[Text, Literal["fp32", "bf16", "fp16", "fp8"]], Field(json_schema_extra={"minProperties": 1})]
        | None
    ) = None
    """Precision by module name: `{lm_head: fp32, "*.mlp.*": fp8}`. A name without a wildcard goes before patterns; two
    patterns that disagree about a module are an error, and so is one that matches nothing."""
    rounding: Literal["nearest", "stochastic", "kahan"] | None = None
    """How bf16_pure rounds an updated weight. Left out: stochastic. kahan keeps what was lost in a second bf16 number;
    nearest loses small updates."""
    master_weights: Literal["fp32", "none"] | None = None
    """Whether the optimizer updates an fp32 copy of the weights. Left out: fp32; in bf16_pure none, where fp32 gives
    bf16 weights with a copy in the optimizer."""
    allow_emulation: Flag = False
    """Take a precision that a device can't compute natively, and train slower in it."""
    reduce_dtype: Dtype | None = None
    """Format in which gradients are summed over ranks. Left out: fp32 (bf16_pure: bf16)."""
    grad_accum_dtype: Dtype | None = None
    """Format in which gradients are accumulated over micro batches. Left out: fp32 (bf16_pure: bf16)."""

    @property
    def asked_mode(self) -> Precision | None:
        """The mode; None for auto. fp8 by the recipe mxfp8 is mxfp8."""
        if self.mode == "auto":
            return None
        if self.mode == Precision.FP8 and self.fp8 is not None and self.fp8.recipe == "mxfp8":
            return Precision.MXFP8
        return Precision(self.mode)

    @property
    def needs_modules(self) -> bool:
        """Whether the model's modules must be known by name to plan."""
        return self.layers is not None or self.mode in (Precision.FP8, Precision.MXFP8)

    @model_validator(mode="after")
    def _layers_are_named(self) -> Self:
        if self.layers == {}:
            raise ValueError('layers is empty; name modules, as in {lm_head: fp32, "*.mlp": fp8}, or leave it out')
        return self

    @model_validator(mode="after")
    def _loss_scale_is_fp16(self) -> Self:
        if self.loss_scale is not None and self.mode not in ("auto", Precision.FP16):
            raise ValueError(f"loss_scale is for fp16, and mode {self.mode} needs none; remove loss_scale")
        return self

    @model_validator(mode="after")
    def _rounding_is_pure(self) -> Self:
        is_pure = self.mode == Precision.BF16_PURE
        if self.rounding is not None and not is_pure:
            raise ValueError(
                f"rounding is for bf16_pure: with mode {self.mode} updates go into fp32 weights and nothing is lost; "
                "remove rounding"
            )
        if self.master_weights == "none" and not is_pure:
            raise ValueError(
                f"master_weights none is what bf16_pure does, and mode {self.mode} keeps them in fp32; "
                "ask for mode bf16_pure, or remove master_weights"
            )
        if self.master_weights == "fp32" and self.rounding in ("stochastic", "kahan"):
            raise ValueError(f"fp32 master_weights lose nothing that rounding: {self.rounding} could save; remove one")
        return self

    @model_validator(mode="after")
    def _fp8_is_used(self) -> Self:
        is_fp8 = self.mode in (Precision.FP8, Precision.MXFP8)
        if self.fp8 is None:
            return self
        if not is_fp8 and "fp8" not in (self.layers or {}).values():
            raise ValueError(f"fp8 is a block for the modes fp8 and mxfp8, and the mode is {self.mode}; remove it")
        if self.mode == Precision.MXFP8 and self.fp8.recipe not in (None, "mxfp8"):
            raise ValueError(f"mode mxfp8 is a recipe of its own, and fp8.recipe is {self.fp8.recipe}; remove one")
        if not is_fp8 and self.fp8.recipe == "mxfp8":
            raise ValueError("fp8.recipe mxfp8 is for `mode: mxfp8`; ask for that, or for another recipe")
        choosing = sorted(self.fp8.model_fields_set - {"backend", "recipe"})
        if not is_fp8 and choosing:
            raise ValueError(
                f"fp8 has {', '.join(choosing)}, which choose layers in the modes fp8 and mxfp8, and in mode "
                f"{self.mode} precision.layers names them; remove {', '.join(choosing)}"
            )
        return self


class CompareBoundsSection(Section):
    """What the comparison must show for the run to start; otherwise it ends with exit code 81."""

    max_loss_gap: Annotated[Number, Field(gt=0)] | None = None
    """Largest relative difference of the loss at any compared step; 0.02 is 2 %."""
    min_gradient_cosine: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Smallest cosine between the first step's gradients, over all trained parameters at once."""


class CompareSection(Section):
    """Run the first steps in the recipe's precision and in another one before training, and compare the numbers."""

    to: Literal["fp32", "tf32", "bf16", "fp16"]
    """The precision to compare with: the same recipe, with nothing but its `precision` replaced."""
    steps: PositiveInt = 20
    """Optimizer steps to compare, from the first one on."""
    require: CompareBoundsSection | None = None
    """Bounds that the comparison must keep. Left out: it only reports. With it, a run that diverges while it is
    compared does not start either."""
