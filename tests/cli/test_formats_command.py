"""`mpt formats` as a person and a program call it."""

import json
import math

import pytest
import typer
from typer.testing import CliRunner, Result

from mpt.cli.formats import formats, parse_number
from mpt.errors import MptError

app = typer.Typer()
app.command(context_settings={"ignore_unknown_options": True})(formats)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def becomes(value: str) -> dict[str, dict[str, object]]:
    result = call("--json", value)
    assert result.exit_code == 0, result.output
    answer: dict[str, dict[str, object]] = json.loads(result.stdout)["values"][0]["becomes"]
    return answer


def test_the_table_shows_every_format_within_80_columns() -> None:
    lines = call("0.1", "-1e40").stdout.splitlines()
    assert lines[0].split()[0] == "format"
    for name in ("fp32", "tf32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"):
        assert any(line.startswith(f"{name} ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_json_is_one_object_with_the_limits() -> None:
    answer = json.loads(call("--json").stdout)
    fp16 = next(row for row in answer["formats"] if row["name"] == "fp16")
    assert (fp16["max"], fp16["smallest_normal"], fp16["smallest_subnormal"]) == (65504, 2.0**-14, 2.0**-24)
    assert answer["values"] == []


@pytest.mark.parametrize(
    ("value", "target", "expected", "text"),
    [
        ("-1.5", "bf16", -1.5, "exact"),
        ("0.1", "bf16", 0.10009765625, "rounded by +0.0977 %"),
        ("65520", "fp16", "inf", "overflows to inf"),
        ("-65520", "fp16", "-inf", "overflows to inf"),
        ("1e40", "fp32", "inf", "overflows to inf"),
        ("1e40", "fp8_e4m3", 448, "saturates at the largest number, 448"),
        ("-inf", "fp8_e4m3", -448, "saturates at the largest number, -448"),
        ("1e-8", "fp16", 0, "underflows to 0"),
        ("3e-8", "fp16", 2.0**-24, "subnormal, rounded by +98.7 %"),
        ("6103515625e-14", "fp16", 2.0**-14, "exact"),
        ("nan", "fp16", "nan", "exact"),
        ("inf", "bf16", "inf", "exact"),
        ("0", "fp32", 0, "exact"),
        ("1/3", "fp8_e5m2", 0.3125, "rounded by -6.25 %"),
    ],
)
def test_a_value_becomes(value: str, target: str, expected: float | str, text: str) -> None:
    found = becomes(value)[target]
    assert (found["value"], found["text"]) == (expected, text)


def test_values_are_shown_in_their_order() -> None:
    answer = json.loads(call("--json", "-1.5", "nan", "-inf", "1e40").stdout)
    assert [row["value"] for row in answer["values"]] == ["-1.5", "nan", "-inf", "1e40"]


@pytest.mark.parametrize("value", ["", "one", "1,5", "1.5x", "1/0", "--1", "0x10", "1e9999999999", "9" * 5_000])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(MptError) as refused:
        parse_number(value)
    assert refused.value.exit_code == 2
    assert len(refused.value.problem) < 200


def test_minus_zero_keeps_its_sign() -> None:
    assert math.copysign(1.0, parse_number("-0.0")) == -1
