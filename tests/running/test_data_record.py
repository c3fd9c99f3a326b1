"""Whether a run may go on with other data: what the journal tells, and what is told to the user."""

from pathlib import Path
from typing import Any

import pytest

from mpt.errors import ExitCode, MptError
from mpt.running.data_record import record
from mpt.running.journal import Journal, read_events
from mpt.running.run_directory import RunDirectory

pytestmark = pytest.mark.fault(32)
OLD = {"documents": 3, "tokens": 90, "fingerprint": "aa"}
NEW = {"documents": 4, "tokens": 90, "fingerprint": "bb"}
TRAINED = ("training_started", {"step": 0})
ALLOWED = ("run_resumed", {"checkpoint": None, "accepts_changes": True})
NOT_ALLOWED = ("run_resumed", {"checkpoint": None, "accepts_changes": False})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def tell(run: RunDirectory, *events: tuple[str, dict[str, Any]]) -> Journal:
    journal = Journal(run.journal, 2)
    for kind, payload in events:
        journal.append(kind, **payload)
    return journal


def kinds(run: RunDirectory) -> list[str]:
    return [event["kind"] for event in read_events(run.journal)]


@pytest.mark.parametrize(
    "events",
    [
        (),
        (("data_prepared", NEW), TRAINED),
        (("data_prepared", OLD),),
        (("data_prepared", OLD), NOT_ALLOWED),
        (TRAINED,),
    ],
    ids=["a new run", "the same data", "it failed before its first step", "and was started again", "an earlier mpt's"],
)
def test_data_is_recorded_where_nothing_else_was_trained_on(run: RunDirectory, events: Any) -> None:
    record(run, tell(run, *events), NEW)
    assert kinds(run) == [*(kind for kind, _ in events), "data_prepared"]
    assert read_events(run.journal)[-1].items() >= NEW.items()


@pytest.mark.parametrize(
    "events",
    [
        (("data_prepared", OLD), TRAINED),
        (("data_prepared", OLD), TRAINED, NOT_ALLOWED),
        (("data_prepared", OLD), TRAINED, ALLOWED, NOT_ALLOWED),
        (TRAINED, ALLOWED, ("data_prepared", OLD)),
        (("run_resumed", {"checkpoint": None}), ("data_prepared", OLD), TRAINED),
    ],
    ids=[
        "a restart",
        "another start",
        "an earlier start allowed it",
        "it was taken up before",
        "an earlier mpt's start",
    ],
)
def test_other_data_is_refused_with_every_difference_and_nothing_is_written(run: RunDirectory, events: Any) -> None:
    journal = tell(run, *events)
    before = kinds(run)
    with pytest.raises(MptError) as refused:
        record(run, journal, NEW)
    assert refused.value.exit_code == ExitCode.USAGE
    assert refused.value.problem.splitlines()[1:] == ["    documents: 3 -> 4", "    fingerprint: aa -> bb"]
    assert "--accept-changes" in refused.value.remedy
    assert kinds(run) == before


def test_other_data_that_is_allowed_is_journalled_and_counts_from_then_on(run: RunDirectory) -> None:
    journal = tell(run, ("data_prepared", OLD), TRAINED, ALLOWED)
    record(run, journal, NEW)
    record(run, journal, NEW)  # a restart
    (accepted,) = (event for event in read_events(run.journal) if event["kind"] == "changes_accepted")
    assert accepted["changes"] == [
        {"key": "data.documents", "was": 3, "now": 4},
        {"key": "data.fingerprint", "was": "aa", "now": "bb"},
    ]
    with pytest.raises(MptError):
        record(run, journal, OLD)
