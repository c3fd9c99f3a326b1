"""`mpt cache` finds what the worker keeps, and removes nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mpt.cli.cache import app
from mpt.recipe.schema import DataSection
from mpt.running.data_cache import KINDS, cache_root
from mpt.training.cache import cache_folder, making
from mpt.training.corpus import read_corpus


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n')
    os.utime(path, (1, 1))
    return str(path)


def test_what_was_prepared_is_listed_and_cleared_and_prepared_again(source: str, tmp_path: Path) -> None:
    section = DataSection(source=source)
    for _ in range(2):
        read_corpus(section, source, split="train")
        told = json.loads(run("list", "--json").stdout)
        assert told["folder"] == str(tmp_path / "cache")
        (rows,) = (kind for kind in told["kinds"] if kind["name"] == "rows")
        files = list((tmp_path / "cache/rows").rglob("*.*"))
        assert (rows["entries"], rows["bytes"]) == (1, sum(file.stat().st_size for file in files))
        assert f"in {tmp_path / 'cache'}" in run("list").stdout
        assert run("clear").stdout.endswith(f"MiB freed in {tmp_path / 'cache'}\n")
        assert json.loads(run("list", "--json").stdout)["bytes"] == 0


def test_what_is_being_prepared_and_what_is_not_ours_stays(source: str, tmp_path: Path) -> None:
    final = cache_folder("tokens") / ("0" * 32)
    (own := cache_folder("tokens") / "my-own").mkdir()
    with making(final) as staging:
        assert staging is not None
        assert f"{staging} stays: it is being prepared" in run("clear").stderr
        (staging / "content").touch()
    assert (final / "content").exists()
    run("clear")
    assert own.exists() and not final.exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"HF_HOME": "~/hf"},
        {"HF_DATASETS_CACHE": "/d", "HF_HOME": "/h"},
        {"MPT_CACHE": "/m"},
    ],
)
def test_the_folder_is_the_workers(environment: dict[str, str], tmp_path: Path) -> None:
    program = "import datasets, os; print(os.environ.get('MPT_CACHE') or datasets.config.HF_DATASETS_CACHE / 'mpt')"
    names = ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "MPT_CACHE")
    clean = {name: value for name, value in os.environ.items() if name not in names} | environment
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert str(cache_root(clean)) == done.stdout.strip()


def test_every_kind_that_the_worker_keeps_is_known() -> None:
    """The names are written where the folders are asked for."""
    code = "".join(path.read_text() for path in (Path(__file__).parents[2] / "mpt/training").glob("*.py"))
    assert {name for name in KINDS if f'cache_folder("{name}")' in code} == set(KINDS)
    assert code.count('cache_folder("') == len(KINDS)
