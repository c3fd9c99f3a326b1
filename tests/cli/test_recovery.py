"""A run whose numbers go bad for real, unattended: `mpt train` finds out why, changes its plan, and finishes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mpt.running.journal import read_events
from tests.cli.real_runs import MPT
from tests.training.tiny_runs import save_base


@pytest.mark.slow
@pytest.mark.fault(27)
def test_an_overflow_in_fp16s_forward_pass_is_recovered_from_in_another_precision(tmp_path: Path) -> None:
    save_base(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):  # in fp32 it computes well
        weights[f"model.layers.1.mlp.{name}.weight"] *= 300
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    recipe = {
        "model": "./model",
        "data": {"source": "builtin:python-reference", "sequence_length": 64},
        "precision": {"mode": "fp16", "allow_emulation": True},
        "micro_batch_size": 4,
        "training": {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-4},
    }
    tmp_path.joinpath("overflow.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*MPT, "train", "overflow.yaml", "--json"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["steps"], summary["attempts"]) == ("finished", 6, 2)
    run = tmp_path / "runs/overflow"
    (cause,) = [event["cause"] for event in read_events(run / "journal.jsonl") if event["kind"] == "autopsy"]
    assert cause.startswith("fp16 overflow in model.layers.1.mlp.down_proj: |x| reached ")
    (change,) = [event for event in read_events(run / "journal.jsonl") if event["kind"] == "plan_changed"]
    plan = json.loads((run / "attempts/002/plan.json").read_text())
    assert plan["values"]["precision"]["value"] == change["repair"]["values"]["mode"] != "fp16"
    assert plan["recipe"]["precision"]["mode"] == "fp16"  # the user's words stay
    for said in (cause, "going back to the beginning", "precision fp16 -> "):
        assert said in done.stderr
    assert all(tensor.isfinite().all() for tensor in load_file(run / "final/model.safetensors").values())
