"""The betas under which moments in bf16 follow the gradients."""

import math

import pytest

from mpt.planning.moments import MAX_ERROR, moment_error, moments_fit_bf16

LARGEST = 1 - 11 / 256  # where the error is a tenth: share / (1 - share) with a share of 1/11


@pytest.mark.parametrize(
    ("beta", "fits"),
    [
        (0.0, True),
        (0.5, True),
        (0.95, True),
        (LARGEST - 1e-9, True),
        (LARGEST + 1e-9, False),
        (0.96, False),
        (0.99, False),
        (0.995, False),
        (0.999, False),
        (math.nextafter(1.0, 0.0), False),
    ],
)
def test_moments_fit_bf16_up_to_the_beta_where_a_tenth_would_be_lost(beta: float, fits: bool) -> None:
    assert moments_fit_bf16(0.9, beta) is fits
    assert moments_fit_bf16(beta, 0.9) is fits
    assert (moment_error(beta) <= MAX_ERROR) is fits


def test_a_moment_that_takes_in_less_than_half_a_unit_stops_anywhere() -> None:
    assert moment_error(255 / 256) == math.inf
    assert moment_error(255 / 256 - 1e-6) < math.inf


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_beta_that_adam_does_not_take_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        moment_error(beta)
