"""Finished tiny runs that several tests look at."""

from collections.abc import Callable
from typing import Any

import pytest

from mpt.running.run_directory import RunDirectory
from tests.training.tiny_runs import FP16, Run, tiny_recipe


@pytest.fixture(scope="session")
def new_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Make a run directory for the tiny recipe with changes."""

    def make(**changes: Any) -> Run:
        return Run(RunDirectory(tmp_path_factory.mktemp("run")), tiny_recipe(**changes))

    return make


@pytest.fixture(scope="session")
def fp32_run(new_run: Callable[..., Run]) -> Run:
    """A finished run in fp32, with a sample at its end."""
    run = new_run(sample={"prompt": "The ", "max_new_tokens": 8})
    run.is_fresh = True
    assert run.train() == 0, run.log()
    return run


@pytest.fixture(scope="session")
def fp16_run(new_run: Callable[..., Run]) -> Run:
    """A finished run in fp16 whose first loss scale overflows."""
    run = new_run(precision=FP16 | {"loss_scale": {"initial": 2.0**27, "growth_interval": 3}})
    assert run.train() == 0, run.log()
    return run
