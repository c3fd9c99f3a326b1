"""The largest beta2 under which a bf16 second moment decays."""

import math

import pytest

from mpt.planning.second_moment import second_moment_decays

THRESHOLD = 257 / 258


@pytest.mark.parametrize(
    ("beta2", "decays"),
    [
        (0.0, True),
        (0.5, True),
        (0.95, True),
        (0.99, True),
        (0.995, True),
        (0.996, True),
        (THRESHOLD - 1e-9, True),
        (THRESHOLD + 1e-9, False),
        (0.9965, False),
        (0.998, False),
        (0.999, False),
        (math.nextafter(1.0, 0.0), False),
    ],
)
def test_a_bf16_second_moment_decays_up_to_257_258ths(beta2: float, decays: bool) -> None:
    assert second_moment_decays(beta2) is decays


@pytest.mark.parametrize("beta2", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_beta2_that_adam_does_not_take_is_refused(beta2: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        second_moment_decays(beta2)
