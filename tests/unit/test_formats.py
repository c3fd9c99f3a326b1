"""The float formats agree with their definitions, and with torch where torch has them."""

import math
import random
import struct
from fractions import Fraction

import pytest

from mpt.hardware.formats import (
    BF16,
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E4M3FNUZ,
    FP8_E5M2,
    FP8_E5M2FNUZ,
    FP16,
    FP32,
    TF32,
    FloatFormat,
    Outcome,
    round_to,
)

SMALL_FORMATS = [FP16, BF16, FP8_E4M3, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ, FP4_E2M1]
TORCH_NAMES = {
    FP16: "float16",
    BF16: "bfloat16",
    FP8_E4M3: "float8_e4m3fn",
    FP8_E5M2: "float8_e5m2",
    FP8_E4M3FNUZ: "float8_e4m3fnuz",
    FP8_E5M2FNUZ: "float8_e5m2fnuz",
}


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, FloatFormat) else None


@pytest.mark.parametrize(
    ("target", "bits", "largest", "smallest_normal", "smallest_subnormal", "epsilon", "exact_to"),
    [
        (FP32, 32, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23, 2**24),
        (TF32, 19, (2 - 2**-10) * 2.0**127, 2.0**-126, 2.0**-136, 2.0**-10, 2048),
        (FP16, 16, 65504, 2.0**-14, 2.0**-24, 2.0**-10, 2048),
        (BF16, 16, (2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7, 256),
        (FP8_E4M3, 8, 448, 2.0**-6, 2.0**-9, 0.125, 16),
        (FP8_E5M2, 8, 57344, 2.0**-14, 2.0**-16, 0.25, 8),
        (FP8_E4M3FNUZ, 8, 240, 2.0**-7, 2.0**-10, 0.125, 16),
        (FP8_E5M2FNUZ, 8, 57344, 2.0**-15, 2.0**-17, 0.25, 8),
        (FP4_E2M1, 4, 6, 1, 0.5, 0.5, 4),
    ],
    ids=name_of,
)
def test_the_limits_of_a_format_follow_from_its_bits(
    target: FloatFormat,
    bits: int,
    largest: float,
    smallest_normal: float,
    smallest_subnormal: float,
    epsilon: float,
    exact_to: int,
) -> None:
    assert target.bits == bits
    assert target.max == largest
    assert target.smallest_normal == smallest_normal
    assert target.smallest_subnormal == smallest_subnormal
    assert target.epsilon == epsilon
    assert target.integers_exact_to == exact_to


@pytest.mark.parametrize("target", FORMATS, ids=name_of)
def test_the_first_whole_number_after_the_exact_ones_is_rounded(target: FloatFormat) -> None:
    assert round_to(target, Fraction(target.integers_exact_to)).is_exact
    assert not round_to(target, Fraction(target.integers_exact_to + 1)).is_exact


@pytest.mark.parametrize("target", SMALL_FORMATS, ids=name_of)
def test_every_code_survives_decoding_and_encoding(target: FloatFormat) -> None:
    for code in range(2**target.bits):
        value = target.decode(code)
        if not math.isnan(value):
            assert target.encode(value) == code


@pytest.mark.parametrize(
    ("target", "number", "value", "outcome"),
    [
        (FP16, 65504.0, 65504.0, Outcome.NORMAL),
        (FP16, 65519.999, 65504.0, Outcome.NORMAL),
        (FP16, 65520.0, math.inf, Outcome.INF),
        (FP16, -65520.0, -math.inf, Outcome.INF),
        (FP16, 2.0**-14, 2.0**-14, Outcome.NORMAL),
        (FP16, 2.0**-15, 2.0**-15, Outcome.SUBNORMAL),
        (FP16, 2.0**-25, 0.0, Outcome.ZERO),  # the tie goes to the even code, 0
        (FP16, 2.0**-25 * 1.0001, 2.0**-24, Outcome.SUBNORMAL),
        (FP16, 2049.0, 2048.0, Outcome.NORMAL),
        (FP16, 2051.0, 2052.0, Outcome.NORMAL),
        (BF16, 257.0, 256.0, Outcome.NORMAL),
        (BF16, 1e39, math.inf, Outcome.INF),
        (BF16, 2.0**-134, 0.0, Outcome.ZERO),
        (TF32, 1 + 2.0**-11, 1.0, Outcome.NORMAL),
        (TF32, 1 + 3 * 2.0**-11, 1 + 2.0**-9, Outcome.NORMAL),
        (FP8_E4M3, 448.0, 448.0, Outcome.NORMAL),
        (FP8_E4M3, 464.0, 448.0, Outcome.NORMAL),  # the tie before the code of NaN is still 448, rounded
        (FP8_E4M3, 480.0, 448.0, Outcome.SATURATED),
        (FP8_E4M3, math.inf, 448.0, Outcome.SATURATED),
        (FP8_E4M3, -math.inf, -448.0, Outcome.SATURATED),
        (FP8_E4M3, 2.0**-10, 0.0, Outcome.ZERO),
        (FP8_E5M2, 61439.0, 57344.0, Outcome.NORMAL),
        (FP8_E5M2, 61440.0, math.inf, Outcome.INF),
        (FP4_E2M1, 5.0, 4.0, Outcome.NORMAL),
        (FP4_E2M1, 1e9, 6.0, Outcome.SATURATED),
        (FP32, 0.0, 0.0, Outcome.ZERO),
        (FP32, math.inf, math.inf, Outcome.INF),
    ],
    ids=lambda value: name_of(value) or str(value),
)
def test_a_number_becomes(target: FloatFormat, number: float, value: float, outcome: Outcome) -> None:
    rounded = round_to(target, number)
    assert (rounded.value, rounded.outcome) == (value, outcome)


@pytest.mark.parametrize("target", FORMATS, ids=name_of)
def test_nan_stays_nan_where_there_is_one(target: FloatFormat) -> None:
    rounded = round_to(target, math.nan)
    assert math.isnan(rounded.value)
    assert rounded.outcome is (Outcome.NAN if target.has_nan else Outcome.NO_NAN)


def test_the_sign_of_zero_is_kept_except_where_its_code_is_nan() -> None:
    assert FP16.encode(-0.0) == 0x8000
    assert FP16.encode(-1e-30) == 0x8000
    assert FP8_E4M3FNUZ.encode(-0.0) == 0
    assert math.isnan(FP8_E4M3FNUZ.decode(0x80))


def test_the_error_of_rounding_is_exact() -> None:
    assert round_to(BF16, Fraction(1, 10)).relative_error == Fraction(1, 1024)
    assert round_to(FP16, Fraction(0)).relative_error is None
    assert round_to(FP16, Fraction(1, 10**30)).relative_error == -1


def test_fp32_agrees_with_the_machine_on_random_doubles() -> None:
    random.seed(7)
    for _ in range(20_000):
        number = struct.unpack("d", random.randbytes(8))[0]
        if math.isnan(number) or abs(number) > float(FP32.max):
            continue
        assert FP32.encode(number) == struct.unpack("I", struct.pack("f", number))[0]


def _random_floats(count: int) -> list[float]:
    """fp32 values over the whole range and dense around the small formats' limits, ties among them."""
    random.seed(11)
    anywhere = [struct.unpack("f", random.randbytes(4))[0] for _ in range(count)]
    scaled = [
        struct.unpack("f", struct.pack("f", random.uniform(-2, 2) * 2.0 ** random.randint(-27, 18))) [0]
        for _ in range(count)
    ]  # fmt: skip
    ties = [math.ldexp(random.randint(-(2**12), 2**12), random.randint(-28, 6)) for _ in range(count)]
    return [0.0, -0.0, math.inf, -math.inf, *anywhere, *scaled, *ties]


@pytest.mark.parametrize("target", TORCH_NAMES, ids=name_of)
def test_rounding_agrees_with_casts_of_torch_from_fp32(target: FloatFormat) -> None:
    torch = pytest.importorskip("torch")
    numbers = [number for number in _random_floats(4_000) if not math.isnan(number)]
    cast = torch.tensor(numbers, dtype=torch.float32).to(getattr(torch, TORCH_NAMES[target])).float().tolist()
    for number, theirs in zip(numbers, cast, strict=True):
        ours = round_to(target, number).value
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), (number, ours, theirs)


@pytest.mark.parametrize("target", TORCH_NAMES, ids=name_of)
def test_every_code_means_what_torch_says(target: FloatFormat) -> None:
    torch = pytest.importorskip("torch")
    codes = list(range(2**target.bits))
    integers = torch.tensor(codes, dtype=torch.int32).to(torch.uint8 if target.bits == 8 else torch.uint16)
    values = integers.view(getattr(torch, TORCH_NAMES[target])).float().tolist()
    for code, theirs in zip(codes, values, strict=True):
        ours = target.decode(code)
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), hex(code)


@pytest.mark.parametrize("target", [FP32, *TORCH_NAMES], ids=name_of)
def test_the_limits_agree_with_torch_finfo(target: FloatFormat) -> None:
    torch = pytest.importorskip("torch")
    finfo = torch.finfo(getattr(torch, TORCH_NAMES.get(target, "float32")))
    assert float(target.max) == finfo.max
    assert float(target.smallest_normal) == finfo.smallest_normal
    if target is not FP8_E5M2FNUZ:  # torch 2.13 says 0.125 there, and the number after 1 is 1.25
        assert float(target.epsilon) == finfo.eps
