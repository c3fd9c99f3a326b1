"""What `mpt train` leaves and shows: the documented directory, rows and lines, and one error for what is wrong."""

import json
import os
import pty
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from mpt.running import checkpoints
from mpt.running.lock import locked
from tests.cli.real_runs import MPT, Folder, environment

Done = subprocess.CompletedProcess[str]
SUMMARY = {"outcome", "run_dir", "steps", "train_loss", "eval_loss", "attempts", "incidents"}
ROW = {
    "step", "attempt", "loss", "grad_norm", "learning_rate", "loss_scale", "skipped", "tokens", "tokens_per_second",
    "step_time_s", "cpu_time_s", "memory_gib",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "folder")
    made.write()
    return made


# --- a run that goes well


@pytest.mark.slow
def test_json_has_every_documented_key(trained: tuple[Folder, Done]) -> None:
    summary = json.loads(trained[1].stdout)
    assert summary.keys() >= SUMMARY
    losses = [row["loss"] for row in trained[0].rows if "loss" in row]
    assert summary["train_loss"] == pytest.approx(sum(losses) / 6)
    assert 0 < summary["eval_loss"] < 6  # ln 300 = 5.7: every token equally likely


@pytest.mark.slow
def test_the_run_directory_is_as_documented(trained: tuple[Folder, Done]) -> None:
    run = trained[0].run
    assert {path.name for path in run.path.iterdir()} == {
        "recipe.yaml", "machine.json", "journal.jsonl", "metrics.jsonl", "lock", "attempts", "checkpoints", "tokenizer",
        "final",
    }  # fmt: skip
    attempt = {path.name for path in run.attempt(1).path.iterdir()}
    assert attempt == {"plan.json", "command.txt", "worker.log", "audit.json", "heartbeat-0"}
    assert [step for step, path in checkpoints.list_checkpoints(run) if checkpoints.verify(path) is None] == [3, 6]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in run.final.iterdir()}
    assert not [path for path in run.path.rglob("*") if path.name.startswith((".", "final.staging"))]


@pytest.mark.slow
def test_every_metrics_row_has_the_documented_keys(trained: tuple[Folder, Done]) -> None:
    rows = trained[0].rows
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == ROW for row in steps)
    assert {row["step"] for row in rows if "eval_loss" in row} == {3, 6}


@pytest.mark.slow
def test_without_a_terminal_there_are_lines_without_control_characters(trained: tuple[Folder, Done]) -> None:
    text = trained[1].stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    for said in ("precision     fp32 (asked)", "step 1/6  loss ", "saved checkpoint-3"):
        assert said in text


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(trained: tuple[Folder, Done]) -> None:
    folder = trained[0]
    before = {path: path.read_bytes() for path in folder.run.path.rglob("*") if path.is_file()}
    assert folder.train("tiny.yaml").returncode == 0
    after = {path: path.read_bytes() for path in folder.run.path.rglob("*") if path.is_file()}
    del before[folder.run.lock], after[folder.run.lock]
    assert after == before


@pytest.mark.slow
def test_the_command_of_an_attempt_can_be_pasted(trained: tuple[Folder, Done], tmp_path: Path) -> None:
    """In the folder where mpt was started, it is the worker by itself: it does the attempt again."""
    folder = Folder(tmp_path / "copy")
    shutil.copytree(trained[0].path, folder.path)
    for path in (folder.run.checkpoints, folder.run.final):
        shutil.rmtree(path)
    command = folder.run.attempt(1).command.read_text()
    done = subprocess.run(["bash", "-c", command], cwd=folder.path, env=environment(), check=False, timeout=400)
    assert done.returncode == 0
    weights = [where.run.final.joinpath("model.safetensors").read_bytes() for where in (folder, trained[0])]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_on_a_terminal_of_80_columns_no_line_of_progress_wraps(folder: Folder) -> None:
    leader, follower = pty.openpty()
    ioctl(follower, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*MPT, "train", "tiny.yaml", "training.max_steps=40"],
        stdin=follower, stdout=follower, stderr=follower, cwd=folder.path, env={**environment(), "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the terminal's last user is gone
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    progress = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if "━" in line]
    assert progress
    assert max(len(line.rstrip()) for line in progress) <= 80
    assert any("training" in line and "/40" in line for line in progress)
    assert "\x1b[?25h" in text  # the cursor is back


# --- what is refused before a worker starts


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.yaml"], 2, "none.yaml: there is no such file"),
        (["tiny.yaml", "data={source: reference.txt, split: train}"], 2, "only a hub data set has that"),
        (["tiny.yaml", "global_batch_size=7"], 2, "no multiple of micro_batch_size 2 x gradient_accumulation_steps 2"),
        (["tiny.yaml", "training.per_device_train_batch_size=3"], 2, "micro_batch_size is 2 and training.per_device"),
        (["tiny.yaml", "training.fp16=true"], 2, "write `precision: fp16`"),
        (["tiny.yaml", "data.sequence_length=64"], 2, "the model has 32 positions"),
        (["tiny.yaml", "tokenizer=null", "model={name_or_path: an/empty/dir}"], 2, "an/empty/dir"),
        (["tiny.yaml", "data.source=missing.txt"], 2, "missing.txt does not exist"),
        (["tiny.yaml", "task=sft"], 2, "reference.txt is plain text, and sft learns from conversations"),
        (["tiny.yaml", "precision=tf32"], 3, "can't compute tf32"),
        (["tiny.yaml", "precision=fp8"], 3, "would only emulate fp8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_wish_is_one_error_with_a_remedy_and_leaves_nothing(
    folder: Folder, arguments: list[str], code: int, says: str
) -> None:
    folder.path.joinpath("an/empty/dir").mkdir(parents=True)
    before = set(folder.path.rglob("*"))
    done = folder.train(*arguments)
    check_refusal(done, code, says)
    assert set(folder.path.rglob("*")) == before


def check_refusal(done: Done, code: int, says: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    (error,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert says in "\n".join(lines[error:])
    assert lines[-1].startswith("  ")
    assert lines[-1].endswith(".")  # the remedy is a sentence


def test_a_locked_run_is_refused_with_its_owner(folder: Folder) -> None:
    folder.run.path.mkdir(parents=True)
    with locked(folder.run.lock):
        check_refusal(folder.train("tiny.yaml"), 85, f"process {os.getpid()} on ")
    assert folder.files == {"runs/tiny", "runs/tiny/lock"}


@pytest.fixture
def full_disk(folder: Folder) -> Iterator[Path]:
    disk = folder.path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this environment may not mount: {done.stderr.decode().strip()}")
    with disk.joinpath("filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_refused_before_a_worker_starts(folder: Folder, full_disk: Path) -> None:
    check_refusal(folder.train("tiny.yaml", "--runs-dir", "disk"), 83, "No space left on device")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


# --- what the worker finds


@pytest.mark.slow
def test_bad_data_is_one_error_and_the_mended_recipe_trains_in_the_same_place(folder: Folder) -> None:
    folder.path.joinpath("empty.txt").write_text(" \n\n")
    folder.path.joinpath("rows.jsonl").write_text('{"body": "no text column here"}\n')
    for source, says in (("empty.txt", "empty"), ("rows.jsonl", "text")):
        done = folder.train("tiny.yaml", f"data.source={source}")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
        assert says in done.stderr.partition("error: ")[2]
        assert done.stderr.splitlines()[-1] == f"  The full log is {newest_log(folder)}"
        assert not folder.run.final.exists()
        assert checkpoints.list_checkpoints(folder.run) == []
    mended = folder.train("tiny.yaml", "--json")
    assert mended.returncode == 0, mended.stderr
    assert json.loads(mended.stdout)["outcome"] == "finished"


def newest_log(folder: Folder) -> Path:
    return folder.run.attempt(folder.run.attempt_numbers()[-1]).log.relative_to(folder.path)
