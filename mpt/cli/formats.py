"""`mpt formats`: the float formats side by side, and what a number becomes in each."""

import json as json_module
import math
import re
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

import typer

from mpt.errors import MptError
from mpt.hardware.formats import FORMATS, FloatFormat, Outcome, Rounded, round_to

# Far beyond every format; keeps 1e999999999 from building a number of a billion digits.
LARGEST_EXPONENT = 5_000
LONGEST_VALUE = 1_000


def formats(
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VALUE]...", help="Numbers such as 0.1, -1.5, 65520, 1e-8, 1/3, inf, nan."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the float formats; with VALUEs, what each becomes in each format."""
    numbers = [(text, parse_number(text)) for text in values or []]
    if json:
        print(json_module.dumps(to_json_object(numbers), indent=2, allow_nan=False))
        return
    print(_limits_table())
    for target in FORMATS:
        if target.note:
            print(textwrap.fill(f"{target.name}: {target.note}", 80, subsequent_indent="  "))
    for text, number in numbers:
        print()
        print(_value_table(text, number))


def parse_number(text: str) -> Fraction | float:
    """Read a decimal exactly; only infinities, NaN and -0 come back as floats.

    >>> parse_number("0.1"), parse_number("-inf"), parse_number("1/3")
    (Fraction(1, 10), -inf, Fraction(1, 3))
    """
    lowered = text.strip().lower()
    if re.fullmatch(r"[+-]?(inf|infinity|nan)", lowered):
        return float(lowered)
    exponent = re.search(r"e([+-]?\d+)$", lowered)
    is_too_large = exponent is not None and abs(int(exponent[1][:9])) > LARGEST_EXPONENT
    if len(lowered) > LONGEST_VALUE or is_too_large:
        raise MptError(
            f"{text[:40]!r} is beyond what can be written out exactly",
            remedy=f"Give exponents up to {LARGEST_EXPONENT} either way, and at most {LONGEST_VALUE} characters.",
        )
    try:
        number = Fraction(lowered)
    except (ValueError, ZeroDivisionError):
        raise MptError(
            f"{text!r} is not a number", remedy="Give numbers such as 0.1, -1.5, 65520, 1e-8, 1/3, inf or nan."
        ) from None
    return -0.0 if number == 0 and lowered.startswith("-") else number


def to_json_object(numbers: Sequence[tuple[str, Fraction | float]]) -> dict[str, Any]:
    """The formats and what each number becomes, ready for JSON: non-finite numbers are strings."""
    return {
        "formats": [
            {
                "name": target.name,
                "bits": target.bits,
                "sign_bits": target.sign_bits,
                "exponent_bits": target.exponent_bits,
                "mantissa_bits": target.mantissa_bits,
                "bias": target.bias,
                "max": float(target.max),
                "smallest_normal": float(target.smallest_normal),
                "smallest_subnormal": float(target.smallest_subnormal),
                "epsilon": float(target.epsilon),
                "decimal_digits": round(target.decimal_digits, 2),
                "integers_exact_to": target.integers_exact_to,
                "has_inf": target.has_inf,
                "has_nan": target.has_nan,
                "overflow": target.overflow.value,
                "note": target.note,
            }
            for target in FORMATS
        ],
        "values": [
            {"value": text, "becomes": {target.name: _rounded_to_json(target, number) for target in FORMATS}}
            for text, number in numbers
        ],
    }


def describe(rounded: Rounded) -> str:
    """Say in words what happened to a number.

    >>> from mpt.hardware.formats import BF16, FP16
    >>> describe(round_to(BF16, Fraction(1, 10))), describe(round_to(FP16, Fraction(10**6)))
    ('rounded by +0.0977 %', 'overflows to inf')
    """
    match rounded.outcome:
        case Outcome.NAN:
            return "exact" if rounded.is_exact else "overflows to nan"
        case Outcome.NO_NAN:
            return "has no nan"
        case Outcome.INF:
            return "exact" if rounded.is_exact else "overflows to inf"
        case Outcome.SATURATED:
            return f"saturates at the largest number, {_number_text(rounded.value)}"
        case Outcome.ZERO:
            return "exact" if rounded.is_exact else "underflows to 0"
        case Outcome.SUBNORMAL:
            return f"subnormal, {_rounding_text(rounded)}"
        case Outcome.NORMAL:
            return _rounding_text(rounded)


def _rounding_text(rounded: Rounded) -> str:
    if rounded.is_exact or rounded.relative_error is None:
        return "exact"
    return f"rounded by {float(rounded.relative_error) * 100:+.3g} %"


def _rounded_to_json(target: FloatFormat, number: Fraction | float) -> dict[str, Any]:
    rounded = round_to(target, number)
    return {
        "value": rounded.value if math.isfinite(rounded.value) else str(rounded.value),
        "outcome": rounded.outcome.value,
        "exact": rounded.is_exact,
        "relative_error": None if rounded.relative_error is None else float(rounded.relative_error),
        "code": None if rounded.outcome is Outcome.NO_NAN else f"0x{target.encode(number):0{(target.bits + 3) // 4}x}",
        "text": describe(rounded),
    }


def _number_text(value: float) -> str:
    return f"{value:.8g}"


def _limits_table() -> str:
    """Under 80 columns, whatever the terminal: a folded number is no number."""
    header = ("format", "bits", "s/e/m", "max", "min normal", "min subnormal", "epsilon", "digits")
    rows: list[tuple[str, ...]] = [header]
    for target in FORMATS:
        limits = (target.max, target.smallest_normal, target.smallest_subnormal, target.epsilon)
        rows.append(
            (
                target.name,
                str(target.bits),
                f"{target.sign_bits}/{target.exponent_bits}/{target.mantissa_bits}",
                *(f"{float(limit):.5g}" for limit in limits),
                f"{target.decimal_digits:.2f}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _value_table(text: str, number: Fraction | float) -> str:
    lines = [f"{text if len(text) <= 60 else text[:57] + '...'} becomes"]
    for target in FORMATS:
        rounded = round_to(target, number)
        lines.append(f"{target.name:<12} {_number_text(rounded.value):>14}  {describe(rounded)}")
    return "\n".join(lines)
