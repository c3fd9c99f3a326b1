"""Small runs, and none of their processes left behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running.small_runs import SmallRun, kill_all


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[Callable[..., SmallRun]]:
    """Make a runs folder for a small worker with wishes."""
    made: list[SmallRun] = []

    def make(**wishes: Any) -> SmallRun:
        made.append(SmallRun(tmp_path / f"runs-{len(made)}", wishes))
        return made[-1]

    yield make
    for run in made:
        kill_all(run)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The end state of a run that nothing befell."""
    run = SmallRun(tmp_path_factory.mktemp("undisturbed"))
    assert run.train().code == 0
    return run.state
