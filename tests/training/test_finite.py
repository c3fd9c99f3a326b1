"""What of a run's tensors is not finite, by name: one bad number anywhere in any of them."""

import math
from typing import Any

import pytest
import torch

from mpt.training.finite import _not_finite

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_bad_number_is_found_wherever_it_stands(dtype: Any, value: float, place: int) -> None:
    spoilt = torch.randn(1000).to(dtype)
    spoilt[place] = value
    sound = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=dtype)
    named = [("sound", sound), ("spoilt", spoilt.reshape(10, 100).T), ("sound too", torch.randn(3, 4).to(dtype))]
    assert _not_finite(named) == ["spoilt"]


def test_numbers_of_each_sort_are_looked_at_and_those_without_are_not() -> None:
    named = [
        ("a step", torch.tensor(math.nan)),
        ("nothing", torch.empty(0)),
        ("whole numbers", torch.tensor([1, 2])),
        ("a part", torch.tensor([1.0, math.inf, 2.0])[::2]),
        ("both ends", torch.tensor([math.inf, -math.inf, math.nan])),
        ("the largest of fp64", torch.tensor([1e300], dtype=torch.float64)),
    ]
    assert _not_finite(named) == ["a step", "both ends"]
