"""`mpt train --compare-to`: the first steps in two precisions before the run, and bounds that keep it from starting."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpt.running.run_directory import RunDirectory
from tests.cli.real_runs import Folder
from tests.running.small_runs import wait_until

pytestmark = pytest.mark.slow
Started = tuple[Folder, subprocess.CompletedProcess[str]]

# A CPU without AVX512-BF16 computes the same numbers, slower.
BF16 = "precision={mode: bf16, allow_emulation: true}"
AGAINST_FP32 = ("tiny.yaml", "--json", BF16, "--compare-to", "fp32", "--compare-steps", "4")
TOO_STRICT = ("--require", "max_loss_gap=1e-12")
FAIR = ("--require", "max_loss_gap=0.02", "--require", "min_gradient_cosine=0.999")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "work")
    made.write()
    return made


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """A run of two processes that a bound kept from starting. Nobody changes it."""
    folder = Folder(tmp_path_factory.mktemp("refused"))
    folder.write(distributed={"strategy": "zero2", "processes_per_node": 2})
    return folder, folder.train(*AGAINST_FP32, *TOO_STRICT)


@pytest.fixture(scope="module")
def trained(refused: Started, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The same run, started again with one process and bounds that hold."""
    folder = Folder(tmp_path_factory.mktemp("trained") / "work")
    shutil.copytree(refused[0].path, folder.path)
    folder.write()
    return folder, folder.train(*AGAINST_FP32, *FAIR)


def result_of(run: RunDirectory) -> dict[str, Any]:
    return dict(json.loads((run.path / "compare" / "result.json").read_text()))


def rows_of(run: RunDirectory, role: str) -> list[dict[str, Any]]:
    lines = (run.path / "compare" / role / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --- a bound that does not hold


def test_a_run_outside_its_bounds_does_not_start(refused: Started) -> None:
    folder, done = refused
    assert done.returncode == 81, done.stderr
    assert not (folder.run.path / "attempts").exists()
    assert not folder.run.final.exists()
    assert folder.listed("run_finished", "exit_code") == [81]
    assert folder.listed("compared", "passed") == [False]


def test_the_refusal_names_the_bound_the_value_and_what_to_do(refused: Started) -> None:
    folder, done = refused
    result = result_of(folder.run)
    gap, step = result["max_loss_gap"], result["max_loss_gap_step"]
    measured = f"the losses of bf16 and fp32 differ by up to {gap:.2g} (step {step})"
    said = f"{measured}, and compare.require.max_loss_gap is 1e-12"
    assert f"error: the run does not start: {said}" in done.stderr
    for remedy in ("precision.layers", "mpt search-precision", "another precision", "compare/result.json"):
        assert remedy in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["steps"], summary["attempts"]) == ("failed", 0, 0)
    assert summary["compare"] == result
    assert (result["passed"], result["breaches"]) == (False, [said])


def test_what_remains_of_a_comparison_is_small(refused: Started) -> None:
    compare = refused[0].run.path / "compare"
    assert {path.name for path in compare.iterdir()} == {"candidate", "reference", "result.json"}
    for role in ("candidate", "reference"):
        assert {path.name for path in (compare / role).iterdir()} == {"attempts", "journal.jsonl", "metrics.jsonl"}
        attempt = {path.name for path in (compare / role / "attempts" / "001").iterdir()}
        assert attempt == {
            "plan.json", "deepspeed.json", "command.txt", "worker.log", "audit.json", "measure.json", "heartbeat-0",
            "heartbeat-1", "done-reading", "done-tokenising",
        }  # fmt: skip


def test_gradients_are_put_together_from_every_process(refused: Started) -> None:
    """Their norm must be the one that the engine reports; a rank's share, or a rank's own gradient, has another."""
    result = result_of(refused[0].run)
    assert 0.999 < result["gradient_cosine"] < 1
    for norm, role in zip(result["gradient"]["norms"], ("candidate", "reference"), strict=True):
        assert norm == pytest.approx(rows_of(refused[0].run, role)[0]["grad_norm"], rel=1e-5)


# --- bounds that hold


def test_bf16_stays_close_to_fp32_and_the_run_trains_to_its_end(trained: Started) -> None:
    folder, done = trained
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["steps"]) == ("finished", 6)
    compared = summary["compare"]
    assert compared["passed"] is True
    assert compared["required"] == {"max_loss_gap": 0.02, "min_gradient_cosine": 0.999}
    # bf16 keeps 8 bits, and a mean over 128 tokens averages the rounding out: 2e-5 here (AMD EPYC, torch 2.13). Equal
    # losses would mean that one precision ran twice.
    assert 0 < compared["max_loss_gap"] < 1e-3
    assert 0.999 < compared["gradient_cosine"] < 1
    assert compared["step_time_ratio"] > 0
    assert folder.listed("compared", "passed") == [False, True]  # it was compared again


def test_the_candidate_makes_the_very_steps_that_the_run_then_makes(trained: Started) -> None:
    """Learning rates too: a schedule over 6 steps, of which 4 are compared."""
    folder, _ = trained
    own = [row for row in folder.rows if "loss" in row][:4]
    for key in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [row[key] for row in rows_of(folder.run, "candidate")] == [row[key] for row in own]
        assert len(rows_of(folder.run, "reference")) == 4
    # The data, and the tokenizer that was trained on it, are the same in all three.
    assert [row["tokens"] for row in rows_of(folder.run, "reference")] == [row["tokens"] for row in own]
    assert rows_of(folder.run, "reference")[0]["loss"] == pytest.approx(own[0]["loss"], rel=1e-3)


def test_the_gradients_compared_are_those_before_clipping(trained: Started) -> None:
    norms = result_of(trained[0].run)["gradient"]["norms"]
    for norm, role in zip(norms, ("candidate", "reference"), strict=True):
        row = rows_of(trained[0].run, role)[0]
        assert row["grad_norm"] > 1  # so that max_grad_norm, 1, did clip it
        assert norm == pytest.approx(row["grad_norm"], rel=1e-5)


def test_the_two_attempts_ran_in_their_precisions_and_were_audited(trained: Started) -> None:
    for role, precision in (("candidate", "bf16"), ("reference", "fp32")):
        attempt = trained[0].run.path / "compare" / role / "attempts" / "001"
        assert json.loads((attempt / "plan.json").read_text())["values"]["precision"]["value"] == precision
        audit = json.loads((attempt / "audit.json").read_text())
        assert audit["passed"]
        found = {check["what"]: check["found"] for check in audit["checks"]}
        assert set(found["matrix multiplications"]) == {precision}


def test_the_table_shows_both_losses_of_each_step(trained: Started) -> None:
    result = result_of(trained[0].run)
    for step, (one, other) in enumerate(
        zip(result["candidate"]["losses"], result["reference"]["losses"], strict=True), start=1
    ):
        assert f"{step:>8}  {one:>10.5f}  {other:>10.5f}" in trained[1].stderr


def test_a_run_that_goes_on_is_not_compared_again(trained: Started, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "work")
    shutil.copytree(trained[0].path, folder.path)
    shutil.rmtree(folder.run.final)  # as if it had been killed while it saved
    before = result_of(folder.run)
    done = folder.train(*AGAINST_FP32, *FAIR)
    assert done.returncode == 0, done.stderr
    assert "going on in runs/tiny from checkpoint-6" in done.stderr
    assert "compared with fp32 before" in done.stderr
    assert len(folder.listed("compared", "passed")) == 2
    assert result_of(folder.run) == before


@pytest.mark.parametrize(
    "asked",
    [(), AGAINST_FP32[3:], (*AGAINST_FP32[3:], *TOO_STRICT), ("--compare-to", "bf16")],
    ids=["left out", "no bound", "another bound", "another reference"],
)
def test_a_finished_run_has_finished_whatever_it_is_to_be_compared_with(
    trained: Started, asked: tuple[str, ...]
) -> None:
    done = trained[0].train("tiny.yaml", "--json", BF16, *asked)
    assert done.returncode == 0, done.stderr
    assert "has finished before" in done.stderr
    assert len(trained[0].listed("compared", "passed")) == 2


# --- loss scaling


def test_fp16_that_overflows_until_it_diverges_has_no_cosine_and_does_not_start(folder: Folder) -> None:
    """The recipe's own block asks. The scale may be halved once, and overflows at both of its values."""
    block = {"to": "fp32", "steps": 3, "require": {"min_gradient_cosine": 0.99}}
    precision = {"mode": "fp16", "allow_emulation": True, "loss_scale": {"initial": 2.0**40, "min": 2.0**39}}
    folder.write(precision=precision, compare=block)
    done = folder.train("tiny.yaml", "--json")
    assert done.returncode == 81, done.stderr
    result = json.loads(done.stdout)["compare"]
    assert (len(result["candidate"]["losses"]), len(result["reference"]["losses"])) == (1, 3)
    assert result["candidate"]["skipped"] == [True]
    reason = "the first step in fp16 overflowed at loss scale 1099511627776"
    assert (result["gradient_cosine"], result["gradient"]["reason"]) == (None, reason)
    assert result["passed"] is False
    assert f"have no cosine, because {reason}, and compare.require.min_gradient_cosine is 0.99" in done.stderr
    assert "fp16 diverged while it was compared: a gradient overflows at the lowest loss scale" in done.stderr
    assert "precision.loss_scale.initial" in done.stderr
    assert not (folder.run.path / "attempts").exists()


# --- refusals before anything runs, and a stop


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--compare-to", "tf32"], 3, "compare.to is tf32, and the same recipe can't be trained in it here"),
        (["--compare-to", "bf17"], 2, "compare.to"),
        (["--compare-steps", "5"], 2, "compare.to"),
        (["--compare-to", "fp32", "--require", "max_loss_gap"], 2, "has no `=`"),
        (["--compare-to", "fp32", "--require", "min_gradient_cosine=2"], 2, "compare.require.min_gradient_cosine"),
        (["--compare-to", "fp32", "--require", "max_gap=0.1"], 2, "max_loss_gap"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_can_not_be_compared_is_refused_and_leaves_nothing(
    folder: Folder, arguments: list[str], code: int, says: str
) -> None:
    done = folder.train("tiny.yaml", BF16, *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert not (folder.path / "runs").exists()


def test_a_dry_run_refuses_the_reference_that_the_run_would_refuse(folder: Folder) -> None:
    done = folder.train("tiny.yaml", BF16, "--compare-to", "tf32", "--dry-run")
    assert done.returncode == 3, done.stderr
    assert "compare.to is tf32, and the same recipe can't be trained in it here" in done.stderr
    assert folder.train("tiny.yaml", BF16, "--compare-to", "fp32", "--dry-run").returncode == 0


def test_ctrl_c_ends_a_comparison_at_once(folder: Folder) -> None:
    endless = ("training={max_steps: 100000}", "--compare-steps", "100000")
    process = folder.start("tiny.yaml", BF16, "--compare-to", "fp32", *endless)
    metrics = folder.run.path / "compare" / "candidate" / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or process.poll() is not None, timeout=300)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped: while it was compared, as asked" in err
    assert not (folder.run.path / "attempts").exists()
    assert not list(folder.run.path.rglob("*.safetensors"))
    assert not list(folder.run.path.rglob("checkpoint-*"))
