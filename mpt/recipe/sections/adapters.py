"""Adapters, and the quantised weights under them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Flag, Number, Text
from mpt.recipe.sections.base import PositiveInt, Section


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
