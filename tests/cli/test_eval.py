"""`mpt eval` on a finished run of the command line."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from tests.cli.real_runs import MPT, Folder, environment

pytestmark = pytest.mark.slow
Trained = tuple[Folder, "subprocess.CompletedProcess[str]"]


def evaluate(folder: Folder, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*MPT, "eval", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder.path, env=environment(), timeout=400, check=False
    )


def test_a_run_is_evaluated_as_it_evaluated_itself(trained: Trained) -> None:
    folder, done = trained
    files = folder.files
    found = evaluate(folder, "tiny", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["loss"] == pytest.approx(json.loads(done.stdout)["eval_loss"], abs=1e-6)
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    assert (told["model"], told["precision"]) == ("runs/tiny/final", "fp32")
    assert told["data"] == "held out of reference.txt (5%)" and told["samples"] > 10
    assert folder.files == files


def test_a_checkpoint_on_other_data_as_a_table(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, of which no word was learnt. " * 20)
    found = evaluate(folder, "tiny", "--checkpoint", "3", "--data", str(other))
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert lines[0] == ["runs/tiny/checkpoints/checkpoint-3,", "fp32"]
    assert [line[0] for line in lines[1:]] == ["data", "loss", "perplexity", "samples"]
    assert float(lines[2][1]) > 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "there is no run 'nothing', and no model either"),
        (["tiny", "--checkpoint", "5"], "There: checkpoint-3, checkpoint-6."),
        (["tiny", "data.eval_fraction=0"], "Name what to evaluate on: --data FILE"),
        (["tiny", "--data", "missing.txt"], "missing.txt"),
        (["tiny", "data.sequence_lenght=8"], "sequence_length"),
        (["tiny", "a.yaml", "b.yaml"], "2 recipes are named"),
        (["owner/model"], "Name the recipe behind it"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(trained: Trained, arguments: list[str], says: str) -> None:
    found = evaluate(trained[0], *arguments)
    assert (found.returncode, found.stdout) == (2, ""), found.stderr
    assert says in found.stderr and "Traceback" not in found.stderr


def test_a_tokenizer_of_another_model_is_said(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    broken = Folder(tmp_path)
    broken.write()
    model = tmp_path / "model"
    model.mkdir()
    for file in folder.run.final.iterdir():
        model.joinpath(file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads(model.joinpath("tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"unknown-{n}": len(vocabulary) + n for n in range(8)}
    model.joinpath("tokenizer.json").write_text(json.dumps(tokenizer))
    found = evaluate(broken, "model", "tiny.yaml")
    assert found.returncode == 2, found.stderr
    assert "the tokenizer has 308 entries and the model's vocabulary 300" in found.stderr
    assert "Traceback" not in found.stderr
