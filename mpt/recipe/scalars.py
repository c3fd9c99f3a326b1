"""The scalars of a recipe: what YAML says is a number is a number, and nothing else is."""

import re
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from mpt.terms import Task

# YAML 1.1's other words for true and false, which YAML 1.2 reads as text.
BOOLEAN_WORDS = {"yes": True, "on": True, "no": False, "off": False}

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# A hundred years: longer than any run, and short enough for every clock.
LONGEST_S = 100 * 365.25 * 86400
DOTTED = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+"
DURATION = r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)"


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


def _duration(value: Any) -> Any:
    """Take 90s, 30m, 12h and 2d for seconds.

    >>> _duration("90s"), _duration("1.5h"), _duration(30)
    (90.0, 5400.0, 30.0)
    """
    if isinstance(value, str) and (written := re.fullmatch(DURATION, value)):
        value = float(written[1]) * SECONDS[written[2]]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= LONGEST_S:
        raise PydanticCustomError("duration", "a duration")
    return float(value)


def _dotted(value: str) -> str:
    """Take the path of a module: words with dots between them.

    >>> _dotted("my_package.my_task")
    'my_package.my_task'
    """
    if not re.fullmatch(DOTTED, value):
        known = [task.value for task in Task]
        near = get_close_matches(value, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"write {', '.join(known)}, or my_package.my_task for your own"
        raise ValueError(f"there is no task {value!r}; {hint}")
    return value


Integer = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag), Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
OwnTask = Annotated[str, AfterValidator(_dotted), WithJsonSchema({"type": "string", "pattern": f"^{DOTTED}$"})]
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{DURATION}$"}]}),
]
"""Seconds; written as a number or as 90s, 30m, 12h, 2d."""
