"""`scripts/bench_health` and `scripts/bench_recovery`: what they refuse at once, and that their tables hold what was
measured. No time is asserted."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.real_runs import ROOT, environment

SCRIPTS = {name: str(ROOT / "scripts" / f"{name}.py") for name in ("bench_health", "bench_recovery")}
LOADED = {name: runpy.run_path(path, run_name=name) for name, path in SCRIPTS.items()}
SMALL = ("--rounds", "1", "--hidden", "64", "--batch", "1", "--sequence-length", "32", "--steps", "18")


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("bench_health", ["--only", "step"], "--only: 'step'; there are steps, saves, restarts"),
        ("bench_health", ["--steps", "11"], "--steps 11: it must be at least 12"),
        ("bench_health", ["--hidden", "100"], "--hidden 100: it must be a multiple of 64"),
        ("bench_health", ["--save-hidden", "0"], "--save-hidden 0"),
        ("bench_health", ["--rounds", "0"], "--rounds 0: it must be at least 1"),
        ("bench_recovery", ["--only", "fp8"], "--only: 'fp8'; there are fp16, bf16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_can_not_be_measured_is_refused_at_once(
    script: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        LOADED[script]["read_arguments"](arguments)
    assert refused.value.code == 2
    assert says in capsys.readouterr().err


def tables(script: str, *arguments: str, folder: Path) -> list[list[list[str]]]:
    """Run a script; give the cells of each table, heads and rule left out."""
    command = [sys.executable, SCRIPTS[script], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^CPU .*; 1 thread; torch \d+\.\d+.*; \d{4}-\d\d-\d\d$", done.stdout, re.MULTILINE)
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in done.stdout.split("\n\n")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]] for block in blocks if block]


@pytest.mark.slow
def test_the_watch_and_the_saves_are_measured_in_one_process_each(tmp_path: Path) -> None:
    small = (*SMALL, "--save-hidden", "64", "--save-layers", "1")
    steps, saves = tables("bench_health", "--only", "saves,steps", *small, folder=tmp_path)
    judged, control, monitor, watch = steps
    assert "judged" in judged[0] and "null control" in control[0]
    assert all(re.fullmatch(r"[+-]\d+\.\d\d%", row[1]) for row in (judged, control))
    assert all(float(row[2].partition("%")[0]) > 0 for row in (monitor, watch))
    ways = ["plain", "plain again", "plain, then fsync", "mpt"]
    assert [row[0].partition(" in the background")[0] for row in saves] == [*ways, "mpt"]
    assert saves[0][2] == "1.00"
    assert all(float(row[1]) >= 0 and float(row[4]) > 0 for row in saves)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_is_seen_to_come_back_with_mpt_and_with_torchrun(tmp_path: Path) -> None:
    (restarts,) = tables("bench_health", "--only", "restarts", "--rounds", "1", "--batch", "1", folder=tmp_path)
    assert [row[0] for row in restarts] == ["mpt", "torchrun"]
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in restarts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_an_overflow_in_fp16_leaves_behind_with_mpt_and_with_the_plain_trainer(tmp_path: Path) -> None:
    (rows,) = tables("bench_recovery", "--only", "fp16", folder=tmp_path)
    mpt, plain = rows
    assert (mpt[1], mpt[2], mpt[5]) == ("mpt", "0", "yes")
    began, ended = map(float, mpt[4].split(" -> "))
    assert ended < began
    assert mpt[8] in ("2 of 2", "3 of 3") and mpt[9] in ("bf16", "fp32")
    # The scaler leaves every update out; nobody says so, and the exit code is 0.
    assert (plain[1], plain[2], plain[6], plain[7], plain[9]) == ("plain", "0", "0", "60", "nothing was noticed")
    assert plain[8] == "0 of 2"
