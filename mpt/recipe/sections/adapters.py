"""Adapters, and the quantised weights under them."""

import math
import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Flag, Integer, Number, Text
from mpt.recipe.sections.base import PositiveInt, Section

NotNegative = Annotated[Integer, Field(ge=0)]
INIT = r"default|gaussian|orthogonal|pissa|pissa_niter_[1-9][0-9]*|olora"
NO_INIT = {
    **dict.fromkeys(
        ("eva", "corda", "lora_ga"), "is drawn from activations or gradients of the data, which mpt does not gather"
    ),
    "loftq": "is computed by peft on a GPU alone, from a second copy of the weights",
    "mica": "freezes half of each adapter",
}


class LoraSection(Section):
    """Low-rank adapters on frozen weights (Hu et al. 2021), by peft."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[Number, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank). Left out: it is scaled by 2."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Text | list[Text] = "all-linear"
    """The linear layers that get an adapter. all-linear: every one but the output head. A list: names, whole or their
    endings, or of what holds them (`[q_proj, v_proj]`, `[self_attn]`), with `*` for anything. A text: a regular
    expression for whole names (`.*layers\\.[0-7]\\..*_proj`)."""
    exclude_modules: Text | list[Text] = Field(default=[])
    """Linear layers that get none, though target_modules means them; written as there."""
    layers_to_transform: list[NotNegative] | None = None
    """Numbers of the blocks whose layers get adapters, from 0. Left out: all."""
    modules_to_save: list[Text] = Field(default=[])
    """Modules to train whole, in fp32, and to save with the adapters; `[lm_head, embed_tokens]` for new tokens."""
    rslora: Flag = False
    """Rank-stabilised scaling, alpha / sqrt(rank): ranks above 32 learn as fast (Kalajdzievski 2023)."""
    dora: Flag = False
    """Learn the size of each output apart from its direction (DoRA, Liu et al. 2024): better at low ranks, slower."""
    init: Text = "default"
    """How adapters begin. default and gaussian: as no change, with random A and B = 0. orthogonal: both random. pissa
    (Meng et al. 2024; pissa_niter_16 in seconds) and olora: from the weights themselves, of which the rest is frozen;
    final/ then holds them as plain adapters of twice the rank."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: those of the layers with an adapter, or all."""
    rank_pattern: dict[Text, PositiveInt] = Field(default={})
    """Other ranks by the ending of a name, a regular expression: `{down_proj: 32}`."""
    alpha_pattern: dict[Text, Annotated[Number, Field(gt=0)]] = Field(default={})
    """Other alphas by the ending of a name, a regular expression."""
    adapter: Text | None = None
    """A directory with an adapter of this model to train on. It brings rank, alpha and the rest: no other key but
    `merge` goes with it."""
    merge: Flag = False
    """Write final/ as a whole model with the adapters merged into its weights, and not as an adapter."""

    @property
    def scaling_alpha(self) -> float:
        """The alpha that is asked for, or the one that scales the update by 2."""
        if self.alpha is not None:
            return self.alpha
        return 2 * (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def changes_base(self) -> bool:
        """Whether the frozen weights are not the checkpoint's: a part of them has gone into the adapters."""
        return self.init == "olora" or self.init.startswith("pissa")

    @property
    def names_modules(self) -> bool:
        """Whether the layers with an adapter, or what is trained beside them, must be known by name."""
        named = (self.exclude_modules, self.layers_to_transform, self.modules_to_save, self.rank_pattern, self.adapter)
        return not self.is_all_linear or any(value not in (None, [], {}) for value in named) or self.bias != "none"

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @model_validator(mode="after")
    def _init_is_known(self) -> Self:
        if self.init in NO_INIT:
            raise ValueError(f"init {self.init} {NO_INIT[self.init]}; write pissa or leave init out")
        if not re.fullmatch(INIT, self.init):
            raise ValueError(
                f"init is {self.init}; write default, gaussian, orthogonal, pissa, pissa_niter_16 or olora"
            )
        ranks = (self.rank, *self.rank_pattern.values())
        if self.init == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("init orthogonal needs even ranks; change rank, or leave init out")
        if self.changes_base and self.dora:
            raise ValueError(
                f"init {self.init} can't be saved with dora as an adapter of the model; leave one of them out"
            )
        if self.changes_base and self.rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"init {self.init} with rslora can't be saved with rank_pattern or alpha_pattern; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _adapter_brings_the_rest(self) -> Self:
        beside = self.model_fields_set - {"adapter", "merge"}
        if self.adapter is not None and beside:
            raise ValueError(
                f"adapter brings its own {', '.join(sorted(beside))}; leave {'them' if len(beside) > 1 else 'it'} out"
            )
        return self

    @model_validator(mode="after")
    def _patterns_are_readable(self) -> Self:
        texts = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        for text in (*texts, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(
                    f"{text} is no regular expression ({error}); write a list, in which * means anything: [{text}]"
                ) from None
        if self.target_modules == [] or self.layers_to_transform == []:
            raise ValueError("an empty list leaves nothing to train; leave it out for all")
        return self


class QuantizationSection(Section):
    """Quantise the frozen weights (QLoRA, Dettmers et al. 2023), by bitsandbytes. Needs `lora`. Every linear layer but
    the output head is quantised, and computes in the format of `precision`; what is not quantised is fp32."""

    bits: Literal[4, 8] = 4
    """Bits a weight. 8: LLM.int8 (Dettmers et al. 2022)."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Format of 4-bit weights."""
    double_quantization: Flag = True
    """Quantise the 4-bit weights' constants too: 0.4 bits a weight less."""
    storage_dtype: Literal["uint8", "bf16", "fp16", "fp32"] = "uint8"
    """Format in which torch holds the packed 4-bit weights. Their size and values stay the same."""
    int8_threshold: Annotated[Number, Field(ge=0)] = 6.0
    """With 8 bits: input columns with a value beyond it are multiplied in 16 bits (bitsandbytes' kernels on a CPU take
    all of them so). 0: none."""
    skip_modules: list[Text] = Field(default=[])
    """Names of linear layers, or of what holds them, that are not quantised: `[down_proj]`, `[model.layers.0]`."""

    @property
    def dtype(self) -> str:
        """The format of the quantised weights."""
        return self.type if self.bits == 4 else "int8"

    @model_validator(mode="after")
    def _keys_of_its_bits(self) -> Self:
        four = self.model_fields_set & {"type", "double_quantization", "storage_dtype"}
        if self.bits == 8 and four:
            raise ValueError(f"bits is 8, and {', '.join(sorted(four))} is for 4-bit weights; leave it out")
        if self.bits == 4 and "int8_threshold" in self.model_fields_set:
            raise ValueError("int8_threshold is for 8-bit weights, and bits is 4; leave it out or set bits: 8")
        return self
