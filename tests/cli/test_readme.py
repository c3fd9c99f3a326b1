"""Every command of the README runs, and says what the README says."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.recipe.load import check_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "sequence_length": 64, "global_batch_size": 8}
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
    assert all(command.startswith(("mpt ", "scripts/")) for command in COMMANDS[2:])
    assert len(COMMANDS) > 10


def test_a_command_in_the_prose_is_one_that_is_run_here_or_a_script_that_is_there() -> None:
    """Prose names commands; how one is called, with its options, stands in a block, where it is run."""
    inline = re.findall(r"`((?:mpt|scripts/)[^`\n]*)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    run_here = {tuple(command.split()[:2]) for command in COMMANDS if command.startswith("mpt ")}
    assert len(inline) > 10
    for command in inline:
        if command.startswith("scripts/"):
            assert os.access(ROOT / command, os.X_OK), command
        else:
            assert tuple(command.split()[:2]) in run_here, command
            options = set(re.findall(r"--[a-z-]+", command))
            assert options <= set(re.findall(r"--[a-z-]+", "\n".join(COMMANDS))), command


def test_every_option_that_the_readme_names_exists() -> None:
    """Of mpt's commands, and of its scripts."""
    sources = [*(ROOT / "mpt" / "cli").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    told = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    known = set(re.findall(r"--[a-z][a-z-]+", told)) | {
        f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): Annotated", told, re.MULTILINE)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_every_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    recipes = [text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "model:" in text]
    assert recipes
    for text in recipes:
        tmp_path.joinpath("recipe.yaml").write_text(text, encoding="utf-8")
        assert check_recipe(tmp_path / "recipe.yaml") == []


def test_scripts_test_hands_its_arguments_to_pytest() -> None:
    done = run(["scripts/test", "--version"], ROOT)
    assert done.returncode == 0
    assert "pytest" in done.stdout + done.stderr


def make_small(recipe: Path) -> None:
    """Edit one's own copy: a model and batches whose steps take no time."""
    text = recipe.read_text(encoding="utf-8")
    for key, value in SMALL.items():
        text, count = re.subn(rf"\b{key}: \d+", f"{key}: {value}", text)
        assert count == 1, key
    recipe.write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # trainings and a search: a busy machine needs its time
def test_every_command_of_the_readme_runs_in_the_order_given(tmp_path: Path) -> None:
    for command in COMMANDS[2:]:
        program, *arguments = shlex.split(command)
        if program == "scripts/bench_precision":  # it is run in `test_bench_precision`
            runpy.run_path(str(ROOT / f"{program}.py"))["read_arguments"](arguments)
            continue
        done = run([program, *arguments], ROOT if program.startswith("scripts/") else tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        if arguments[:2] == ["recipes", "copy"]:
            make_small(tmp_path / "mine.yaml")
    compared = tmp_path / "runs" / "gated" / "compare"
    if compared.exists():  # the precision chosen here is not fp32
        assert json.loads((compared / "result.json").read_text(encoding="utf-8"))["passed"] is True
        assert {entry.name for entry in compared.iterdir()} == {"candidate", "reference", "result.json"}


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
    assert "compare/" in names  # of a comparison, which the quickstart does not make
    # The first checkpoint is pruned by now, and nothing went wrong; what an attempt holds is looked at below.
    missing = {"checkpoints/checkpoint-50/", "compare/", "incidents/0001/", "step-rankR.safetensors,", "heartbeat-R:"}
    missing |= {"tensorboard/"}  # no tracker is asked for
    assert [name for name in names if name not in missing and not (path / name).exists()] == []
    for name in ("plan.json", "command.txt", "worker.log", "audit.json", "heartbeat-0"):
        assert (path / "attempts/001" / name).is_file(), name
    # The last two, and the newest that is known to be good.
    kept = ["checkpoint-100", "checkpoint-150", "checkpoint-200"]
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == kept
