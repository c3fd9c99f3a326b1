"""Adapters, and the quantised weights under them."""

from typing import Annotated, Literal

from pydantic import Field

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
    """Quantise the frozen weights (QLoRA, Dettmers et al. 2023). Needs `lora`."""

    bits: Literal[4, 8] = 4
    """Bits a weight."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Format of 4-bit weights."""
    double_quantization: Flag = True
    """Quantise the quantisation constants too: 0.4 bits a weight less."""
