"""`scripts/bench_precision`: what it refuses at once, and that its table holds what was measured."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.hardware.specs import parse_machine
from tests.cli.real_runs import ROOT, environment

SCRIPT = str(ROOT / "scripts" / "bench_precision.py")
LOADED = runpy.run_path(SCRIPT, run_name="bench_precision")
SMALL = ("--hidden", "64", "--layers", "1", "--sequence-length", "64", "--rounds", "1", "--steps", "4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "bf17"], "--only: 'bf17'; there are fp32, fp32 again, bf16, bf16_pure, fp16, fp8"),
        (["--only", ""], "--only: ''"),
        (["--steps", "2"], "--steps 2: the first 2 are left out, so more are needed"),
        (["--hidden", "100"], "--hidden 100: it must be a multiple of 64"),
        (["--hidden", "0"], "--hidden 0"),
        (["--layers", "0"], "--layers 0: it must be at least 1"),
        (["--sequence-length", "1"], "--sequence-length 1: it must be at least 2"),
        (["--rounds", "0"], "--rounds 0: it must be at least 1"),
        (["--threads", "0"], "--threads 0: it must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_can_not_be_measured_is_refused_at_once(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        LOADED["read_arguments"](arguments)
    assert refused.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_has_times_and_numbers_of_each_mode_beside_fp32(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *SMALL, "--only", "fp32 again,bf16"]  # fp32 is measured though it is not named
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    machine, _, head, _, *lines = done.stdout.splitlines()
    cpu = parse_machine("cpu").devices[0]
    assert machine.startswith(f"{parse_machine('cpu').label}, computes natively ")
    assert all(feature.value in machine for feature in cpu.native)
    assert re.search(r"; 1 thread; torch \d+\.\d+", machine)
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    rows = [dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    fp32, again, bf16, limit = rows
    assert [row["precision"].partition(" (")[0] for row in rows[:3]] == ["fp32", "fp32 again", "bf16"]
    for row in rows[:3]:
        assert float(row["s a step"]) > 0 and float(row["peak GiB"]) > 0 and int(row["tokens per CPU-second"]) > 0
    assert fp32["speed-up over fp32"].startswith("1.00 ")
    assert (fp32["loss gap"], fp32["gradient cosine"]) == ("", "")
    assert (again["loss gap"], again["gradient cosine"]) == ("0.0e+00", "1.000000")  # the null control
    assert 0 < float(bf16["loss gap"]) < 1e-2
    assert 0.99 < float(bf16["gradient cosine"]) < 1
    assert limit["precision"].startswith("torch.mm") and float(limit["speed-up over fp32"]) > 0


def test_what_the_audit_is_measured_without_are_its_looks() -> None:
    """A name that is not there would be set all the same, and the audit measured against itself."""
    tree = ast.parse((ROOT / "mpt" / "training" / "audit.py").read_text(encoding="utf-8"))
    (audit,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Audit")
    looks = [
        node.name
        for node in audit.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(name, ast.Name) and name.id == "_timed" for name in node.decorator_list)
    ]
    assert sorted(looks) == sorted(LOADED["LOOKS"])
    assert repr(LOADED["LOOKS"]) in LOADED["WITHOUT_AUDIT"]
