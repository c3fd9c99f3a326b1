"""Where bad numbers come from: a real overflow in fp16, a learning rate too high, a fault that does not come again."""

import json
import os
import shutil
import subprocess
import sys
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


def replayed(run: Run) -> dict[str, Any]:
    """Make the run's incident again, as a user would."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mpt", "replay", str(run.path), "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


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
    assert len(found["sample_ids"]) == len(found["samples"]) == 8
    assert any("the" in text for text in found["samples"])
    step = load_file(run.directory.incidents / "0001" / "step-rank0.safetensors")
    assert step["0/input_ids"].shape == (8, 64)
    (told,) = [event for event in run.events if event["kind"] == "autopsy"]
    assert (told["incident"], told["cause"]) == ("0001", found["cause"])
    again = replayed(run)
    assert again["reproduced"] and again["now"]["cause"] == found["cause"]
    assert not run.directory.incidents.joinpath("0001/replay").exists()


def test_weights_that_were_thrown_far_are_blamed_on_the_updates(new_run: MakeRun) -> None:
    run = new_run(training={"learning_rate": 1e30, "max_grad_norm": 0.0})
    assert run.train() == 81, run.log()
    found = autopsy(run)
    assert found["reproduced"] and found["largest_weight"] > 1e20
    assert "updates were too large (learning rate" in found["cause"]
    again = replayed(run)  # its weights are those of no checkpoint
    same = ("module", "direction", "largest_input", "largest_weight", "micro_batch", "loss", "samples")
    assert again["reproduced"] and [again["now"][key] for key in same] == [found[key] for key in same]


def test_a_run_that_learns_nothing_any_more_shows_its_largest_numbers(new_run: MakeRun) -> None:
    run = new_run(
        training={"learning_rate": 1e4, "max_steps": 30, "max_grad_norm": 0.0, "save_strategy": "no"},
        health={"dead_after": 3, "spikes": False},
    )
    assert run.train() == 81, run.log()
    assert run.last_word()["code"] == "dead"
    found = autopsy(run)
    assert not found["reproduced"] and found["largest_weight"] > 1e3
    assert found["cause"].startswith("every number is finite; the largest output is ")
    assert found["cause"].endswith("updates were too large (learning rate, warm-up, gradient clipping)")
    again = replayed(run)
    assert again["reproduced"] and again["now"] is None and again["loss"] == found["loss"]


def test_weights_that_are_not_finite_are_named_and_kept(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"nan_weight_after": 4, "of": "model.layers.1.mlp.up_proj.weight"}
    assert run.train() == 81, run.log()
    assert run.last_word()["code"] == "N4"
    assert autopsy(run)["cause"] == "a weight of model.layers.1.mlp.up_proj is not finite"
    again = replayed(run)
    assert again["reproduced"] and again["now"]["cause"] == autopsy(run)["cause"]


def test_what_does_not_come_again_is_told_apart(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"nan_gradient_at": [2, 3, 4], "of": "model.layers.0.mlp.up_proj.weight", "times": 3}
    assert run.train() == 81, run.log()
    assert (autopsy(run)["reproduced"], autopsy(run)["module"]) == (False, None)
    assert "a fault of the machine" in autopsy(run)["cause"]
    again = replayed(run)
    assert not again["reproduced"] and again["now"] is None


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_every_rank_takes_part_and_one_incident_is_kept(strategy: str, new_run: MakeRun) -> None:
    run = new_run(distributed={"strategy": strategy, "processes_per_node": 2}, training={"learning_rate": 1e30})
    assert run.train(processes=2) != 0
    assert run.last_word()["kind"] == "diverged", run.log()
    assert autopsy(run)["reproduced"]
    assert autopsy(run)["module"] is not None
    if strategy == "zero3":  # whose weights have to be put together, and taken apart again
        again = replayed(run)
        assert again["reproduced"] and again["now"]["module"] == autopsy(run)["module"]
        assert again["now"]["rank"] == autopsy(run)["rank"]
