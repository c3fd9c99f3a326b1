"""The scalars of a recipe: what YAML says is a number is a number, and nothing else is."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

# YAML 1.1's other words for true and false, which YAML 1.2 reads as text.
BOOLEAN_WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _whole(value: Any) -> Any:
    """Take 1e3 for 1000, and refuse what no 64-bit integer holds."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PydanticCustomError("too_large", "within 64 bits")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PydanticCustomError("too_large", "within 64 bits")
    return value


def _flag(value: Any) -> Any:
    return BOOLEAN_WORDS.get(value.lower(), value) if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag), Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
