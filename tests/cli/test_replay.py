"""`mpt replay` on what can't be replayed. What it makes again of real incidents: tests/training/test_autopsy.py."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mpt.running.lock import locked
from mpt.running.run_directory import write_json
from tests.cli.real_runs import MPT
from tests.running.small_runs import small_plan


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two incidents, of which the first has lost its weights."""
    folder = tmp_path / "runs" / "bad"
    for number in ("0001", "0002"):
        incident = folder / "incidents" / number
        incident.mkdir(parents=True)
        write_json(
            incident / "autopsy.json",
            {"code": "N2", "step": 3, "attempt": 1, "loss": "nan", "cause": "x", "micro_batches": 1},
        )
    (folder / "incidents" / "0002" / "weights.safetensors").write_bytes(b"")
    write_json(folder / "attempts" / "001" / "plan.json", small_plan().to_json())
    folder.joinpath("journal.jsonl").write_text(json.dumps({"time": "", "attempt": 0, "kind": "run_created"}) + "\n")
    return folder


def replay(run: Path, *incident: str) -> "subprocess.CompletedProcess[str]":
    command = [*MPT, "replay", str(run), *incident]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("incident", "code", "says"),
    [
        ("7", 2, "has no incident 7\n  There are 0001, 0002."),
        ("../0001", 2, "has no incident ../0001"),
        ("1", 83, "holds no weights"),
        ("0001", 83, "Replay a newer incident"),
    ],
)
def test_an_incident_that_cannot_be_replayed_is_one_message(run: Path, incident: str, code: int, says: str) -> None:
    done = replay(run, incident)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("damaged", ["incidents/0002/autopsy.json", "attempts/001/plan.json"])
def test_a_damaged_file_is_named(run: Path, damaged: str) -> None:
    file = run / damaged
    file.write_text(file.read_text()[:-20])
    done = replay(run, "2")
    assert done.returncode == 83, done.stderr
    assert str(file) in done.stderr and "Traceback" not in done.stderr


def test_a_run_without_incidents_says_so(run: Path) -> None:
    shutil.rmtree(run / "incidents")
    done = replay(run)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no incident\n  `mpt doctor`" in done.stderr


def test_nobody_may_train_in_the_run_meanwhile(run: Path) -> None:
    with locked(run / "lock"):
        done = replay(run)  # the newest, which has weights
    assert done.returncode == 85, done.stderr
    assert not (run / "incidents" / "0002" / "replay").exists()
