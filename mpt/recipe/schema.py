"""What a person may write in a recipe. The documentation of a key stands with its field: the JSON Schema, the README's
reference and the error messages are made from here.

Every model refuses unknown keys and is frozen. A key left out is None or "auto": `mpt.planning` decides it and says
why. Rules that need the machine or the model are not here.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mpt.recipe.scalars import Duration, Flag, Integer, Number, Text
from mpt.recipe.training_keys import TrainingSection
from mpt.terms import Attention, OffloadDevice, Precision, Strategy, Task

PositiveInt = Annotated[Integer, Field(gt=0)]
# torch counts in int32, and a scale is an fp32 number that still must grow.
Count = Annotated[Integer, Field(gt=0, lt=2**31)]
LARGEST_SCALE = 2.0**126
Dtype = Literal["fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A map of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


# Sections that can be written as the value of their main key: `model: gpt2` for `model: {name_or_path: gpt2}`.
SHORT_FORMS = {
    "model": "name_or_path",
    "tokenizer": "name_or_path",
    "data": "source",
    "precision": "mode",
    "sample": "prompt",
}


def _short_form(section: str) -> BeforeValidator:
    key = SHORT_FORMS[section]
    return BeforeValidator(lambda value: {key: value} if isinstance(value, (str, list)) else value)


class ModelSection(Section):
    """The model: a checkpoint to start from, or a configuration to start from scratch."""

    name_or_path: Text | None = None
    """A local directory or a model hub id. Training continues from its weights."""
    config: dict[str, Any] | None = None
    """Build the model from scratch: any `AutoConfig` model type, as `model_type` with that type's own keys.
    `vocab_size` is the tokenizer's where it is left out."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Pin a commit for a run that can be repeated."""
    trust_remote_code: Flag = False
    """Run Python code that comes with the checkpoint. Say true only for code that you have read."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("needs one source; give name_or_path (a checkpoint) or config (from scratch)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config has no model_type; add one, such as llama, gpt2, qwen2 or bert")
        if self.config is not None and (self.revision is not None or self.trust_remote_code):
            raise ValueError("revision and trust_remote_code belong to name_or_path, not to config; leave them out")
        return self


class TokenizerSection(Section):
    """The tokenizer: the model's own where this block is left out."""

    name_or_path: Text | None = None
    """A local directory or hub id; the model's where left out."""
    revision: Text | None = None
    """Branch, tag or commit of a hub tokenizer; the model's where the tokenizer is the model's."""
    train: Literal["byte_level_bpe"] | None = None
    """Train a tokenizer on the training text. A model built from `config` without a tokenizer gets one this way."""
    vocab_size: Annotated[Integer, Field(ge=257)] = 4096
    """Size of the trained vocabulary, the 256 bytes and the end-of-text token included."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name_or_path is not None and self.train is not None:
            raise ValueError("name_or_path and train contradict each other; take an existing tokenizer or train one")
        if "vocab_size" in self.model_fields_set and self.train is None:
            raise ValueError("vocab_size is for a trained tokenizer; add `train: byte_level_bpe` or leave it out")
        return self


class DataSection(Section):
    """The text to learn from."""

    source: Text | list[Text]
    """`builtin:python-reference` (the Python language reference, on every machine), a local file or glob, or a list of
    them (.txt .md .jsonl .json .csv .parquet), or `hub:OWNER/NAME` for `datasets.load_dataset`."""
    config: Text | None = None
    """Configuration name of a hub data set, such as `wikitext-2-raw-v1`."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    split: Text = "train"
    """Split of a hub data set to train on."""
    text_column: Text = "text"
    """Column that holds the text in .jsonl, .json, .csv, .parquet and hub data."""
    text_pair_column: Text | None = None
    """Column of the second text where a sample is a pair; sequence_classification only."""
    label_column: Text = "label"
    """Column of the class; sequence_classification only."""
    messages_column: Text = "messages"
    """Column of the conversation, a list of {role, content}; sft only."""
    eval_source: Text | list[Text] | None = None
    """Data to evaluate on, in the words of `source`. Left out: a held-out part of `source`."""
    eval_split: Text | None = None
    """Split of a hub data set to evaluate on, such as `validation`."""
    eval_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the documents held out for evaluation where neither `eval_source` nor `eval_split` is given; 0 for
    none."""
    sequence_length: Annotated[Integer, Field(ge=2)] = 1024
    """Tokens a sample."""
    packing: Flag = True
    """Join documents, end-of-text between them, and cut blocks of `sequence_length`: no padding. False: one document a
    sample, truncated at `sequence_length`; how many were is reported."""
    streaming: Flag = False
    """Read and tokenise while training, for data larger than the disk cache. Needs `training.max_steps`."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        sources = [self.source] if isinstance(self.source, str) else self.source
        if not sources:
            raise ValueError("source is an empty list; name at least one file, glob, builtin or hub data set")
        if self.eval_source == []:
            raise ValueError("eval_source is an empty list; name a source, or leave it out")
        is_hub = any(source.startswith("hub:") for source in sources)
        if is_hub and len(sources) > 1:
            raise ValueError("a hub data set can't be mixed with other sources; keep the hub data set or the files")
        given = {key for key in ("config", "revision", "split", "eval_split") if key in self.model_fields_set}
        if given and not is_hub:
            keys = ", ".join(sorted(given))
            raise ValueError(f"{keys}: only a hub data set has that; leave it out or write source: hub:OWNER/NAME")
        if self.eval_source is not None and (self.eval_split is not None or "eval_fraction" in self.model_fields_set):
            raise ValueError("eval_source, eval_split and eval_fraction are three ways to say one thing; keep one")
        if self.eval_split is not None and "eval_fraction" in self.model_fields_set:
            raise ValueError("eval_split and eval_fraction are two ways to say one thing; keep one")
        if self.streaming and not is_hub and any(source.startswith("builtin:") for source in sources):
            raise ValueError("streaming is for large data, and the built-in corpus is half a megabyte; leave it out")
        return self


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
    keep_high_precision: list[Text] = []
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


class DistributedSection(Section):
    """How processes share the work."""

    strategy: Literal["auto"] | Strategy = "auto"
    """single, ddp, zero1, zero2, zero3 (DeepSpeed) or fsdp2."""
    processes_per_node: PositiveInt | None = None
    """Training processes a node. Left out: one a device, and one on a CPU."""


class OffloadSection(Section):
    """What ZeRO keeps off the accelerator. `offload: cpu` is short for optimizer and parameters under zero3, and
    for the optimizer under zero1 and zero2."""

    optimizer: OffloadDevice = OffloadDevice.NONE
    """Optimizer states and fp32 master weights."""
    parameters: OffloadDevice = OffloadDevice.NONE
    """Parameters between their uses; zero3 only."""
    nvme_path: Text | None = None
    """Directory on a local NVMe drive."""

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> Self:
        if (OffloadDevice.NVME in (self.optimizer, self.parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path goes with nvme; give both or neither")
        return self


class LoraSection(Section):
    """Low-rank adapters on frozen weights (Hu et al. 2021)."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[Number, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Text | list[Text] = "all-linear"
    """Names of the modules that get an adapter."""


class QuantizationSection(Section):
    """Quantise the frozen weights (QLoRA, Dettmers et al. 2023). Needs `lora`."""

    bits: Literal[4, 8] = 4
    """Bits a weight."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Format of 4-bit weights."""
    double_quantization: Flag = True
    """Quantise the quantisation constants too: 0.4 bits a weight less."""


class SampleSection(Section):
    """Text generated by the trained model at the end of a run."""

    prompt: Text
    """What the text begins with."""
    max_new_tokens: PositiveInt = 64
    """Tokens to generate."""
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn, from `training.seed`, the more freely the
    higher."""


class RestartSection(Section):
    """What the supervisor does about crashes, hangs, too little memory, and time that runs out. Durations are seconds,
    or written as 90s, 30m, 12h, 2d; a limit of 0 is none."""

    max_restarts: Annotated[Integer, Field(ge=0)] = 20
    """Restarts from the last complete checkpoint, in all; after them the run ends with exit code 82."""
    max_attempts_without_progress: PositiveInt = 3
    """Attempts in a row without a newer checkpoint; after them the run ends with exit code 82, whatever restarts are
    left. An attempt that ended for a change of plan does not count."""
    backoff: Duration = 5.0
    """Pause before the second restart in a row without a newer checkpoint; it doubles each time, up to 5 minutes."""
    halve_micro_batch: Flag = True
    """Go on with half the micro batch, and twice the accumulation, after running out of memory. The global batch and
    the order of the data stay. False: exit code 86 at once."""
    step_timeout: Duration = 600.0
    """Silence within training after which a rank is taken to hang: this, or 5 times the longest silence so far. Each
    micro batch breaks it. The stacks of all ranks are written down, and the run restarts."""
    first_step_timeout: Duration = 1800.0
    """The same for the first step of an attempt, in which kernels are compiled."""
    loading_timeout: Duration = 7200.0
    """The same until training begins: loading libraries, preparing data, building the model."""
    phase_timeout: Duration = 1800.0
    """The same while saving, generating a sample, or evaluating, where each batch breaks the silence."""
    time_limit: Duration | None = None
    """How long this command may run, at most to the SLURM_JOB_END_TIME of a Slurm job. Left out: that, or for ever."""
    stop_before: Duration | None = None
    """Save and end with exit code 80 when only this much of the time is left: longer than a step and a save take. Left
    out: the scheduler's signal is waited for."""

    @model_validator(mode="after")
    def _there_is_time(self) -> Self:
        if self.time_limit is not None and self.stop_before is None:
            raise ValueError("time_limit says when to end, and stop_before how long before to save; add stop_before")
        if self.time_limit is not None and self.time_limit <= (self.stop_before or 0):
            raise ValueError("stop_before is no shorter than time_limit, so that nothing would run; write less")
        return self


class RecoverySection(Section):
    """What is done where the numbers go bad for good: the run goes back to a checkpoint that is known to be good, and
    on from there under the next of these changes. After the last it ends with exit code 81 and says what was tried."""

    rungs: list[Literal["retry", "exclude_data", "lower_learning_rate", "raise_precision"]] = [
        "retry",
        "exclude_data",
        "lower_learning_rate",
        "raise_precision",
    ]
    """In this order. retry: unchanged, once for an event at a position. exclude_data: without the samples around the
    event, for good; three times at most, and not for streamed data. lower_learning_rate: twice at most.
    raise_precision: fp8, mxfp8, fp16 and bf16_pure to bf16 where it is native, else to fp32; bf16 to fp32. A loss scale
    that can give no more room and an fp16 overflow in the forward pass come to raise_precision at once. An empty list:
    exit code 81 at once."""
    margin: Annotated[Integer, Field(ge=0)] = 100
    """Steps before the event's first one that a known-good checkpoint must lie, where there is such a one."""
    exclude_batches: PositiveInt = 200
    """Global batches that exclude_data leaves out, a quarter of them before the event; at most 2 % of an epoch (or 8,
    where that is more) and half of it."""
    learning_rate_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied by."""
    rewarm_steps: Annotated[Integer, Field(ge=0)] = 100
    """Steps in which a lowered learning rate is warmed up again."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.rungs)) != len(self.rungs):
            raise ValueError("rungs names one twice; each is climbed as often as it may be anyway")
        if "lower_learning_rate" not in self.rungs and {"learning_rate_factor", "rewarm_steps"} & self.model_fields_set:
            raise ValueError("learning_rate_factor and rewarm_steps are for lower_learning_rate; add it to rungs")
        if "exclude_data" not in self.rungs and "exclude_batches" in self.model_fields_set:
            raise ValueError("exclude_batches is for exclude_data; add it to rungs")
        return self


class HealthSection(Section):
    """What the run's numbers may do before something is done about them. Non-finite numbers never reach the weights,
    whatever stands here. To roll back is to end the attempt at the numbers, before they spoil a checkpoint."""

    spikes: Flag = True
    """Judge finite losses and gradient norms too, by their last values. False: only what is not finite, or dead."""
    window: PositiveInt = 128
    """Accepted values that a new one is compared with: their median, and their median absolute deviation x 1.4826 as
    sigma (at least 0.5 % of the median)."""
    min_seen: Annotated[Integer, Field(ge=2)] = 32
    """Values that must have been seen before any is judged."""
    spike_sigmas: Annotated[Number, Field(gt=0)] = 8.0
    """A logarithm of the gradient norm this many sigma above its median is clipped to the median. A loss that is, and
    10 % above its median too, is high; 3 high ones of 5 open an event."""
    max_clips: PositiveInt = 16
    """Steps in a row clipped that way; the next one is taken for the new level."""
    settle_steps: Annotated[Integer, Field(ge=16)] = 64
    """Steps that an event of the loss gets to pass by itself."""
    settle_sigmas: Annotated[Number, Field(gt=0)] = 4.0
    """Roll back where the median of the last 16 losses is still this many sigma up after that."""
    runaway_factor: Annotated[Number, Field(gt=1)] = 3.0
    """Roll back at once where the loss is over this many times its median for 8 steps in a row; and, however slowly it
    rose, where the median of the last 16 losses is over this many times the lowest that it was, and above where the run
    began. A causal_lm whose loss rises from its first step on is held against ln(vocabulary)."""
    max_bad_in_a_row: PositiveInt = 3
    """Roll back at this many steps in a row whose loss or gradient is not finite; fewer are left out. A loss that is
    not finite in fp16 rolls back at once: loss scaling comes after the forward pass."""
    max_bad_in_1000: Annotated[Integer, Field(ge=0, lt=1000)] = 10
    """Roll back where more of the last 1000 steps than these were not finite."""
    max_overflows_in_a_row: PositiveInt = 18
    """Roll back at this many steps in a row whose gradient overflows in fp16, as from a first scale of 65536; a higher
    one gets a step more for each halving. An overflow at a scale of 1 or less rolls back at once."""
    max_overflow_share: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Roll back where gradients overflowed in more than this share of the last 200 steps."""
    max_steps_without_update: PositiveInt = 50
    """Roll back where this many steps in a row changed no weight, for whatever reason."""
    dead_after: PositiveInt = 50
    """Roll back where for this many updates every gradient is exactly 0, or the loss rests within 0.1 % of
    ln(vocabulary) after it had been 1 % lower; if it never had, 5 times as many."""

    known_good_after: PositiveInt = 100
    """Healthy updates in a row after which an earlier checkpoint counts as known to be good."""

    @model_validator(mode="after")
    def _judges_what_it_has_seen(self) -> Self:
        judging = {
            "window", "min_seen", "spike_sigmas", "max_clips", "settle_steps", "settle_sigmas", "runaway_factor",
        }  # fmt: skip
        idle = sorted(judging & self.model_fields_set)
        if not self.spikes and idle:
            raise ValueError(f"spikes is false, and {', '.join(idle)} say how spikes are judged; remove them or spikes")
        if self.window < self.min_seen:
            raise ValueError(
                f"window is {self.window}, below min_seen {self.min_seen}: nothing would ever be judged; "
                "raise window, or lower min_seen"
            )
        if self.settle_sigmas > self.spike_sigmas:
            raise ValueError(
                f"settle_sigmas is {self.settle_sigmas:g}, above spike_sigmas {self.spike_sigmas:g}: "
                f"an event would be over as it opens; write at most {self.spike_sigmas:g}"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_end(self) -> Self:
        for key in ("max_bad_in_a_row", "max_overflows_in_a_row"):
            row = getattr(self, key)
            if key in self.model_fields_set and row > self.max_steps_without_update:
                raise ValueError(
                    f"{key} is {row}, and a run ends after max_steps_without_update {self.max_steps_without_update} "
                    f"anyway; write at most {self.max_steps_without_update}, or raise that"
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


class Recipe(Section):
    """A training run: what to train, on what, and as much of the how as the author cares to fix."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory. Left out: the file's name."""
    description: str | None = None
    """What this recipe is for; shown by `mpt recipes list`."""
    task: Task = Task.CAUSAL_LM
    """What is learnt from the data."""
    model: Annotated[ModelSection, _short_form("model")]
    """The model; a text is its `name_or_path`."""
    tokenizer: Annotated[TokenizerSection, _short_form("tokenizer")] | None = None
    """The tokenizer; a text is its `name_or_path`."""
    data: Annotated[DataSection, _short_form("data")]
    """The data; a text is its `source`."""
    precision: Annotated[PrecisionSection, _short_form("precision")] = PrecisionSection()
    """The number formats; a text is its `mode`."""
    attention: Literal["auto"] | Attention = "auto"
    """The attention implementation, in transformers' names."""
    global_batch_size: PositiveInt | None = None
    """Samples an optimizer step, over all devices and accumulation steps."""
    micro_batch_size: PositiveInt | None = None
    """Samples a device and forward pass. Left out: the largest that fits and divides."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward and backward passes an optimizer step. Left out: global_batch_size / (micro_batch_size x world size)."""
    gradient_checkpointing: Literal["auto"] | Flag = "auto"
    """Recompute activations in the backward pass: less memory, about a third more compute (Chen et al. 2016)."""
    distributed: DistributedSection = DistributedSection()
    """How processes share the work."""
    offload: Literal["auto"] | OffloadSection | OffloadDevice = "auto"
    """What ZeRO keeps off the accelerator."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of every weight."""
    quantization: QuantizationSection | None = None
    """Quantise the frozen weights under the adapters."""
    training: TrainingSection = TrainingSection()  # type: ignore[valid-type]
    """Keys of `transformers.TrainingArguments` (5.x), under their own names."""
    sample: Annotated[SampleSection, _short_form("sample")] | None = None
    """Text to generate at the end; a text is its `prompt`."""
    restart: RestartSection = RestartSection()
    """What the supervisor does about crashes, hangs, too little memory, and time that runs out."""
    recovery: RecoverySection = RecoverySection()
    """What is done where the numbers go bad for good."""
    health: HealthSection = HealthSection()
    """What the run's numbers may do before something is done about them."""
    background_saving: Literal["auto"] | Flag = "auto"
    """Write checkpoints while the training goes on, from a copy in the host's memory. auto: on a GPU, where one process
    or DDP trains and the copy takes no more than half of that memory. The last checkpoint is always waited for."""
    compare: CompareSection | None = None
    """Compare the precision with another one before the run."""

    @property
    def training_keys(self) -> dict[str, Any]:
        """The keys of `training:` that the recipe gives, and no other."""
        return cast(BaseModel, self.training).model_dump(exclude_unset=True)

    @property
    def asked_micro_batch_size(self) -> int | None:
        return self.micro_batch_size or self.training_keys.get("per_device_train_batch_size")

    @property
    def asked_gradient_accumulation_steps(self) -> int | None:
        return self.gradient_accumulation_steps or self.training_keys.get("gradient_accumulation_steps")

    @property
    def asked_gradient_checkpointing(self) -> bool | None:
        """True or false where the recipe says it, under any of its three names; None for auto."""
        if self.gradient_checkpointing != "auto":
            return self.gradient_checkpointing
        keys = self.training_keys
        return keys.get("gradient_checkpointing", keys.get("activation_checkpointing"))

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        """Let a value be said under mpt's name or TrainingArguments' name, but not differently under both."""
        keys = self.training_keys
        for own, value, theirs in (
            ("micro_batch_size", self.micro_batch_size, "per_device_train_batch_size"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, "gradient_accumulation_steps"),
            ("gradient_checkpointing", self.gradient_checkpointing, "gradient_checkpointing"),
            ("gradient_checkpointing", self.gradient_checkpointing, "activation_checkpointing"),
        ):
            other = keys.get(theirs)
            if value not in (None, "auto") and other is not None and other != value:
                raise ValueError(f"{own} is {value} and training.{theirs} is {other}; keep one of them")
        return self

    @model_validator(mode="after")
    def _quantization_needs_lora(self) -> Self:
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization trains nothing by itself: quantised weights are frozen; add a lora block")
        if self.lora is not None and self.model.config is not None:
            raise ValueError("lora adapts a trained model, and model.config starts from noise; write name_or_path")
        if self.quantization is not None and self.model.config is not None:
            raise ValueError("quantization is for a checkpoint, not a model from scratch; write model.name_or_path")
        return self
