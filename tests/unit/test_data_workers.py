"""How many processes tokenise."""

from dataclasses import replace

import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.data_workers import MOST, choose_data_workers
from mpt.planning.decision import Origin


@pytest.mark.parametrize(
    ("asked", "cores", "workers", "origin"),
    [
        ("auto", None, 1, Origin.AUTO),
        ("auto", 1, 1, Origin.AUTO),
        ("auto", MOST, MOST, Origin.AUTO),
        ("auto", 4 * MOST, MOST, Origin.AUTO),
        (1, 8, 1, Origin.ASKED),
        (100, 8, 100, Origin.ASKED),
    ],
)
def test_workers_are_those_that_were_asked_for_or_one_a_core(
    asked: int, cores: int | None, workers: int, origin: Origin
) -> None:
    decision = choose_data_workers(asked, replace(parse_machine("cpu"), cpu_cores=cores))  # type: ignore[arg-type]
    assert (decision.value, decision.origin) == (workers, origin)
    assert decision.reason
