"""`scripts/bench_throughput`: what it refuses at once, what it runs, and what its table says. No time is asserted."""

import argparse
import json
import runpy
from pathlib import Path

import pytest
import yaml

from mpt.recipe.load import load_recipe
from tests.cli.real_runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "bench_throughput.py"), run_name="bench_throughput")
GIVEN = {"rounds": 1, "steps": [1, 2], "vocabulary": 512, "attention": None, "peers": None, "only": None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "--rounds 0: it must be at least 1"),
        (["--steps", "5", "5"], "--steps 5 5: the second must be above the first"),
        (["--vocabulary", "100"], "--vocabulary 100"),
        (["--only", "plain", "mpd"], "--only: mpd; there are plain, mpt, mpt compiled"),
        (["--only", "mpt"], "plain is what all are compared with"),
    ],
)
def test_what_can_not_be_measured_is_refused_at_once(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        SCRIPT["read_arguments"](SCRIPT["build_parser"](), arguments)
    assert refused.value.code == 2
    assert says in capsys.readouterr().err


def test_every_round_runs_the_plain_script_twice_and_a_tool_that_is_not_there_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = SCRIPT["programs"](argparse.Namespace(**GIVEN | {"peers": tmp_path, "attention": ["sdpa"]}))
    assert list(found) == ["plain", "mpt", "mpt compiled", "plain again", "plain compiled", "mpt sdpa", "trl"]
    assert "litgpt: left out" in capsys.readouterr().err


def test_the_documents_have_uneven_lengths_and_mpt_s_recipe_is_one(tmp_path: Path) -> None:
    tokens = SCRIPT["prepare"](tmp_path, 512)
    lengths = [len(json.loads(line)["text"]) for line in (tmp_path / "documents.jsonl").open()]
    assert len(set(lengths)) > 100
    assert tokens > 100 * SCRIPT["LENGTH"] * SCRIPT["BATCH"]
    command = SCRIPT["by_mpt"](tmp_path, 3, compile="regional")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.compile, recipe.training_keys["max_steps"]) == ("regional", 3)
    assert yaml.safe_load(Path(command[4]).read_text())["data"]["eval_fraction"] == 0


def test_the_table_holds_medians_of_what_each_round_gave_over_its_own_plain_run() -> None:
    rates = {"plain": [100.0, 200.0, 100.0], "mpt": [120.0, 220.0, 150.0]}
    report = SCRIPT["summary"](rates, {"plain": [9.0, 8.0], "mpt": [7.0, 6.0]}, {"plain": 1000.0, "mpt": 900.0})
    assert report["mpt"]["over_plain"] == 1.2  # of 1.2, 1.1 and 1.5
    assert report["mpt"]["spread"] == [1.1, 1.5]
    row = SCRIPT["table"](report).splitlines()[2].split()
    assert row[:3] == ["mpt", "150", "1.20"]
