"""`mpt doctor` explains runs that were really made, by the small worker under the real supervisor."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpt.reporting.diagnosis import diagnose, to_text
from mpt.reporting.evidence import gather
from mpt.running.journal import Journal
from tests.running.small_runs import SmallRun, kill_all, wait, wait_until

MakeRun = Callable[..., SmallRun]
RATE = 5e-5  # transformers' default


def mpt(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `mpt doctor`; no answer of it is ever a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "doctor", *arguments],
        cwd=folder, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Make a runs folder for a small worker with wishes; none of its processes is left."""
    made: list[SmallRun] = []

    def make(**wishes: Any) -> SmallRun:
        made.append(SmallRun(tmp_path, wishes))
        return made[-1]

    yield make
    for run in made:
        kill_all(run)


def text(run: SmallRun) -> str:
    """What the command prints, without the second that a process takes to start."""
    return to_text(diagnose(gather(run.directory)))


def answer(run: SmallRun) -> dict[str, Any]:
    """What it prints with `--json`."""
    return diagnose(gather(run.directory)).to_json()


def advised(told: dict[str, Any]) -> dict[str, Any]:
    """Every key that the findings would write."""
    return {key: value for finding in told["findings"] for key, value in finding["recipe"].items()}


def test_a_run_that_nothing_befell_is_said_to_be_well_in_one_line(make_run: MakeRun) -> None:
    run = make_run(promotes=True)
    assert run.train().code == 0
    said = text(run)
    assert said.startswith(f"{run.directory.path}: finished, 20 of 20 steps, loss 1.0000\n")
    assert "nothing is wrong: 1 attempt, no bad number, no damaged checkpoint" in said
    assert "1  from the beginning  steps 1-20" in said
    assert "newest checkpoint-20, newest known to be good: checkpoint-15; 4 in all" in said
    assert "what to change" not in said
    assert "how to go on" not in said
    told = answer(run)
    assert (told["outcome"], told["step"], told["findings"], told["go_on"]) == ("finished", 20, [], None)


def test_a_rate_that_was_lowered_until_the_numbers_stayed_good_goes_into_the_recipe(make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 12, "do": "diverge"}], calm_rate=RATE / 2, promotes=True)
    assert run.train("recovery={margin: 1}").code == 0
    said = text(run)
    assert "N2 at step 12: loss is nan, for 3 steps in a row" in said
    assert "N2  the loss was not finite: twice (step 12, attempts 1, 2); attempt ended twice" in said
    assert "after attempt 1: back to checkpoint-5; checkpoint-10 given up, to quarantine-1" in said
    assert "after attempt 2: learning_rate 5e-05 -> 2.5e-05" in said
    assert "later step 6 was made, the first after it" in said
    assert "     training.learning_rate: 2.5e-05" in said
    assert advised(answer(run)) == {"training.learning_rate": RATE / 2}


def test_a_micro_batch_that_was_halved_goes_into_the_recipe_with_the_global_batch(make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 8, "do": "need_memory"}])
    assert run.train("micro_batch_size=4").code == 0
    told = answer(run)
    assert advised(told) == {"micro_batch_size": 2, "global_batch_size": 4}
    assert [attempt["ending"] for attempt in told["attempts"]] == ["failed", "finished"]
    assert "out of memory: 4" in told["attempts"][0]["told"]


def test_a_run_that_no_rung_helped_is_told_with_what_was_tried(make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 12, "do": "diverge"}])
    assert run.train("recovery={margin: 1}").code == 81
    said = text(run)
    assert "exit code 81: loss is nan" in said
    assert re.search(r"\(attempt 4, (fp32|bf16), learning rate 1.25e-05\)", said)
    assert "it came at the same place each time" in said
    assert "--resume never" in said
    keys = advised(answer(run))
    assert keys["training.learning_rate"] == RATE / 8
    assert keys["training.warmup_steps"] > 0


@pytest.mark.parametrize("do", ["kill", "exit", "raise"])
def test_a_worker_that_died_once_is_told_with_the_time_to_the_next_step(do: str, make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 8, "attempt": 1, "do": do}])
    assert run.train().code == 0
    said = text(run)
    words = {"kill": "was killed (SIGKILL)", "exit": "died without a last word (exit status 17)", "raise": "ValueError"}
    assert words[do] in said
    assert "once the worker died before its work was done, and the run went on from a checkpoint" in said
    assert "2 steps made again" in said
    assert ("dmesg" in said) == (do == "kill")
    assert ("attempts/001/worker.log" in said) == (do != "kill")


def test_attempts_that_die_before_they_save_are_told_to_save_nearer(make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 5, "do": "exit"}], save_steps=10)
    assert run.train("backoff=0", "max_attempts_without_progress=2").code == 82
    told = answer(run)
    assert advised(told) == {"training.save_strategy": "steps", "training.save_steps": 2}
    assert any("the last thing it said" in line for line in told["findings"][0]["evidence"])
    assert "begins again: nothing was saved" in told["goes_on"]


def test_a_hang_names_the_stacks_and_the_limit_of_its_phase(make_run: MakeRun) -> None:
    run = make_run(faults=[{"step": 8, "attempt": 1, "do": "sleep"}])
    assert run.train("step_timeout=1", "first_step_timeout=20").code == 0
    told = answer(run)
    assert advised(told) == {"restart.step_timeout": 2}
    finding = told["findings"][0]
    assert finding["problem"] == "once a rank hung while training"
    path = next(word for word in finding["remedy"].split() if "stacks-0.txt" in word).rstrip(":")
    assert Path(path).read_text()
    assert told["attempts"][0]["told"].startswith("hung while training at step 8: silent for 1 s")


@pytest.mark.parametrize(
    ("code", "recipe", "said"),
    [
        (83, {"training.save_total_limit": 1}, "checkpoints take"),
        (86, None, "memory: a problem 86"),
        (3, {}, "Mend it."),
        (2, {}, "Mend it."),
    ],
)
def test_an_end_that_another_try_would_repeat_is_told(
    code: int, recipe: dict[str, Any] | None, said: str, make_run: MakeRun
) -> None:  # fmt: skip
    run = make_run(faults=[{"step": 18, "do": str(code)}])
    assert run.train().code == code
    told = answer(run)
    assert len(told["findings"]) == 1
    assert recipe is None or advised(told) == recipe
    assert said in text(run)
    assert f"a problem {code}" in text(run)
    assert told["goes_on"] == "goes on from checkpoint-15"


def test_a_run_that_is_at_work_can_be_asked_about_and_goes_on_undisturbed(make_run: MakeRun) -> None:
    run = make_run(step_s=0.01, steps=100_000)
    process = run.start()
    wait_until(lambda: run.steps >= 3)
    asked = mpt(run.runs_dir, "small", "--runs-dir", ".", "--json")
    assert asked.returncode == 0, asked.stderr
    told = json.loads(asked.stdout)
    assert f"process {process.pid}" in told["owner"]
    assert (told["outcome"], told["attempts"][0]["ending"], told["go_on"]) == ("running", "running", None)
    assert told["step"] >= 3
    process.terminate()
    assert wait(process).code == 80
    assert answer(run)["owner"] is None


def test_a_run_whose_supervisor_was_killed_says_the_command_that_goes_on(make_run: MakeRun) -> None:
    run = make_run(step_s=0.05)
    process = run.start()
    wait_until(lambda: run.steps >= 7)
    process.kill()
    wait(process)
    told = answer(run)
    assert (told["outcome"], told["attempts"][0]["ending"]) == ("interrupted", "cut off")
    assert told["go_on"].split()[:3] == ["mpt", "train", str(run.directory.recipe)]
    assert told["go_on"].endswith(f"--name small --runs-dir {run.runs_dir}")
    assert told["goes_on"].startswith("goes on from checkpoint-")


def test_a_run_that_was_stopped_says_so(make_run: MakeRun) -> None:
    run = make_run(step_s=0.05)
    process = run.start()
    wait_until(lambda: run.steps >= 7)
    process.terminate()
    assert wait(process).code == 80
    said = text(run)
    assert "exit code 80: at step" in said
    assert "as asked, saved as checkpoint-" in said
    assert f"mpt train {run.directory.recipe} --name small --runs-dir {run.runs_dir}" in said


def test_damaged_checkpoints_are_named_and_without_a_sound_one_how_to_begin_anew(make_run: MakeRun) -> None:
    run = make_run()
    assert run.train().code == 0
    folders = sorted(run.directory.checkpoints.glob("checkpoint-*"))
    folders[-1].joinpath("state").write_bytes(b"")
    assert f"{folders[-1].name}: state has 0 bytes" in text(run)
    assert "a checkpoint is damaged" in text(run)
    for folder in folders:
        folder.joinpath("state").write_bytes(b"")
    said = text(run)
    assert "none can be used (exit code 84)" in said
    assert "--resume never" in said


def test_the_causes_of_incidents_are_told_where_there_are_some(make_run: MakeRun) -> None:
    run = make_run()
    assert run.train().code == 0
    assert "\n\nincidents\n" not in text(run)
    for number, content in (("0001", '{"code": "N2", "cause": "fp16 overflow in mlp\\u001b[31m"}'), ("0002", "{torn")):
        folder = run.directory.path / "incidents" / number
        folder.mkdir(parents=True)
        folder.joinpath("autopsy.json").write_text(content)
    said = text(run)
    assert "0001: fp16 overflow in mlp" in said
    assert "\x1b" not in said
    assert "0002: its autopsy.json can't be read" in said


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run to be copied and damaged."""
    run = SmallRun(tmp_path_factory.mktemp("done"))
    assert run.train().code == 0
    return run


def test_it_finds_a_run_by_its_name_and_by_its_directory(done: SmallRun) -> None:
    by_name = mpt(done.runs_dir, "small", "--runs-dir", ".")
    assert by_name.returncode == 0
    assert by_name.stdout.startswith("small: finished, 20 of 20 steps, loss 1.0000\n")
    assert json.loads(mpt(done.runs_dir, str(done.directory.path), "--json").stdout) == answer(done)


def test_what_is_no_run_is_said_with_those_that_are(done: SmallRun) -> None:
    asked = mpt(done.runs_dir, "nowhere", "--runs-dir", ".")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "there is no run 'nowhere'" in asked.stderr
    assert "In .: small." in asked.stderr


def test_it_changes_nothing(done: SmallRun) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in done.directory.path.rglob("*")}

    before = state()
    assert mpt(done.runs_dir, "small", "--runs-dir", ".").returncode == 0
    assert state() == before


@pytest.mark.parametrize(
    ("name", "was", "now", "said"),
    [
        ("journal.jsonl", '"kind": "phase"', '"kind": "pha', "journal.jsonl:3: this line is no event of a run"),
        ("attempts/001/plan.json", '"version": 3', '"version": 4', "the plan has version 4"),
        ("attempts/001/plan.json", "{", "", "plan.json is no plan of this mpt"),
        ("attempts/001/plan.json", '"recipe"', '"recipes"', "plan.json is no plan of this mpt (KeyError"),
        ("attempts/001/plan.json", '"micro_batch_size": 1,', '"micro_batch_size": -1,', "ValidationError"),
    ],
)
def test_a_damaged_run_is_one_message(
    done: SmallRun, tmp_path: Path, name: str, was: str, now: str, said: str
) -> None:  # fmt: skip
    shutil.copytree(done.directory.path, tmp_path / "mine")
    file = tmp_path / "mine" / name
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, now, 1))
    asked = mpt(tmp_path, "mine")
    assert (asked.returncode, asked.stdout) == (83, "")
    assert said in asked.stderr
    assert len(asked.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "plan_changed", "reason": "x"},
        {"kind": "health", "code": "N2", "step": "twelve"},
        {"kind": "hang", "phase": "training"},
        {"kind": "recovered"},
    ],
)
def test_an_event_that_another_hand_wrote_is_one_message(
    event: dict[str, Any], done: SmallRun, tmp_path: Path
) -> None:  # fmt: skip
    shutil.copytree(done.directory.path, tmp_path / "mine")
    Journal(tmp_path / "mine" / "journal.jsonl", 1).append(**event)
    asked = mpt(tmp_path, "mine")
    assert (asked.returncode, asked.stdout) == (83, "")
    assert f"a {event['kind']} event" in asked.stderr


def test_metrics_that_a_kill_tore_count_as_far_as_they_go(done: SmallRun, tmp_path: Path) -> None:
    shutil.copytree(done.directory.path, tmp_path / "mine")
    metrics = tmp_path / "mine" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20] + b'\n{"loss": 1}\n[]\n')
    asked = mpt(tmp_path, "mine")
    assert asked.returncode == 0
    assert "steps 1-19" in asked.stdout
