"""A run whose numbers go bad for real, unattended: `mpt train` finds out why, changes its plan, and finishes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mpt.running.journal import read_events
from tests.cli.real_runs import MPT, Folder, environment
from tests.training.tiny_runs import LLAMA, save_base


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


# bf16 has fp32's range, so that both loss and weights stay finite for long: what tells is the course of the loss. The
# rates are far beyond what a model this small bears (1 for SGD, 1e-2 for AdamW), so that it comes on every CPU.
TOO_HIGH: dict[str, dict[str, Any]] = {
    # It learns while the rate is small, saves checkpoints that prove good, and leaves for 1e5 within a few steps.
    "blows up": {
        "training": {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 10, "warmup_steps": 40, "save_steps": 5},
        "recovery": {
            "rungs": ["retry", "lower_learning_rate"],
            "margin": 4,
            "learning_rate_factor": 0.1,
            "rewarm_steps": 10,
        },
        "health": {"min_seen": 8, "window": 32, "settle_steps": 16, "known_good_after": 4},
    },
    # Clipped gradients under AdamW: the loss climbs by a few per cent a step, from the first one on.
    "drifts away": {
        "training": {"learning_rate": 3, "warmup_steps": 60, "save_steps": 10},
        "recovery": {"learning_rate_factor": 0.003, "rewarm_steps": 10},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("course", TOO_HIGH)
def test_a_bf16_run_whose_learning_rate_is_too_high_goes_on_with_a_lower_one_and_learns(
    course: str, tmp_path: Path
) -> None:
    blocks = TOO_HIGH[course]
    recipe = {
        "model": {"config": LLAMA},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
        "data": {"source": "builtin:python-reference", "sequence_length": 64, "eval_fraction": 0},
        "precision": {"mode": "bf16", "allow_emulation": True},
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
    } | blocks | {"training": blocks["training"] | {"max_steps": 90}}  # fmt: skip
    folder = Folder(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    done = folder.train("tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["outcome"], summary["steps"]) == ("finished", 90)

    # Back, once more unchanged, back again, and on with the lower rate.
    asked = blocks["training"]["learning_rate"]
    rates = [plan["values"]["learning_rate"]["value"] for plan in folder.plans]
    assert rates[:2] == [asked, asked] and rates[2] == pytest.approx(asked * blocks["recovery"]["learning_rate_factor"])
    ends = [event for event in folder.events if event["kind"] == "diverged"]
    assert {event["code"] for event in ends} <= {"N2", "N3", "N6"}
    came_back_to = [plan["resume_from"] for plan in folder.plans[1:]]
    if course == "blows up":
        good = folder.listed("checkpoint_good", "name")
        assert all(name in good for name in came_back_to)
        steps = [int(name.partition("-")[2]) for name in came_back_to]
        assert all(step <= end["onset"] - 4 for step, end in zip(steps, ends, strict=True))
    else:
        # No checkpoint is known to be good: from the beginning, or from what was saved before the loss left its lowest.
        assert len(came_back_to) == len(ends)
        assert all("drifted away" in event["reason"] for event in ends)

    # The model is sound, and has learnt.
    assert all(tensor.isfinite().all() for tensor in load_file(folder.run.final / "model.safetensors").values())
    last = {row["step"]: row["loss"] for row in folder.rows}
    assert sum(last[step] for step in range(81, 91)) / 10 < last[1] - 0.3
    if course == "blows up" or came_back_to[-1] is None:  # else it began where the loss was high already
        assert all(row["loss"] < 1.5 * last[1] for row in folder.rows if row["attempt"] == summary["attempts"])

    # The diagnosis tells it, and names what to write into the recipe.
    doctor = subprocess.run(
        [*MPT, "doctor", "tiny", "--json"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    told = json.loads(doctor.stdout)
    assert told["outcome"] == "finished"
    assert [number["code"] for number in told["numbers"] if "roll_back" in number["actions"]] == ["N6"]
    advised = {key: value for finding in told["findings"] for key, value in finding["recipe"].items()}
    assert advised["training.learning_rate"] == rates[-1]
