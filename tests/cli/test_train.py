"""`mpt train` as a program: what it refuses and with which code, what it prints, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.real_runs import ROOT, Folder, environment
from tests.running.small_runs import wait_until

HUGE = (
    "model={config: {model_type: llama, hidden_size: 16384, intermediate_size: 65536, num_hidden_layers: 120, "
    "num_attention_heads: 128, max_position_embeddings: 64}}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "work")
    made.write()
    return made


def everything_in(folder: Folder) -> set[str]:
    return {str(path.relative_to(folder.path)) for path in folder.path.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["tiny.yaml", "training.max_step=3"], 2, "max_steps"),
        (["tiny.yaml", "training.max_steps=many"], 2, "training.max_steps"),
        (["tiny.yaml", "no_equals_sign"], 2, "no_equals_sign"),
        (["tiny.yaml", "lora={}"], 2, "lora adapts a trained model"),
        (["tiny.yaml", "distributed.strategy=fsdp2"], 3, "fsdp2"),
        (["tiny.yaml", HUGE], 3, "GiB"),
        (["tiny.yaml", "--machine", "8xH100"], 3, "--dry-run"),
        (["tiny.yaml", "--machine", "nonsense"], 2, "nonsense"),
        (["tiny.yaml", "--name", "../outside"], 2, "no name for a run"),
        (["tiny.yaml", "--name", ""], 2, "no name for a run"),
        (["tiny.yaml", "--resume", "checkpoint-6"], 2, "no run"),
        (["tiny.yaml", "--runs-dir", "reference.txt"], 83, "reference.txt"),
        (["tiny.yaml", "--runs-dir", "reference.txt/runs"], 83, "reference.txt"),
        (["tiny.yaml", "--no-such-option"], 2, "--no-such-option"),
        ([], 2, "recipe"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_what_can_not_be_done_is_refused_with_its_code_and_leaves_nothing(
    folder: Folder, arguments: list[str], code: int, says: str
) -> None:
    before = everything_in(folder)
    done = folder.train(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    "arguments", [["--json", "tiny.yaml", "training.max_steps=7"], ["tiny.yaml", "training.max_steps=7", "--json"]]
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(folder: Folder, arguments: list[str]) -> None:
    before = everything_in(folder)
    done = folder.train("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["values"]["max_steps"]["value"] == 7
    assert everything_in(folder) == before


def test_a_dry_run_plans_for_a_machine_that_is_not_here(folder: Folder) -> None:
    done = folder.train("tiny.yaml", "--dry-run", "--machine", "8xH100", "precision=auto", "--json")
    assert json.loads(done.stdout)["values"]["precision"]["value"] == "bf16"


CORE_ONLY = """
import sys
sys.path[:0] = sys.argv.pop(1).split(":")
from mpt.cli.main import main
main()
"""
CORE = (
    "pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection", "yaml", "typer",
    "click", "shellingham", "annotated_doc", "rich", "markdown_it", "mdurl", "pygments", "pynvml.py", "xxhash",
    "jinja2", "markupsafe",
)  # fmt: skip


def test_without_the_training_packages_the_line_to_install_them_is_given(folder: Folder) -> None:
    """An installation of the command line alone: only what it depends on is importable."""
    core = folder.path / "core"
    core.mkdir()
    installed = Path(pytest.__file__).parents[1]
    for name in CORE:
        if (installed / name).exists():
            (core / name).symlink_to(installed / name)
    command = [sys.executable, "-S", "-c", CORE_ONLY, f"{core}:{ROOT}", "train", "tiny.yaml", "--machine", "cpu"]
    without_path = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder.path, env=without_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "pip install 'mpt[train]'" in done.stderr
    assert not (folder.path / "runs").exists()


@pytest.mark.slow
def test_a_run_prints_one_object_and_says_where_the_model_is(
    trained: "tuple[Folder, subprocess.CompletedProcess[str]]",
) -> None:
    folder, done = trained
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["run_dir"], summary["steps"]) == ("finished", "runs/tiny", 6)
    assert (summary["attempts"], summary["incidents"]) == (1, 0)
    assert 4 < summary["train_loss"] < 7
    assert 4 < summary["eval_loss"] < 7
    assert "the model is in runs/tiny/final" in done.stderr
    assert folder.run.final.joinpath("model.safetensors").exists()
    assert "\nThe " in done.stderr  # the sample
    assert "step 6/6  loss" in done.stderr
    assert max(len(line) for line in done.stderr.splitlines() if line.startswith("step ")) <= 80


@pytest.mark.slow
def test_a_finished_run_says_so(trained: "tuple[Folder, subprocess.CompletedProcess[str]]") -> None:
    folder, done = trained
    again = folder.train("tiny.yaml", "--json")
    assert again.returncode == 0
    assert "has finished before" in again.stderr
    assert json.loads(again.stdout) == json.loads(done.stdout)


@pytest.mark.slow
def test_the_same_recipe_with_other_values_is_refused(
    trained: "tuple[Folder, subprocess.CompletedProcess[str]]",
) -> None:
    refused = trained[0].train("tiny.yaml", "training.learning_rate=2e-3", "--json")
    assert (refused.returncode, json.loads(refused.stdout)["outcome"]) == (2, "refused")
    assert "training.learning_rate: 0.001 -> 0.002" in refused.stderr
    assert "--accept-changes" in refused.stderr


@pytest.mark.slow
@pytest.mark.fault(8)
def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Folder) -> None:
    command = ("tiny.yaml", "--json", "training={max_steps: 300, save_steps: 1000, learning_rate: 1e-3}")
    process = folder.start(*command)
    wait_until(lambda: bool(folder.rows) or process.poll() is not None, timeout=300)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=300)
    assert process.returncode == 80, err
    summary = json.loads(out)
    step = summary["steps"]
    assert summary["outcome"] == "stopped"
    assert f"stopped: at step {step}, as asked; saved as checkpoint-{step}" in err
    assert "The same command goes on from there." in err
    done = folder.train(*command)
    assert (done.returncode, json.loads(done.stdout)["steps"]) == (0, 300), done.stderr
    assert folder.listed("attempt_started", "resume_from") == [None, f"checkpoint-{step}"]
    steps = [row["step"] for row in folder.rows if "loss" in row]
    assert steps == list(range(1, 301))  # none was lost, and none done twice
