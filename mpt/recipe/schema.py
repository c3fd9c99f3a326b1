"""What a person may write in a recipe. The documentation of a key stands with its field: the JSON Schema, the README's
reference and the error messages are made from here.

Every model refuses unknown keys and is frozen. A key left out is None or "auto": `mpt.planning` decides it and says
why. Rules that need the machine or the model are not here. The blocks are in `mpt.recipe.sections`.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, Field, model_validator

from mpt.recipe.scalars import Flag, OwnTask
from mpt.recipe.sections.adapters import LoraSection, QuantizationSection
from mpt.recipe.sections.base import SHORT_FORMS, PositiveInt, Section, short_form
from mpt.recipe.sections.data import DataSection, SampleSection, SourceSection
from mpt.recipe.sections.engine import DistributedSection, OffloadSection
from mpt.recipe.sections.evaluation import EarlyStoppingSection
from mpt.recipe.sections.model import ModelSection, TokenizerSection
from mpt.recipe.sections.precision import (
    CompareBoundsSection,
    CompareSection,
    Float8Section,
    LossScaleSection,
    PrecisionSection,
)
from mpt.recipe.sections.preflight import PreflightSection
from mpt.recipe.sections.supervision import HealthSection, RecoverySection, RestartSection
from mpt.recipe.training_keys import TrainingSection
from mpt.terms import Attention, Metric, OffloadDevice, Task

__all__ = [
    "SHORT_FORMS",
    "CompareBoundsSection",
    "CompareSection",
    "DataSection",
    "DistributedSection",
    "EarlyStoppingSection",
    "Float8Section",
    "HealthSection",
    "LoraSection",
    "LossScaleSection",
    "ModelSection",
    "OffloadSection",
    "PrecisionSection",
    "PreflightSection",
    "QuantizationSection",
    "Recipe",
    "RecoverySection",
    "RestartSection",
    "SampleSection",
    "Section",
    "SourceSection",
    "TokenizerSection",
]


class Recipe(Section):
    """A training run: what to train, on what, and as much of the how as the author cares to fix."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory. Left out: the file's name."""
    description: str | None = None
    """What this recipe is for; shown by `mpt recipes list`."""
    task: Task | OwnTask = Task.CAUSAL_LM
    """What is learnt from the data; or the dotted path of a module of your own, which says so itself."""
    model: Annotated[ModelSection, short_form("model")]
    """The model; a text is its `name_or_path`."""
    tokenizer: Annotated[TokenizerSection, short_form("tokenizer")] | None = None
    """The tokenizer; a text is its `name_or_path`."""
    data: Annotated[DataSection, short_form("data")]
    """The data; a text is its `source`."""
    precision: Annotated[PrecisionSection, short_form("precision")] = PrecisionSection()
    """The number formats; a text is its `mode`."""
    attention: Literal["auto"] | Attention = "auto"
    """The attention implementation, in transformers' names. auto: the fastest that device, precision, model and
    installed packages allow. A name with a slash is a kernel that the package `kernels` fetches from the hub."""
    compile: Literal["auto", "regional"] | Flag = "auto"
    """torch.compile. true: the whole model. regional: each of its repeated blocks, which takes a fraction of that time
    to compile; by one process or DDP. auto: for native fp8, and by blocks for half an hour or more of training on a CPU
    that has a C++ compiler. `training.torch_compile_backend` and `torch_compile_mode` go with it."""
    loss: Literal["auto", "chunked", "full", "liger"] = "auto"
    """How the cross entropy over the vocabulary is computed. chunked: some tokens' logits at a time, the same number
    for less memory. full: all logits at once, in fp32. liger: by the kernels of liger-kernel, on a GPU. auto: liger
    where it is installed and knows the model, else chunked where the loss is taken from the head's output as it is."""
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
    metrics: list[Metric] | None = None
    """What an evaluation computes beside the loss. Classes: accuracy, f1 (of the second class where there are two, else
    the mean over classes), f1_macro, f1_weighted, precision, recall, matthews; regression: pearson, spearman, mse, mae;
    language models: perplexity, token_accuracy. Left out: accuracy and f1, or pearson and spearman, or perplexity."""
    early_stopping: EarlyStoppingSection | None = None
    """End the run where evaluations show no more gain. `training.load_best_model_at_end` then keeps the best weights
    rather than the last."""
    sample: Annotated[SampleSection, short_form("sample")] | None = None
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
    preflight: PreflightSection = PreflightSection()
    """What of the preflight's findings is accepted."""
    compare: CompareSection | None = None
    """Compare the precision with another one before the run."""

    @property
    def model_task(self) -> Task:
        """The task whose model is planned with: the recipe's, or causal_lm for one of the user's own, whose model is
        not known before it is built."""
        return self.task if isinstance(self.task, Task) else Task.CAUSAL_LM

    @property
    def training_keys(self) -> dict[str, Any]:
        """The keys of `training:` that the recipe gives, and no other."""
        return cast(BaseModel, self.training).model_dump(exclude_unset=True)

    @property
    def needs_modules(self) -> bool:
        """Whether the model's modules must be known by name to plan."""
        names_some = self.quantization is not None and bool(self.quantization.skip_modules)
        if self.lora is not None:
            names_some |= self.lora.names_modules or self.task is Task.SEQUENCE_CLASSIFICATION
        return self.precision.needs_modules or names_some

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
            ("compile", self.compile, "torch_compile"),
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

    @model_validator(mode="after")
    def _quantized_weights_stay(self) -> Self:
        """Refuse what would change weights of 4 or 8 bits."""
        if self.quantization is None or self.lora is None:
            return self
        if self.lora.merge:
            raise ValueError("lora.merge would round the merged weights to 4 or 8 bits; remove it or quantization")
        if self.lora.changes_base:
            raise ValueError(
                f"lora.init {self.lora.init} takes a part out of the weights, which are quantised; leave it out"
            )
        if self.lora.dora and self.quantization.bits == 8:
            raise ValueError(
                "lora.dora needs the norms of the weights, which peft does not get from 8 bits; set bits: 4"
            )
        if self.lora.bias != "none":
            raise ValueError("lora.bias trains biases that bitsandbytes casts to 16 bits; leave it out")
        return self
