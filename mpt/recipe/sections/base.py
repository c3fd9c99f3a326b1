"""What the maps of a recipe have in common: unknown keys are refused, values are frozen, and a key left out is None or
"auto", which `mpt.planning` decides. The documentation of a key stands with its field.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mpt.recipe.scalars import Integer

PositiveInt = Annotated[Integer, Field(gt=0)]
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


def short_form(section: str) -> BeforeValidator:
    key = SHORT_FORMS[section]
    return BeforeValidator(lambda value: {key: value} if isinstance(value, (str, list)) else value)
