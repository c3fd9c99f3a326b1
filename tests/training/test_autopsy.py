"""Where bad numbers come from: a real overflow in fp16, a learning rate too high, a fault that does not come again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.training.tiny_runs import FP16, Run

MakeRun = Callable[..., Run]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def overflowing(fp32_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model whose second block multiplies numbers beyond fp16's range; in fp32 it computes well."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(fp32_run.directory.final, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"] *= 300
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def autopsy(run: Run) -> dict[str, Any]:
    (folder,) = run.directory.incidents.iterdir()
    found: dict[str, Any] = json.loads((folder / "autopsy.json").read_text())
    return found


def test_an_overflow_of_fp16_is_traced_to_the_module_that_made_it(overflowing: Path, new_run: MakeRun) -> None:
    run = new_run(model={"name_or_path": str(overflowing), "config": None}, tokenizer=None, precision=FP16)
    assert run.train() == 81, run.log()
    assert run.last_word()["code"] == "N2"
    found = autopsy(run)
    assert (found["reproduced"], found["direction"], found["kind"]) == (True, "forward", "inf")
    assert found["module"].startswith("model.layers.1.mlp")
    assert (found["format"], found["limit"]) == ("fp16", 65504)
    assert found["cause"].startswith("fp16 overflow in model.layers.1.mlp")
    assert found["step"] == 1 and found["micro_batch"] == 0
    assert any("the" in text for text in found["samples"])
    batch = load_file(run.directory.incidents / "0001" / "batch.safetensors")
    assert batch["input_ids"].shape == (8, 64)
    (told,) = [event for event in run.events if event["kind"] == "autopsy"]
    assert (told["incident"], told["cause"]) == ("0001", found["cause"])


def test_weights_that_were_thrown_far_are_blamed_on_the_updates(new_run: MakeRun) -> None:
    run = new_run(training={"learning_rate": 1e30, "max_grad_norm": 0.0})
    assert run.train() == 81, run.log()
    found = autopsy(run)
    assert found["reproduced"] and found["largest_weight"] > 1e20
    assert "updates were too large (learning rate" in found["cause"]


def test_what_does_not_come_again_is_told_apart(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"nan_gradient_at": [2, 3, 4], "of": "model.layers.0.mlp.up_proj.weight", "times": 3}
    assert run.train() == 81, run.log()
    assert (autopsy(run)["reproduced"], autopsy(run)["module"]) == (False, None)
    assert "a fault of the machine" in autopsy(run)["cause"]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_every_rank_takes_part_and_one_incident_is_kept(strategy: str, new_run: MakeRun) -> None:
    run = new_run(distributed={"strategy": strategy, "processes_per_node": 2}, training={"learning_rate": 1e30})
    assert run.train(processes=2) != 0
    assert run.last_word()["kind"] == "diverged", run.log()
    assert autopsy(run)["reproduced"]
    assert autopsy(run)["module"] is not None
