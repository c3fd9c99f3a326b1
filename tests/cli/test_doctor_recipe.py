"""`mpt doctor RECIPE`: the checklist as a table and as one object; and which argument is a recipe, which a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.cli.doctor import is_recipe
from mpt.planning.checklist import POINTS


def doctor(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "doctor", *arguments],
        cwd=folder, env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def test_the_table_names_every_point_and_the_lines_to_write(tmp_path: Path) -> None:
    done = doctor(tmp_path, "quickstart", "precision=fp32", "--machine", "A100-80GB")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for _, title, _ in POINTS:
        assert title in said
    assert "precision: bf16" in done.stdout
    assert "312 TFLOP/s at peak instead of 19.5" in said


def test_json_gives_each_point_with_its_status_gain_and_recipe_keys(tmp_path: Path) -> None:
    done = doctor(tmp_path, "llama3-8b-zero3", "--machine", "8xH100", "--json")
    told = json.loads(done.stdout)
    assert told["machine"].startswith("8x") and told["memory"]["fits"] is True
    points = {point["code"]: point for point in told["points"]}
    assert list(points) == [code for code, _, _ in POINTS]
    assert points["fp8"]["status"] == "gain" and points["fp8"]["recipe"] == {"precision": "fp8"}
    assert points["fp8"]["speed"] > 1
    assert points["loss_scale"] | {"reason": ""} == {
        "code": "loss_scale", "title": points["loss_scale"]["title"], "status": "not_applicable", "reason": "",
        "recipe": {}, "memory_gib": None, "speed": None, "gain": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quickstrat"], "quickstrat"),
        (["missing.yaml"], "no such file and no built-in recipe"),
        (["quickstart", "trainin.max_steps=3"], "did you mean training"),
        (["quickstart", "--machine", "H900"], "no card called"),
        (["quickstart", "data.sequence_length=4096", "--machine", "T4"], "has 512 positions"),
    ],
)
def test_what_can_not_be_checked_is_one_message_and_exit_code_2(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = doctor(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_a_file_is_a_recipe_a_folder_a_run_and_a_name_a_run_before_a_built_in_recipe(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "gpt2-pretrain").mkdir(parents=True)
    (tmp_path / "mine").write_text("model: gpt2\ndata: a.txt\n")
    assert is_recipe(str(tmp_path / "mine"), runs)
    assert is_recipe("quickstart", runs)
    assert is_recipe("missing.yaml", runs)
    assert not is_recipe("gpt2-pretrain", runs)
    assert not is_recipe(str(runs / "gpt2-pretrain"), runs)
    assert not is_recipe("nothing", runs)
