"""Planted secrets, looked for in everything that a run leaves behind and prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.real_runs import MPT, Folder, environment

pytestmark = pytest.mark.slow
PLANTED = {
    "HF_TOKEN": "planted-hub-token-1",
    "WANDB_API_KEY": "planted-wandb-key-2",
    "MLFLOW_TRACKING_PASSWORD": "planted/mlflow+pass3",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+key4",
}
FAULT = [{"raises_at": 2, "naming": list(PLANTED)}]


def files_with(folder: Path, secret: str) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_run_that_fails_over_its_credentials_keeps_them_to_itself(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "work")
    folder.write(restart={"max_restarts": 0}, training={"max_steps": 3, "report_to": "tensorboard"})
    command = [sys.executable, "-m", "tests.training.faulty_train", json.dumps(FAULT), "train", "tiny.yaml", "--json"]
    env = environment() | PLANTED | {"MLFLOW_TRACKING_URI": "https://me:planted-url-5@host"}
    done = subprocess.run(command, cwd=folder.path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    log = folder.run.attempt(1).log.read_text()
    assert "headers: [redacted]" in log and "Traceback" in log
    assert "[redacted]" in folder.listed("failed", "problem")[0]
    told = subprocess.run(
        [*MPT, "report", "tiny"], cwd=folder.path, env=env, capture_output=True, text=True, check=True
    )
    assert "401 Client Error" in told.stdout + done.stderr
    for secret in (*PLANTED.values(), "planted-url-5"):
        assert not files_with(folder.path, secret)
        assert secret not in done.stdout + done.stderr + told.stdout + told.stderr


def test_what_the_command_line_refuses_it_does_not_repeat(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "work")
    folder.write()
    arguments = ["training.hub_token=planted-token-6", "data.source=https://me:planted-pass-7@host/data.txt"]
    done = subprocess.run(
        [*MPT, "train", "tiny.yaml", "--json", *arguments],
        cwd=folder.path, env=os.environ | environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "credential" in done.stderr
    assert json.loads(done.stdout)["outcome"] == "refused"
    for secret in ("planted-token-6", "planted-pass-7"):
        assert secret not in done.stdout + done.stderr
    assert not folder.run.path.exists()
