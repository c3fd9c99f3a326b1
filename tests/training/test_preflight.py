"""The preflight at the start of real runs: what stops them, what is told once, and what `mpt check` says before."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

from mpt.planning.checks import DataFacts
from mpt.terms import Check
from mpt.training.data_facts import Table
from tests.training.tiny_runs import LLAMA, Run

MakeRun = Callable[..., Run]
TEXTS = [topics[name] for name in sorted(topics)[:40]]


def write(folder: Path, name: str, texts: list[str]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def findings(run: Run) -> dict[str, dict[str, Any]]:
    (told,) = run.texts("preflight", "findings")
    return {finding["code"]: finding for finding in told}


def test_an_error_ends_the_run_with_2_before_the_model_is_built_and_can_be_accepted(
    new_run: MakeRun, tmp_path: Path
) -> None:
    source = write(tmp_path, "train.jsonl", TEXTS)
    data = {"source": source, "eval_source": write(tmp_path, "eval.jsonl", TEXTS[:10]), "packing": False}
    run = new_run(data=data)
    assert run.train() == 2
    word = run.last_word()
    assert word["exit_code"] == 2
    assert "evaluation_overlap: 10 of 10 (100 %) rows" in word["problem"]
    assert "preflight: {ignore: [evaluation_overlap]}" in word["remedy"]
    assert run.texts("phase", "phase") == ["imports", "data"]
    accepting = new_run(data=data, preflight={"ignore": ["evaluation_overlap"]}, training={"max_steps": 1})
    assert accepting.train() == 0, accepting.log()
    assert findings(accepting)["evaluation_overlap"]["accepted"] is True
    assert findings(accepting)["truncated"]["accepted"] is False


def test_findings_are_journalled_once_and_again_only_when_they_change(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run(data={"source": write(tmp_path, "train.jsonl", [*TEXTS, TEXTS[3]])})
    assert run.train() == 0, run.log()
    assert list(findings(run)) == ["duplicate_rows"]
    assert run.train(2, "checkpoint-4") == 0, run.log(2)
    assert len(run.texts("preflight", "findings")) == 1
    run.recipe = run.recipe.model_copy(update={"preflight": run.recipe.preflight.model_copy(
        update={"ignore": [Check.DUPLICATE_ROWS]})})  # fmt: skip
    assert run.train(3, "checkpoint-4") == 0, run.log(3)
    first, last = run.texts("preflight", "findings")
    assert (first[0]["accepted"], last[0]["accepted"]) == (False, True)
    assert len({json.dumps(facts) for facts in run.texts("preflight", "facts")}) == 1


def test_an_attempt_with_batches_of_like_length_has_its_padding_counted_anew(new_run: MakeRun, tmp_path: Path) -> None:
    source = write(tmp_path, "train.jsonl", [text[: 3 * n + 1] for n, text in enumerate(TEXTS)])
    run = new_run(data={"source": source, "packing": False}, training={"max_steps": 1})
    assert run.train() == 0, run.log()
    keys = run.recipe.training.model_copy(update={"train_sampling_strategy": "group_by_length"})
    run.recipe = run.recipe.model_copy(update={"training": keys})
    assert run.train(2) == 0, run.log(2)
    first, last = (facts["padding"] for facts in run.texts("preflight", "facts"))
    assert (first["now"], last["now"]) == (first["none"], first["grouped"])
    assert first["none"] > first["grouped"]


def test_two_ranks_stop_together(new_run: MakeRun, tmp_path: Path) -> None:
    source = write(tmp_path, "train.jsonl", TEXTS)
    run = new_run(data={"source": source, "eval_source": source}, distributed={"processes_per_node": 2})
    assert run.train(processes=2) != 0
    assert run.last_word()["exit_code"] == 2


def test_a_part_held_out_of_a_table_is_not_hashed_again() -> None:
    table = datasets.Dataset.from_dict({"text": TEXTS})
    train, held_out = table.select([0, 2, 5, 7]), table.select([1, 3])
    rows = Table(train)
    assert Table(held_out, rows)._hashes is rows._hashes


def check(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "check", *arguments], cwd=folder, env=os.environ, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose data is spoilt in several ways."""
    write(tmp_path, "train.jsonl", [*TEXTS, "", TEXTS[0]])
    write(tmp_path, "eval.jsonl", TEXTS[:2])
    path = tmp_path / "mine.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"config": LLAMA},
                "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
                "data": {"source": "train.jsonl", "eval_source": "eval.jsonl", "sequence_length": 64, "packing": False},
                "precision": "fp32",
                "training": {"max_steps": 2, "learning_rate": 30},
            }
        ),
        encoding="utf-8",
    )
    return path


def test_check_says_what_train_would_and_leaves_nothing_but_the_cache(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = check(tmp_path, recipe.name, "--json")
    assert done.returncode == 2, done.stderr
    told = json.loads(done.stdout)
    found = {finding["code"]: finding for finding in told["findings"]}
    assert told["ok"] is False
    assert {code: finding["severity"] for code, finding in found.items()} == {
        "evaluation_overlap": "error", "learning_rate": "warning", "truncated": "warning", "empty_rows": "note",
        "duplicate_rows": "note",
    }  # fmt: skip
    assert found["empty_rows"]["evidence"] == ["train.jsonl:41"]
    assert found["truncated"]["recipe"] == {}  # the model has no more than 64 positions
    assert DataFacts.from_json(told["data"]).samples == 41
    assert sorted(tmp_path.iterdir()) == before
    accepted = check(tmp_path, recipe.name, "preflight.ignore=[evaluation_overlap]")
    assert accepted.returncode == 0, accepted.stderr
    assert "accepted: 2 of 2 (100 %) rows of the evaluation" in accepted.stdout
    assert "tokenised data taken from the cache" in accepted.stdout  # what a run would say, too
    assert accepted.stdout.splitlines()[-1] == "2 warnings, 2 notes"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["data.sequence_length=4096"], "plan_refused", "the model has 64 positions"),
        (["data.source=nowhere.jsonl"], "data_refused", "nowhere.jsonl does not exist"),
        (["trainin.max_steps=1"], "plan_refused", "did you mean training"),
        (["--machine", "8xH900"], "plan_refused", "no card called"),
        (["precision=fp8"], "plan_refused", "fp8"),
    ],
)
def test_check_says_what_plan_and_train_would_refuse(
    recipe: Path, tmp_path: Path, arguments: list[str], code: str, said: str
) -> None:
    done = check(tmp_path, recipe.name, *arguments, "--json")
    assert done.returncode == 2
    (error,) = [finding for finding in json.loads(done.stdout)["findings"] if finding["severity"] == "error"]
    assert error["code"] == code
    assert said in error["problem"] + error["remedy"]


def test_check_without_data_looks_at_the_plan_alone_and_on_a_named_machine(recipe: Path, tmp_path: Path) -> None:
    done = check(tmp_path, recipe.name, "--no-data", "--machine", "A100-80GB", "data.source=not-there.jsonl")
    assert done.returncode == 0, done.stderr
    assert "[small_pass]" in done.stdout and "[learning_rate]" in done.stdout
    assert "tokenising" not in done.stderr
