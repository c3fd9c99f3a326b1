"""`mpt detect-precision` as a person and a program call it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from mpt.cli.detect_precision import detect_precision
from mpt.errors import MptError

app = typer.Typer()
app.command()(detect_precision)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        ("T4", "fp16"),
        ("8xV100", "fp16"),
        ("4xV100+4xA100", "fp16"),
        ("A100", "bf16"),
        ("2x8xH100", "bf16"),
        ("B200", "bf16"),
        ("RTX-5090", "bf16"),
        ("8xMI300X", "bf16"),
        ("P100", "fp32"),
    ],
)
def test_a_named_machine_gets_its_precision_with_a_reason(machine: str, precision: str) -> None:
    answer = json.loads(call("--machine", machine, "--json").stdout)
    assert answer["precision"] == precision
    assert answer["reason"]
    rejected = [option["precision"] for option in answer["rejected"]]
    assert precision not in rejected
    assert all(option["reason"] for option in answer["rejected"])


def test_json_has_the_documented_keys_of_a_device() -> None:
    answer = json.loads(call("--machine", "T4", "--json").stdout)
    device = answer["devices"][0]
    assert (device["name"], device["kind"], device["compute_capability"]) == ("Tesla T4", "cuda", "7.5")
    assert (device["generation"], device["memory_gib"]) == ("Turing", 15)
    assert "fp16_tensor_cores" in device["native"]
    assert "bf16" in device["emulated"]
    assert json.loads(call("--machine", "cpu", "--json").stdout)["devices"][0]["compute_capability"] is None


def test_what_is_written_can_be_named_as_a_machine(tmp_path: Path) -> None:
    first = call("--machine", "2x4xV100+4xA100", "--json").stdout
    path = tmp_path / "machine.json"
    path.write_text(first)
    again = json.loads(call("--machine", str(path), "--json").stdout)
    assert {**again, "source": "named"} == json.loads(first)


def test_the_text_for_people_fits_80_columns_and_counts_equal_devices() -> None:
    text = call("--machine", "2x8xH100").stdout
    assert text.startswith("8 x NVIDIA H100 80GB HBM3\n")
    assert "2 nodes like this: 16 devices" in text
    assert "precision: bf16" in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_unknown_machine_is_refused() -> None:
    result = call("--machine", "H1000")
    assert isinstance(result.exception, MptError)
    assert result.stdout == ""


def test_this_computer_is_answered_fast_and_without_torch() -> None:
    script = (
        "import sys\nfrom mpt.cli.detect_precision import detect_precision\ndetect_precision(None, json=True)\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(run.stdout)["devices"]
    # 0.2 s on a 2-core machine in 2026; the bound leaves room for a loaded one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
