"""A task of the user's own, named by its dotted path."""

import json
import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mpt.errors import MptError
from mpt.training.tasks import evaluation_of, task_module
from tests.cli.real_runs import MPT, environment
from tests.training.tiny_runs import Run

README = Path(__file__).parents[2] / "README.md"
MakeRun = Callable[..., Run]


def example() -> str:
    """The task that the README shows."""
    section = README.read_text(encoding="utf-8").partition("### A task of your own")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def write(folder: Path, text: str) -> Path:
    file = folder / "my_tasks" / f"{folder.name}.py"  # modules stay imported: each test has its own
    file.parent.mkdir(parents=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file


@pytest.mark.slow
def test_the_task_that_the_readme_shows_trains_from_the_recipes_folder(new_run: MakeRun, tmp_path: Path) -> None:
    write(tmp_path, example())
    run = new_run(task=f"my_tasks.{tmp_path.name}", training={"eval_strategy": "steps", "eval_steps": 8})
    run.task_folder = str(tmp_path)
    assert run.train() == 0, run.log()
    losses = [row["loss"] for row in run.steps.values()]
    assert losses[-1] < losses[0] - 0.3
    assert run.texts("audit", "passed") == [True]
    assert run.last_word()["eval_loss"] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(run.directory.final)
    assert len(tokenizer("eht", add_special_tokens=False)["input_ids"]) == 1  # "the", from behind
    command = [*MPT, "eval", str(run.path), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent, env=environment(), check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["loss"] == pytest.approx(run.last_word()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "there is no module my_tasks."),
        ("import no_such_library", "my_tasks.*:1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("x = 1\ny = (", "my_tasks.*:2: SyntaxError"),
        ("x = 1\ny = x / 0", "my_tasks.*:2: ZeroDivisionError: division by zero"),
        ("def read_documents(plan, *, seed): ...", "has no prepare_data, build_model, build_collator"),
    ],
    ids=["missing", "needs-another", "syntax", "raises", "functions"],
)
def test_what_is_wrong_with_it_is_one_message(text: str | None, problem: str, tmp_path: Path) -> None:
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(MptError, match=problem):
        task_module(f"my_tasks.{tmp_path.name}", str(tmp_path))


def test_what_its_evaluation_may_give_is_said(tmp_path: Path) -> None:
    needed = ("read_documents", "prepare_data", "build_model", "build_collator")
    write(tmp_path, "\n".join(f"def {name}(*given): ..." for name in needed) + "\ndef evaluation(plan): return plan")
    module: Any = task_module(f"my_tasks.{tmp_path.name}", str(tmp_path))
    assert evaluation_of(module, {"compute_metrics": len}) == {"compute_metrics": len}  # type: ignore[arg-type]
    with pytest.raises(MptError, match="gives compute_metric"):
        evaluation_of(module, {"compute_metric": len})  # type: ignore[arg-type]
