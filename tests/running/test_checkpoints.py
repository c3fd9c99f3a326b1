"""A checkpoint is offered only if it is what was saved, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.errors import MptError, NoUsableCheckpointError, StorageError, UnsupportedError
from mpt.running import checkpoints
from mpt.running.journal import Journal, read_events
from mpt.running.lineage import complete_quarantine, current_lineage, pending_quarantine, quarantine_later
from mpt.running.manifest import digest, problem_with, read_manifest, verify
from mpt.running.retention import choose_superfluous, prune, superfluous
from mpt.running.run_directory import RunDirectory

FILES = {"model.safetensors": b"weights" * 1000, "optimizer.pt": b"moments" * 2000, "sub/state.json": b"{}"}


def save(run: RunDirectory, step: int, files: dict[str, bytes] = FILES) -> Path:
    staging = run.checkpoints / f".staging-{step}"
    for name, content in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content)
    final = run.checkpoints / f"checkpoint-{step}"
    checkpoints.commit(staging, final, step=step, world_size=2, lineage=current_lineage(run), health={"finite": True})
    journal_of(run).append("checkpoint_saved", step=step, name=final.name)
    return final


def journal_of(run: RunDirectory) -> Journal:
    return Journal(run.journal, 1)


def left(run: RunDirectory) -> list[int]:
    return [step for step, _ in checkpoints.list_checkpoints(run)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_a_committed_checkpoint_verifies_and_holds_every_file(run: RunDirectory) -> None:
    path = save(run, 5)
    assert verify(path) is None
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["world_size"], set(manifest["files"])) == (5, 2, set(FILES))
    assert (manifest["lineage"], manifest["health"]) == (1, {"finite": True})
    assert manifest["files"]["model.safetensors"]["size"] == 7000
    assert not (run.checkpoints / ".staging-5").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 6 // 10] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "bit_flipped": flip_a_bit,
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.fault(17)
@pytest.mark.fault(18)
@pytest.mark.fault(19)
@pytest.mark.fault(20)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_taken(run: RunDirectory, name: str, damage: str) -> None:
    save(run, 5)
    newest = save(run, 10)
    if name == "manifest.json" and damage == "bit_flipped":
        text = (newest / name).read_text()
        (newest / name).write_text(text.replace('"size": 7000', '"size": 7001'))
    else:
        DAMAGE[damage](newest / name)
    assert verify(newest) is not None
    choice = checkpoints.newest_usable(run)
    assert choice is not None
    assert (choice.step, choice.path.name) == (5, "checkpoint-5")
    assert [passed for passed, _ in choice.passed_over] == ["checkpoint-10"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"step": 5, "files": {}}', '{"step": 5, "files": {"a": 1}}', "nul"])
def test_a_manifest_that_is_none_is_noticed(run: RunDirectory, manifest: str) -> None:
    path = save(run, 5)
    path.joinpath("manifest.json").write_text(manifest)
    assert "manifest" in str(verify(path))


def test_a_checkpoint_under_another_step_s_name_is_refused(run: RunDirectory) -> None:
    shutil.copytree(save(run, 5), run.checkpoints / "checkpoint-50")
    assert "step 5" in str(verify(run.checkpoints / "checkpoint-50"))


@pytest.mark.fault(21)
def test_no_checkpoint_is_none_and_only_bad_ones_are_an_error(run: RunDirectory) -> None:
    assert checkpoints.newest_usable(run) is None
    for step in (5, 10):
        flip_a_bit(save(run, step) / "optimizer.pt")
    with pytest.raises(NoUsableCheckpointError, match=r"checkpoint-10.*checkpoint-5") as error:
        checkpoints.newest_usable(run)
    assert error.value.exit_code == 84


@pytest.mark.fault(30)
def test_the_newest_is_the_highest_step_whatever_the_clock_said(run: RunDirectory) -> None:
    for step in (9, 10, 100):
        os.utime(save(run, step), (10**9 - step * 1000, 10**9 - step * 1000))
    assert checkpoints.newest_usable(run).step == 100  # type: ignore[union-attr]
    assert prune(run, 1) == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.fault(4)
def test_what_is_not_a_finished_checkpoint_is_not_offered(run: RunDirectory) -> None:
    save(run, 5)
    for name in (".staging-9", ".trash-checkpoint-8", "checkpoint-7x", "quarantine-1"):
        (run.checkpoints / name).mkdir()
    run.checkpoints.joinpath("checkpoint-30").write_text("a file")
    assert [step for step, _ in checkpoints.list_checkpoints(run)] == [5]


@pytest.mark.parametrize(
    ("keep", "protect", "stay"),
    [(1, set(), [15]), (2, {"checkpoint-5"}, [5, 10, 15]), (9, set(), [5, 10, 15])],
)
def test_pruning_keeps_the_newest_and_the_protected(
    run: RunDirectory, keep: int, protect: set[str], stay: list[int]
) -> None:
    for step in (5, 10, 15):
        save(run, step)
    prune(run, keep, protect)
    assert left(run) == stay
    assert not list(run.checkpoints.glob(".trash-*"))


def test_saving_a_step_again_replaces_it(run: RunDirectory) -> None:
    save(run, 5)
    path = save(run, 5, {"model.safetensors": b"other"})
    assert verify(path) is None
    assert path.joinpath("model.safetensors").read_bytes() == b"other"
    assert not path.joinpath("optimizer.pt").exists()


def test_going_back_moves_later_checkpoints_out_of_reach(run: RunDirectory) -> None:
    for step in (5, 10, 15):
        save(run, step)
    assert quarantine_later(run, journal_of(run), 5, "the loss rose") == ["checkpoint-10", "checkpoint-15"]
    assert checkpoints.newest_usable(run).step == 5  # type: ignore[union-attr]
    save(run, 10)
    quarantine_later(run, journal_of(run), 5, "it rose again")
    kept = {str(path.relative_to(run.checkpoints)) for path in run.checkpoints.glob("quarantine-*/*")}
    assert kept == {"quarantine-1/checkpoint-10", "quarantine-1/checkpoint-15", "quarantine-2/checkpoint-10"}
    assert [
        (event["names"], event["lineage"], event["step"], event["reason"])
        for event in read_events(run.journal)
        if event["kind"] == "checkpoints_quarantined"
    ] == [(["checkpoint-10", "checkpoint-15"], 1, 5, "the loss rose"), (["checkpoint-10"], 2, 5, "it rose again")]
    assert read_manifest(save(run, 10))["lineage"] == 3


def test_a_checkpoint_can_be_named_by_folder_step_or_path(run: RunDirectory, tmp_path: Path) -> None:
    save(run, 5)
    path = save(run, 10)
    for name in ("checkpoint-10", "10", str(path), f"{path}/"):
        assert checkpoints.named(run, name).step == 10
    elsewhere = tmp_path / "elsewhere" / "checkpoint-10"
    shutil.copytree(path, elsewhere)
    for name in ("checkpoint-11", "1", str(elsewhere), ""):
        with pytest.raises(MptError, match="there is no checkpoint") as error:
            checkpoints.named(run, name)
        assert error.value.exit_code == 2
        assert "checkpoint-5, checkpoint-10" in error.value.remedy
    truncate(path / "optimizer.pt")
    with pytest.raises(NoUsableCheckpointError, match=r"optimizer.pt has 7000 bytes"):
        checkpoints.named(run, "checkpoint-10")


# Kills the process at the n-th call of something that touches the disk's names or its durability.
FUSE = """
import os, signal, sys
from pathlib import Path
from mpt.running import checkpoints, lineage, retention
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
countdown = int(sys.argv[2])
def fuse(function):
    def burning(*arguments, **keywords):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return burning
for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink", "write"):
    setattr(os, name, fuse(getattr(os, name)))
folder = Path(sys.argv[1])
run = RunDirectory(folder.parent)
"""
COMMIT = """
checkpoints.commit(folder / ".staging-10", folder / "checkpoint-10", step=10, world_size=1, lineage=1, health={})
retention.prune(run, 1)
print("whole")
"""
QUARANTINE = """
lineage.quarantine_later(run, Journal(run.journal, 1), 5, "the loss rose")
print("whole")
"""


def at_risk(run: RunDirectory, program: str, moment: int) -> str:
    """Let a program die at the given moment of it; give what it printed."""
    command = [sys.executable, "-c", FUSE + program, str(run.checkpoints), str(moment)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.stdout


@pytest.mark.fault(2)
@pytest.mark.fault(4)
@pytest.mark.parametrize("moment", range(1, 40))
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(run: RunDirectory, moment: int) -> None:
    save(run, 5)
    save(run, 10, {"model.safetensors": b"of an abandoned attempt"})
    staging = run.checkpoints / ".staging-10"
    (staging / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (staging / name).write_bytes(content)
    printed = at_risk(run, COMMIT, moment)
    choice = checkpoints.newest_usable(run)
    assert choice is not None
    assert choice.passed_over == ()  # nothing half-written has a checkpoint's name
    assert choice.step in (5, 10)
    if printed:
        assert choice.step == 10
        assert json.loads((choice.path / "manifest.json").read_text())["files"].keys() == FILES.keys()


@pytest.mark.parametrize("moment", range(1, 11))
def test_a_kill_at_any_moment_of_going_back_is_made_good_at_the_next_start(run: RunDirectory, moment: int) -> None:
    for step in (5, 10, 15):
        save(run, step)
    printed = at_risk(run, QUARANTINE, moment)
    assert bool(printed) == (moment == 10)
    complete_quarantine(run, journal_of(run))
    complete_quarantine(run, journal_of(run))
    if moment == 1:  # it died before it had written what it was about to do
        assert left(run) == [5, 10, 15]
        return
    assert pending_quarantine(read_events(run.journal)) is None
    assert left(run) == [5]
    assert sorted(path.name for path in run.checkpoints.joinpath("quarantine-1").iterdir()) == [
        "checkpoint-10",
        "checkpoint-15",
    ]
    save(run, 10)
    complete_quarantine(run, journal_of(run))
    assert left(run) == [5, 10]  # what the new lineage saves under an old name stays
    assert read_manifest(run.checkpoints / "checkpoint-10")["lineage"] == 2
    assert all(verify(path) is None for path in run.checkpoints.glob("quarantine-1/*"))


# --- the manifest


def rewrite(path: Path, **changes: object) -> None:
    """Edit a manifest; a digest given as "right" is made to fit."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    if manifest.get("digest") == "right":
        manifest["digest"] = digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [{"step": 6}, {"lineage": 7}, {"health": {"finite": False}}, {"extra": 1}, {"digest": "0"}, {"digest": None},
     {"version": 0}, {"version": "2"}, {"version": None}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_somebody_edited_is_named(run: RunDirectory, changes: dict[str, object]) -> None:
    path = save(run, 5)
    rewrite(path, **changes)
    assert "manifest.json was edited or damaged" in str(verify(path))


def test_the_layout_of_a_manifest_s_text_does_not_matter(run: RunDirectory) -> None:
    path = save(run, 5)
    rewrite(path)
    assert verify(path) is None


def test_a_manifest_of_the_first_version_is_read_as_lineage_1(run: RunDirectory) -> None:
    path = save(run, 5)
    rewrite(path, version=1, lineage=None, health=None, time=None, digest=None)
    assert verify(path) is None
    assert (read_manifest(path)["lineage"], read_manifest(path)["time"]) == (1, None)


def test_a_newer_mpt_s_checkpoint_is_not_passed_over_for_an_older_one(run: RunDirectory) -> None:
    save(run, 5)
    rewrite(save(run, 10), version=3, digest="right")
    for choose in (
        lambda: checkpoints.newest_usable(run),
        lambda: checkpoints.named(run, "10"),
        lambda: checkpoints.roll_back_target(run, 20, 1),
    ):
        with pytest.raises(UnsupportedError, match="written by a newer mpt") as error:
            choose()
        assert error.value.exit_code == 3
    assert "newer mpt" in str(problem_with(run.checkpoints / "checkpoint-10"))


def test_sizes_alone_find_what_is_cut_and_not_what_is_flipped(run: RunDirectory) -> None:
    path = save(run, 5)
    flip_a_bit(path / "optimizer.pt")
    assert verify(path, hashes=False) is None
    assert "hash differs" in str(verify(path))
    truncate(path / "optimizer.pt")
    assert "bytes" in str(verify(path, hashes=False))


# --- known good, and where to go back to


def test_a_checkpoint_is_known_good_from_its_promotion_until_it_is_given_up(run: RunDirectory) -> None:
    for step in (5, 10, 15):
        save(run, step)
    assert checkpoints.known_good(run) == ()
    for step in (10, 5):
        checkpoints.promote(journal_of(run), step)
    assert checkpoints.known_good(run) == ("checkpoint-5", "checkpoint-10")
    quarantine_later(run, journal_of(run), 5, "the loss rose")
    assert checkpoints.known_good(run) == ("checkpoint-5",)
    save(run, 10)
    assert checkpoints.known_good(run) == ("checkpoint-5",)
    checkpoints.promote(journal_of(run), 10)
    assert checkpoints.known_good(run) == ("checkpoint-5", "checkpoint-10")
    save(run, 10)
    assert checkpoints.known_good(run) == ("checkpoint-5",)
    shutil.rmtree(run.checkpoints / "checkpoint-5")
    assert checkpoints.known_good(run) == ()


@pytest.mark.parametrize(
    ("good", "onset", "margin", "order"),
    [
        ({100, 200, 300}, 400, 100, [300, 200, 100]),
        ({100, 200, 300}, 399, 100, [200, 100, 300]),
        ({100, 200, 300}, 401, 100, [300, 200, 100, 400]),
        ({200}, 250, 100, [200, 100]),
        ({300}, 300, 0, [200, 100]),
        (set(), 301, 100, [300, 200, 100]),
        ({100, 400}, 500, 1000, [400, 100, 300, 200]),
        ({100}, 100, 0, []),
        ({100}, 0, 100, []),
    ],
)
def test_a_rollback_goes_to_known_good_and_far_enough_then_known_good_then_any(
    good: set[int], onset: int, margin: int, order: list[int]
) -> None:
    assert checkpoints.roll_back_order([100, 200, 300, 400], good, onset, margin) == order


@pytest.mark.parametrize(
    ("damaged", "promoted", "chosen"),
    [
        ((), (5, 10), 5),
        ((5,), (5, 10), 10),
        ((5, 10), (5, 10), 15),
        ((), (), 15),
        ((5, 10, 15), (5, 10), None),
    ],
)
def test_a_rollback_takes_the_first_of_them_that_verifies(
    run: RunDirectory, damaged: tuple[int, ...], promoted: tuple[int, ...], chosen: int | None
) -> None:
    for step in (5, 10, 15, 20):
        save(run, step)
    for step in promoted:
        checkpoints.promote(journal_of(run), step)
    for step in damaged:
        flip_a_bit(run.checkpoints / f"checkpoint-{step}" / "optimizer.pt")
    choice = checkpoints.roll_back_target(run, onset=17, margin=10)
    assert (None if choice is None else choice.step) == chosen
    if choice is not None:
        assert {name for name, _ in choice.passed_over} == {f"checkpoint-{step}" for step in damaged}


# --- retention


@pytest.mark.parametrize(
    ("state", "best"),
    [
        ('{"best_model_checkpoint": "checkpoint-5"}', "checkpoint-5"),
        ('{"best_model_checkpoint": "/moved/away/checkpoint-5"}', "checkpoint-5"),
        ('{"best_model_checkpoint": null}', None),
        ('{"best_model_checkpoint": "checkpoint-7"}', None),
        ("{}", "checkpoint-10"),
        ("[]", "checkpoint-10"),
        ("", "checkpoint-10"),
    ],
)
def test_the_best_is_what_the_newest_readable_state_names(run: RunDirectory, state: str, best: str | None) -> None:
    save(run, 5)
    save(run, 10, {"trainer_state.json": b'{"best_model_checkpoint": "checkpoint-10"}'})
    save(run, 15, {"trainer_state.json": state.encode()})
    assert checkpoints.best_checkpoint([path for _, path in checkpoints.list_checkpoints(run)]) == best


@pytest.mark.parametrize(
    ("usable", "needed", "keep", "go"),
    [
        ("abcd", "", 2, "ab"),
        ("abcd", "a", 2, "b"),
        ("abcd", "", 4, ""),
        ("abcd", "", 9, ""),
        ("abc", "", 1, "ab"),
        ("ab", "", 1, "a"),
        ("ab", "", 2, ""),
        ("ad", "", 2, ""),
        ("bd", "c", 1, "ab"),
        ("", "", 1, ""),
    ],
)
def test_what_may_go_is_older_than_the_kept_ones_that_verify(usable: str, needed: str, keep: int, go: str) -> None:
    assert choose_superfluous("abcd", set(usable), set(needed), keep) == list(go)


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        choose_superfluous(["checkpoint-5"], {"checkpoint-5"}, set(), 0)


def test_pruning_keeps_the_newest_known_good_and_the_best(run: RunDirectory) -> None:
    state = {"trainer_state.json": json.dumps({"best_model_checkpoint": "/elsewhere/checkpoint-5"}).encode()}
    for step in (5, 10, 15, 20, 25):
        save(run, step, FILES | state)
    for step in (10, 15):
        checkpoints.promote(journal_of(run), step)
    assert superfluous(run, 1) == ["checkpoint-10", "checkpoint-20"]
    assert prune(run, 1) == ["checkpoint-10", "checkpoint-20"]
    assert left(run) == [5, 15, 25]
    assert prune(run, 1) == []


def test_a_damaged_checkpoint_does_not_count_as_kept(run: RunDirectory) -> None:
    for step in (5, 10, 15, 20):
        save(run, step)
    truncate(run.checkpoints / "checkpoint-20" / "optimizer.pt")
    flip_a_bit(run.checkpoints / "checkpoint-15" / "optimizer.pt")
    assert superfluous(run, 1, hashes=True) == ["checkpoint-5"]
    assert superfluous(run, 1) == ["checkpoint-5", "checkpoint-10"]


def test_the_two_newest_quarantines_stay_and_one_that_is_needed(run: RunDirectory) -> None:
    for _ in range(11):
        save(run, 5)
        save(run, 10)
        quarantine_later(run, journal_of(run), 5, "again")
    assert prune(run, 2, {"quarantine-3"}) == [f"quarantine-{number}" for number in (1, 2, 4, 5, 6, 7, 8, 9)]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "checkpoint-5", "quarantine-10", "quarantine-11", "quarantine-3",
    ]  # fmt: skip
    assert current_lineage(run) == 12


def test_retention_asks_a_damaged_journal_nothing(run: RunDirectory) -> None:
    for step in (5, 10, 15):
        save(run, step)
    text = run.journal.read_bytes()
    run.journal.write_bytes(b"\x00" * 30 + b"\n" + text)
    with pytest.raises(StorageError, match=r"journal.jsonl:1"):
        prune(run, 1)
    assert left(run) == [5, 10, 15]
