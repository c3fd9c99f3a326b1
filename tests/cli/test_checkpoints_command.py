"""`mpt checkpoints` lists, verifies and prunes, and meets bad runs with one message each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpt.running.checkpoints import commit, promote
from mpt.running.journal import Journal, read_events
from mpt.running.lineage import current_lineage, quarantine_later
from mpt.running.lock import locked
from mpt.running.manifest import digest
from mpt.running.run_directory import RunDirectory


def mpt(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `mpt checkpoints` in a folder; no answer of it is ever a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "checkpoints", *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def answer(folder: Path, *arguments: str) -> dict[str, Any]:
    """Give what `--json` prints, and nothing else, on stdout."""
    return dict(json.loads(mpt(folder, *arguments, "--json").stdout))


def save(run: RunDirectory, step: int, best: int | None = None) -> Path:
    staging, final = run.checkpoints / f".staging-{step}", run.checkpoints / f"checkpoint-{step}"
    staging.mkdir(parents=True)
    staging.joinpath("model.safetensors").write_bytes(b"weights" * 1000)
    state = {"best_model_checkpoint": None if best is None else f"checkpoint-{best}"}
    staging.joinpath("trainer_state.json").write_text(json.dumps(state))
    commit(staging, final, step=step, world_size=1, lineage=current_lineage(run), health={"finite": True})
    Journal(run.journal, 1).append("checkpoint_saved", step=step, name=final.name)
    return final


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose third lineage has four checkpoints: best, known good, plain, and one that is cut short."""
    run = RunDirectory(tmp_path / "runs" / "mine")
    run.checkpoints.mkdir(parents=True)
    journal = Journal(run.journal, 1)
    journal.append("run_created", recipe="mine")
    save(run, 5)
    for step in (10, 20):
        save(run, step)
        quarantine_later(run, journal, 5, "the loss rose")
    save(run, 10, best=5)
    promote(journal, 10)
    save(run, 15, best=5)
    save(run, 20, best=5).joinpath("model.safetensors").write_bytes(b"")
    return run


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_the_list_says_of_each_checkpoint_what_it_is(run: RunDirectory, tmp_path: Path) -> None:
    done = mpt(tmp_path, "list", "mine")
    assert done.returncode == 0
    rows = [line.split(maxsplit=1)[0] for line in done.stdout.splitlines()]
    assert rows[0] == "checkpoint"
    states = {line.split()[0]: line.split("  ")[-1] for line in done.stdout.splitlines()[1:]}
    assert states == {
        "checkpoint-5": "best",
        "checkpoint-10": "known-good",
        "checkpoint-15": "committed",
        "checkpoint-20": "damaged: model.safetensors has 0 bytes, and manifest.json says 7000",
        "quarantine-1/checkpoint-10": "quarantined",
        "quarantine-2/checkpoint-20": "quarantined",
    }
    assert "KiB" in done.stdout.splitlines()[1]


def test_the_list_as_json_holds_the_same(run: RunDirectory, tmp_path: Path) -> None:
    listed = answer(tmp_path, "list", "mine")
    assert (listed["run"], listed["lineage"]) == ("runs/mine", 3)
    rows = {row["name"]: row for row in listed["checkpoints"]}
    assert [row["lineage"] for row in rows.values()] == [1, 3, 3, 3, 1, 2]
    assert rows["checkpoint-10"]["known_good"]
    assert rows["checkpoint-5"]["best"]
    assert rows["checkpoint-5"]["step"] == 5
    assert rows["checkpoint-5"]["size_bytes"] > 7000
    assert rows["checkpoint-5"]["saved_at"] is not None
    assert rows["checkpoint-20"]["state"] == "damaged"


@pytest.mark.parametrize("where", ["mine", "runs/mine", "runs/mine/", "absolute", "elsewhere"])
def test_a_run_is_named_by_its_directory_or_its_name(run: RunDirectory, tmp_path: Path, where: str) -> None:
    if where == "elsewhere":
        done = mpt(tmp_path / "runs", "list", "mine", "--runs-dir", str(tmp_path / "runs"))
    else:
        done = mpt(tmp_path, "list", str(run.path) if where == "absolute" else where)
    assert done.returncode == 0
    assert "checkpoint-15" in done.stdout


def test_verify_reads_every_byte_and_lists_the_damaged(run: RunDirectory, tmp_path: Path) -> None:
    flip_a_bit(run.checkpoints / "checkpoint-10" / "model.safetensors")
    done = mpt(tmp_path, "verify", "mine")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "checkpoint-5: verified",
        "checkpoint-10: model.safetensors is not what was saved: its hash differs",
        "checkpoint-15: verified",
        "checkpoint-20: model.safetensors has 0 bytes, and manifest.json says 7000",
    ]
    verdict = answer(tmp_path, "verify", "mine")
    assert verdict["usable"] == "checkpoint-15"
    assert verdict["verified"] == ["checkpoint-5", "checkpoint-15"]
    assert [entry["name"] for entry in verdict["damaged"]] == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_ends_with_84_where_none_is_usable(run: RunDirectory, tmp_path: Path, options: tuple[str, ...]) -> None:
    for path in run.checkpoints.glob("checkpoint-*"):
        flip_a_bit(path / "manifest.json")
    done = mpt(tmp_path, "verify", "mine", *options)
    assert done.returncode == 84
    assert "error: no checkpoint in runs/mine/checkpoints can be used" in done.stderr
    assert "--resume never" in done.stderr
    if options:
        assert json.loads(done.stdout)["usable"] is None


def test_a_manifest_that_was_edited_and_one_of_a_newer_mpt_are_named(run: RunDirectory, tmp_path: Path) -> None:
    edited, newer = (run.checkpoints / f"checkpoint-{step}" / "manifest.json" for step in (10, 15))
    edited.write_text(edited.read_text().replace('"step": 10', '"step": 11'))
    manifest = json.loads(newer.read_text()) | {"version": 3}
    newer.write_text(json.dumps(manifest | {"digest": digest(manifest)}))
    done = mpt(tmp_path, "verify", "mine")
    assert done.returncode == 0
    assert "checkpoint-10: manifest.json was edited or damaged" in done.stdout
    assert "checkpoint-15/manifest.json was written by a newer mpt" in done.stdout


def test_a_dry_run_says_what_pruning_then_does(run: RunDirectory, tmp_path: Path) -> None:
    save(run, 25, best=5)
    before = names(run)
    journal = run.journal.read_bytes()
    dry = mpt(tmp_path, "prune", "mine", "--keep", "1", "--dry-run")
    assert dry.stdout.splitlines() == ["would delete checkpoint-15", "would delete checkpoint-20"]
    assert (names(run), run.journal.read_bytes()) == (before, journal)
    done = mpt(tmp_path, "prune", "mine", "--keep", "1")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["deleted checkpoint-15", "deleted checkpoint-20"]
    assert names(run) == ["checkpoint-10", "checkpoint-25", "checkpoint-5", "quarantine-1", "quarantine-2"]
    assert read_events(run.journal)[-1]["names"] == ["checkpoint-15", "checkpoint-20"]
    again = mpt(tmp_path, "prune", "mine", "--keep", "1", "--json")
    assert json.loads(again.stdout) == {"run": "runs/mine", "dry_run": False, "deleted": []}


def test_pruning_finishes_a_move_into_quarantine_that_a_kill_cut_short(run: RunDirectory, tmp_path: Path) -> None:
    given_up = ["checkpoint-15", "checkpoint-20"]
    Journal(run.journal, 1).append("checkpoints_quarantined", names=given_up, lineage=3, step=10, reason="it rose")
    listed = {row["name"]: row["state"] for row in answer(tmp_path, "list", "mine")["checkpoints"]}
    assert [listed[name] for name in given_up] == ["quarantined", "quarantined"]
    dry = answer(tmp_path, "prune", "mine", "--keep", "2", "--dry-run")
    assert dry["deleted"] == answer(tmp_path, "prune", "mine", "--keep", "2")["deleted"] == ["quarantine-1"]
    assert names(run) == ["checkpoint-10", "checkpoint-5", "quarantine-2", "quarantine-3"]


def test_pruning_never_deletes_the_last_that_verifies(run: RunDirectory, tmp_path: Path) -> None:
    for step in (10, 15):
        flip_a_bit(run.checkpoints / f"checkpoint-{step}" / "model.safetensors")
    assert answer(tmp_path, "prune", "mine", "--keep", "1")["deleted"] == []
    flip_a_bit(run.checkpoints / "checkpoint-5" / "model.safetensors")
    assert answer(tmp_path, "prune", "mine", "--keep", "1")["deleted"] == []


def test_a_live_run_is_not_pruned(run: RunDirectory, tmp_path: Path) -> None:
    before = names(run)
    with locked(run.lock):
        done = mpt(tmp_path, "prune", "mine", "--keep", "1")
        assert mpt(tmp_path, "list", "mine").returncode == 0
    assert done.returncode == 85
    assert f"process {os.getpid()}" in done.stderr
    assert names(run) == before


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("nowhere", "there is no run 'nowhere'", "In runs: mine."),
        ("empty", "empty is no run: it holds no journal.jsonl", "In runs: mine."),
        ("runs/mine/checkpoints", "is no run", "Give a run's directory"),
        ("", "there is no run ''", "Give a run's directory"),
        ("a" * 300, "File name too long", "Give a run's directory"),
    ],
)
def test_what_is_no_run_is_said_with_those_that_are(
    run: RunDirectory, tmp_path: Path, command: str, name: str, problem: str, remedy: str
) -> None:
    tmp_path.joinpath("empty").mkdir()
    done = mpt(tmp_path, command, name, *(["--keep", "1"] if command == "prune" else []))
    assert done.returncode == (83 if len(name) > 250 else 2)
    assert problem in done.stderr
    assert remedy in done.stderr


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_journal_cut_in_the_middle_is_named_with_its_line(run: RunDirectory, tmp_path: Path, command: str) -> None:
    lines = run.journal.read_bytes().splitlines(keepends=True)
    run.journal.write_bytes(b"".join([*lines[:2], lines[2][30:], *lines[3:]]))
    before = names(run)
    done = mpt(tmp_path, command, "mine", *(["--keep", "1"] if command == "prune" else []))
    assert done.returncode == 83
    assert "journal.jsonl:3: this line is no event of a run" in done.stderr
    assert "Restore the file" in done.stderr
    assert names(run) == before


def test_a_run_without_checkpoints_is_no_error(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "young")
    run.path.mkdir(parents=True)
    Journal(run.journal, 0).append("run_created", recipe="young")
    for command in (["list"], ["verify"], ["prune", "--keep", "1"]):
        done = mpt(tmp_path, command[0], "young", *command[1:])
        assert done.returncode == 0
        assert done.stdout == ""
    assert answer(tmp_path, "list", "young")["checkpoints"] == []
    assert answer(tmp_path, "verify", "young")["usable"] is None


@pytest.mark.parametrize("keep", ["0", "-1", "x"])
def test_keeping_none_is_refused(run: RunDirectory, tmp_path: Path, keep: str) -> None:
    before = names(run)
    assert mpt(tmp_path, "prune", "mine", "--keep", keep).returncode == 2
    assert names(run) == before
