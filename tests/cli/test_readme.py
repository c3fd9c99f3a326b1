"""Every command of the README runs, and says what the README says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first command of the README, with its run kept out of the checkout; gives the run and what it printed."""
    runs = tmp_path_factory.mktemp("quickstart")
    done = run(["scripts/quickstart", "--runs-dir", str(runs)], ROOT)
    assert done.returncode == 0, done.stderr
    return runs / "quickstart", done.stderr


def test_the_readme_has_the_commands_that_this_file_knows_how_to_run() -> None:
    assert COMMANDS[:2] == ["scripts/quickstart", "scripts/test"]
    assert all(command.startswith("mpt ") for command in COMMANDS[2:])
    assert len(COMMANDS) > 10


def test_scripts_test_hands_its_arguments_to_pytest() -> None:
    done = run(["scripts/test", "--version"], ROOT)
    assert done.returncode == 0
    assert "pytest" in done.stdout + done.stderr


@pytest.mark.slow
def test_every_mpt_command_of_the_readme_runs_in_the_order_given(tmp_path: Path) -> None:
    for command in COMMANDS[2:]:
        done = run(shlex.split(command), tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_quickstart_learns_explains_itself_and_leaves_a_model_that_transformers_loads(
    quickstart: tuple[Path, str],
) -> None:
    path, said = quickstart
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert sum(losses[-10:]) / 10 < losses[0] - 2
    assert evaluations == sorted(evaluations, reverse=True)
    assert "precision" in said
    assert "The with statement is used to" in said
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path / "final")
    tokenizer = AutoTokenizer.from_pretrained(path / "final")
    inputs = tokenizer("The import statement", return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == model.config.vocab_size == 2048


@pytest.mark.slow
def test_the_run_directory_is_what_the_readme_says(quickstart: tuple[Path, str]) -> None:
    path, _ = quickstart
    listed = re.search(r"runs/<name>/\n(.*?)```", README, re.DOTALL)
    assert listed is not None
    names = [line.split()[0] for line in listed[1].splitlines()]
    for name in names:
        if name != "checkpoints/checkpoint-50/":  # pruned by now; its successors are there
            assert (path / name).exists(), name
    for name in ("plan.json", "command.txt", "worker.log", "audit.json"):
        assert (path / "attempts/001" / name).is_file(), name
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["checkpoint-150", "checkpoint-200"]
