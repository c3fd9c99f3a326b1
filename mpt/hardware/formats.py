"""THE float formats, computed from their definition: sign, exponent and mantissa bits, and what the last codes mean.

Every limit here is derived in exact integers and fractions; none is typed in. `round_to` says what a number becomes in
a format, rounded to nearest with ties to even, as hardware and torch do it. Knows nothing of devices.

Definitions: IEEE 754-2019 section 3.4 (fp32, fp16); "BFLOAT16 Hardware Numerics Definition" (Intel, 2018); NVIDIA A100
whitepaper (tf32); "FP8 Formats for Deep Learning" (Micikevicius et al. 2022, table 1: e4m3, e5m2); "8-bit Numerical
Formats for Deep Neural Networks" (Noune et al. 2022: the fnuz pair); OCP Microscaling Formats v1.0 (e2m1).
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction


class Specials(StrEnum):
    """What the codes at the end of the range are spent on."""

    IEEE = "ieee"  # the highest exponent holds infinity and NaN
    FN = "fn"  # finite: no infinity, NaN only where exponent and mantissa are all ones
    FNUZ = "fnuz"  # finite, unsigned zero: the code of -0 is the only NaN
    NONE = "none"  # every code is a number


class Overflow(StrEnum):
    """What a number beyond the largest one becomes."""

    INF = "inf"
    SATURATE = "saturate"
    NAN = "nan"


class Outcome(StrEnum):
    """Where a number ends in a format."""

    NORMAL = "normal"
    SUBNORMAL = "subnormal"
    ZERO = "zero"
    SATURATED = "saturated"
    INF = "inf"
    NAN = "nan"
    NO_NAN = "no_nan"  # NaN was asked of a format that has none


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary float format: value = (-1)^s * 2^(e - bias) * 1.m, or 2^(1 - bias) * 0.m where e is 0.

    >>> FP16.max, float(FP16.smallest_subnormal)
    (Fraction(65504, 1), 5.960464477539063e-08)
    """

    name: str
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = Specials.IEEE
    overflow: Overflow = Overflow.INF
    note: str = ""

    @property
    def bits(self) -> int:
        """The bits that carry information. tf32 has 19 of them and is stored in 32."""
        return self.sign_bits + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        half = 1 << (self.exponent_bits - 1)
        return half if self.specials is Specials.FNUZ else half - 1

    @property
    def max_code(self) -> int:
        """The code of the largest finite number, without the sign bit."""
        all_ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.specials is Specials.IEEE:
            return all_ones - (1 << self.mantissa_bits)
        return all_ones - 1 if self.specials is Specials.FN else all_ones

    @property
    def max(self) -> Fraction:
        return self.magnitude(self.max_code)

    @property
    def smallest_normal(self) -> Fraction:
        return self.magnitude(2**self.mantissa_bits)

    @property
    def smallest_subnormal(self) -> Fraction:
        return self.magnitude(1)

    @property
    def epsilon(self) -> Fraction:
        """The distance from 1 to the next number."""
        return Fraction(1, 2**self.mantissa_bits)

    @property
    def decimal_digits(self) -> float:
        """Significant decimal digits: log10 of 2 to the significand's bits, the hidden one included."""
        return (self.mantissa_bits + 1) * math.log10(2)

    @property
    def integers_exact_to(self) -> int:
        """Every whole number up to this one is held exactly."""
        return min(1 << (self.mantissa_bits + 1), int(self.max))

    @property
    def has_inf(self) -> bool:
        return self.specials is Specials.IEEE

    @property
    def has_nan(self) -> bool:
        return self.specials is not Specials.NONE

    def magnitude(self, code: int) -> Fraction:
        """The number that a code without sign bit stands for, special meanings aside."""
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        significand = mantissa + (1 << self.mantissa_bits if exponent else 0)
        return significand * _power_of_two(max(exponent, 1) - self.bias - self.mantissa_bits)

    def decode(self, code: int) -> float:
        """The value of a code, sign bit included. Every value of every format here is exact in a Python float.

        >>> FP8_E4M3.decode(0x7E), FP8_E4M3.decode(0x7F), FP16.decode(0xFC00)
        (448.0, nan, -inf)
        """
        if not 0 <= code < 2**self.bits:
            raise ValueError(f"{self.name} has codes from 0 to {2**self.bits - 1}, not {code}")
        sign, magnitude = divmod(code, 2 ** (self.exponent_bits + self.mantissa_bits))
        if self.specials is Specials.FNUZ and sign and not magnitude:
            return math.nan
        value = float(self.magnitude(magnitude)) if magnitude <= self.max_code else math.nan
        if self.has_inf and magnitude == self.max_code + 1:
            value = math.inf
        return -value if sign else value

    def encode(self, number: Fraction | float) -> int:
        """The code that `number` becomes. A NaN that the format can't hold raises ValueError.

        >>> hex(BF16.encode(1.0)), hex(FP8_E4M3.encode(1e9))
        ('0x3f80', '0x7e')
        """
        rounded = round_to(self, number)
        sign_bit = 1 << (self.exponent_bits + self.mantissa_bits)
        if rounded.outcome is Outcome.NO_NAN:
            raise ValueError(f"{self.name} has no NaN")
        if rounded.outcome is Outcome.NAN:
            return sign_bit if self.specials is Specials.FNUZ else sign_bit - 1
        sign = sign_bit if math.copysign(1.0, rounded.value) < 0 else 0
        if rounded.outcome is Outcome.INF:
            return sign + self.max_code + 1
        return sign + self._nearest_code(abs(Fraction(rounded.value)))

    def _nearest_code(self, magnitude: Fraction) -> int:
        """The code nearest to a magnitude, ties to the even code, as if the exponent had no upper end.

        Codes of neighbours differ by one across every binade, so rounding is a rounding of the code itself.
        """
        low = math.floor(magnitude / self.smallest_subnormal)
        exponent = max(low.bit_length() - self.mantissa_bits, 1)
        ulp = _power_of_two(exponent - self.bias - self.mantissa_bits)
        steps = round(magnitude / ulp)  # Fraction rounds half to even
        return steps + ((exponent - 1) << self.mantissa_bits)


def _power_of_two(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


@dataclass(frozen=True, slots=True)
class Rounded:
    """What a number became. `relative_error` is (value - number) / number; None where that has no meaning."""

    value: float
    outcome: Outcome
    is_exact: bool
    relative_error: Fraction | None


def round_to(target: FloatFormat, number: Fraction | float) -> Rounded:
    """Round to nearest, ties to even; beyond the largest number follow the format's overflow rule.

    A number overflows where it would round to the code after the largest: from half an ulp beyond it on (IEEE 754-2019
    section 4.3.1). Rounds once: a path over another format (fp64 to fp32 to fp16) can differ in the last bit.

    >>> round_to(FP16, 65519.0).value, round_to(FP16, 65520.0).value
    (65504.0, inf)
    >>> round_to(FP8_E4M3, 1e6).outcome
    <Outcome.SATURATED: 'saturated'>
    """
    if isinstance(number, float) and math.isnan(number):
        if target.has_nan:
            return Rounded(math.nan, Outcome.NAN, is_exact=True, relative_error=None)
        return Rounded(math.nan, Outcome.NO_NAN, is_exact=False, relative_error=None)
    is_negative = math.copysign(1.0, number) < 0 if isinstance(number, float) else number < 0
    if isinstance(number, float) and math.isinf(number):
        return _overflow(target, is_negative, is_infinite=True)
    exact = Fraction(number)
    code = target._nearest_code(abs(exact))
    if code > target.max_code:
        return _overflow(target, is_negative, is_infinite=False, exact=exact)
    magnitude = target.magnitude(code)
    value = float(-magnitude if is_negative else magnitude)
    if is_negative and not code and target.specials is not Specials.FNUZ:
        value = -0.0
    outcome = Outcome.NORMAL if code >= 2**target.mantissa_bits else Outcome.SUBNORMAL
    outcome = outcome if code else Outcome.ZERO
    return Rounded(value, outcome, Fraction(value) == exact, (Fraction(value) - exact) / exact if exact else None)


def _overflow(target: FloatFormat, is_negative: bool, *, is_infinite: bool, exact: Fraction | None = None) -> Rounded:
    sign = -1.0 if is_negative else 1.0
    if target.overflow is Overflow.INF:
        return Rounded(sign * math.inf, Outcome.INF, is_exact=is_infinite, relative_error=None)
    if target.overflow is Overflow.NAN:
        return Rounded(math.nan, Outcome.NAN, is_exact=False, relative_error=None)
    value = sign * float(target.max)
    error = None if exact is None else (Fraction(value) - exact) / exact
    return Rounded(value, Outcome.SATURATED, is_exact=False, relative_error=error)


FP32 = FloatFormat("fp32", 1, 8, 23)
TF32 = FloatFormat("tf32", 1, 8, 10, note="a way to compute, not to store: matmul inputs rounded to 19 of 32 bits")
FP16 = FloatFormat("fp16", 1, 5, 10)
BF16 = FloatFormat("bf16", 1, 8, 7)
FP8_E4M3 = FloatFormat(
    "fp8_e4m3", 1, 4, 3, Specials.FN, Overflow.SATURATE,
    note="torch.float8_e4m3fn; casts saturate since torch 2.12 (PR #178817), and gave NaN before",
)  # fmt: skip
FP8_E5M2 = FloatFormat("fp8_e5m2", 1, 5, 2, note="torch.float8_e5m2")
FP8_E4M3FNUZ = FloatFormat(
    "fp8_e4m3fnuz", 1, 4, 3, Specials.FNUZ, Overflow.NAN, note="AMD gfx942 (MI300): half the range of fp8_e4m3"
)
FP8_E5M2FNUZ = FloatFormat("fp8_e5m2fnuz", 1, 5, 2, Specials.FNUZ, Overflow.NAN, note="AMD gfx942 (MI300)")
FP4_E2M1 = FloatFormat(
    "fp4_e2m1",
    1,
    2,
    1,
    Specials.NONE,
    Overflow.SATURATE,
    note="the elements of NVFP4 and MXFP4, with a scale per block",
)

FORMATS: tuple[FloatFormat, ...] = (
    FP32, TF32, FP16, BF16, FP8_E4M3, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ, FP4_E2M1,
)  # fmt: skip
