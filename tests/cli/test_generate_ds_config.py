"""`mpt generate-ds-config` as a person and a program call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from mpt.cli.generate_ds_config import generate_ds_config
from mpt.errors import MptError

app = typer.Typer()
app.command()(generate_ds_config)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def config_of(*arguments: str) -> dict[str, object]:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_stdout_is_the_configuration_and_stderr_the_reasons() -> None:
    result = call("llama2-7b-full", "--machine", "8xA100-80GB")
    config = json.loads(result.stdout)
    assert config["train_batch_size"] == 64
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"] is True
    assert "distributed.strategy: zero2 (auto): divides gradients and optimizer states" in result.stderr
    assert "note: no scheduler section" in result.stderr
    assert result.stderr.strip().endswith("fits")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_may_be_chosen(stage: int) -> None:
    config = config_of("quickstart", "--machine", "8xH100", "--stage", str(stage))
    assert config["zero_optimization"]["stage"] == stage  # type: ignore[index]


def test_offload_may_be_chosen() -> None:
    config = config_of("llama3-8b-zero3", "--machine", "4xV100", "--offload", "cpu")
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}  # type: ignore[index]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}  # type: ignore[index]
    assert config["fp16"]["initial_scale_power"] == 16  # type: ignore[index]
    nvme = config_of("llama3-8b-zero3", "--machine", "T4", "--offload", "optimizer=nvme,nvme_path=/fast")
    assert "aio" in nvme


def test_overrides_reach_the_configuration() -> None:
    config = config_of("quickstart", "training.max_grad_norm=0.25", "global_batch_size=32", "--machine", "4xH100")
    assert (config["gradient_clipping"], config["train_batch_size"]) == (0.25, 32)


def test_one_gpu_that_needs_no_zero_gets_stage_2_and_is_told() -> None:
    result = call("quickstart", "--machine", "T4")
    assert json.loads(result.stdout)["zero_optimization"]["stage"] == 2
    assert "`mpt train` would go by single here" in result.stderr


def test_what_does_not_fit_is_written_all_the_same_and_said() -> None:
    result = call("llama3-8b-zero3", "--machine", "T4", "--offload", "none")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["zero_optimization"]["stage"] == 3
    assert "DOES NOT FIT" in result.stderr


def test_a_file_is_written_whole_and_stdout_stays_empty(tmp_path: Path) -> None:
    target = tmp_path / "ds.json"
    result = call("quickstart", "--machine", "8xH100", "-o", str(target))
    assert result.stdout == ""
    assert json.loads(target.read_text(encoding="utf-8"))["train_batch_size"] > 0
    assert [path.name for path in target.parent.iterdir()] == ["ds.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quickstart", "--stage", "0"), "trains wrongly"),
        (("quickstart", "--stage", "7"), "no ZeRO stage 7"),
        (("quickstart", "--offload", "disk"), "no such device"),
        (("quickstart", "--stage", "2", "--offload", "parameters=cpu"), "only zero3"),
        (("quickstart", "--machine", "3xT4", "global_batch_size=16"), "not a multiple of 3 processes"),
        (("no-such-recipe",), "no built-in recipe"),
    ],
)
def test_wishes_that_can_not_be_met_end_with_the_users_error(arguments: tuple[str, ...], said: str) -> None:
    result = call(*arguments)
    assert isinstance(result.exception, MptError)
    assert said in result.exception.problem
    assert result.exception.exit_code == 2


def test_writing_a_configuration_imports_no_torch() -> None:
    code = (
        "import sys; from mpt.cli.generate_ds_config import generate_ds_config as make\n"
        "make('quickstart', None, None, None, None, '8xH100')\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
