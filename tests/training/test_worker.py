"""What one training process does with a plan."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpt.running import checkpoints
from mpt.running.heartbeat import read_beat
from mpt.training.worker import explain
from tests.training.tiny_runs import FP16, LLAMA, Run, continue_from

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_and_the_last_word_says_where_it_ended(fp32_run: Run) -> None:
    losses = [row["loss"] for row in fp32_run.steps.values()]
    word = fp32_run.last_word()
    assert losses[-1] < losses[0] - 0.3
    assert word["kind"] == "finished"
    assert word["step"] == 8
    assert word["train_loss"] == pytest.approx(sum(losses) / 8)
    assert losses[-1] - 0.3 < word["eval_loss"] < losses[0]
    assert fp32_run.texts("audit", "passed") == [True]
    assert fp32_run.texts("phase", "phase")[:4] == ["imports", "data", "model", "setup"]
    assert len(fp32_run.texts("sample", "text")) == 1


def test_a_metrics_row_says_what_a_step_was(fp32_run: Run) -> None:
    row = fp32_run.steps[8]
    assert row["tokens"] == 8 * 64
    assert row["learning_rate"] == pytest.approx(3e-3 / 8)  # the one that step 8 used, of a linear decay over 8
    assert (row["loss_scale"], row["skipped"], row["attempt"]) == (None, False, 1)
    assert 0 < row["grad_norm"] < 10
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_time_s"])
    assert 0.1 < row["memory_gib"] < 8


def test_the_final_model_loads_with_plain_from_pretrained_and_is_what_was_trained(fp32_run: Run) -> None:
    final = fp32_run.directory.final
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("def f(x): return x")["input_ids"]) == "def f(x): return x"
    # The end of text pads, and it must go on learning when somebody fine-tunes this model.
    assert model.get_input_embeddings().padding_idx is None
    assert equal(fp32_run.weights(), fp32_run.weights(fp32_run.directory.checkpoints / "checkpoint-8"))


def test_every_checkpoint_is_committed_and_plain_trainer_finds_its_way_in_it(fp32_run: Run) -> None:
    names = fp32_run.texts("checkpoint_saved", "name")
    assert names == ["checkpoint-4", "checkpoint-8"]
    for name in names:
        folder = fp32_run.directory.checkpoints / name
        assert checkpoints.verify(folder) is None
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
            p.name for p in folder.iterdir()
        }
    assert sorted(p.name for p in fp32_run.directory.checkpoints.iterdir()) == names


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(new_run: MakeRun, fp32_run: Run) -> None:
    run = new_run(precision="bf16")
    assert run.train() == 0, run.log()
    found = run.audit()
    assert (found["matrix multiplications"], found["autocast_dtype"]) == ({"bf16": 15}, "bf16")
    assert found["weights_dtype"] == found["grad_accum_dtype"] == found["optimizer_state_dtype"] == ["fp32"]
    assert run.steps[8]["loss"] == pytest.approx(fp32_run.steps[8]["loss"], rel=0.01)  # 8 bits of mantissa
    assert run.steps[8]["loss"] != fp32_run.steps[8]["loss"]


@pytest.mark.fault(26)
def test_fp16_is_really_fp16_and_its_loss_scale_skips_steps_until_it_fits(fp16_run: Run, fp32_run: Run) -> None:
    found = fp16_run.audit()
    assert (found["matrix multiplications"], found["autocast_dtype"]) == ({"fp16": 15}, "fp16")
    assert found["loss_scale"] == 2.0**27
    rows = list(fp16_run.steps.values())
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert skipped and skipped == list(range(1, len(skipped) + 1))
    for before, after in pairwise(rows):
        if before["skipped"]:
            assert after["loss_scale"] == before["loss_scale"] / 2
            assert after["learning_rate"] == before["learning_rate"]  # a skipped step is none of the schedule's
    assert fp16_run.texts("step_skipped", "step") == skipped
    assert rows[0]["loss"] == pytest.approx(fp32_run.steps[1]["loss"], rel=1e-3)
    assert rows[0]["loss"] != fp32_run.steps[1]["loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_knobs_of_the_loss_scale_reach_the_scaler(new_run: MakeRun) -> None:
    knobs = {"initial": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2}
    run = new_run(precision=FP16 | {"loss_scale": knobs})
    assert run.train() == 0, run.log()
    assert [row["loss_scale"] for row in run.steps.values()] == [1024, 1024, 4096, 4096, 16384, 16384, 65536, 65536]


def test_a_static_loss_scale_stays(new_run: MakeRun) -> None:
    run = new_run(precision=FP16 | {"loss_scale": {"static": 256.0}})
    assert run.train() == 0, run.log()
    assert {row["loss_scale"] for row in run.steps.values()} == {256.0}


def test_a_static_loss_scale_that_always_overflows_ends_the_run(new_run: MakeRun) -> None:
    run = new_run(precision=FP16 | {"loss_scale": {"static": 2.0**24}}, training={"max_steps": 40})
    assert run.train() == 81
    assert run.last_word() | {"time": ""} == run.last_word() | {"what": "loss_scale", "value": 2.0**24, "time": ""}
    assert all(row["skipped"] for row in run.steps.values())


DROPOUT = {"config": LLAMA | {"attention_dropout": 0.1}}
RESUMES: dict[str, dict[str, Any]] = {
    "fp32 with dropout, and an evaluation between": {
        "model": DROPOUT,
        "training": {"eval_strategy": "steps", "eval_steps": 3},
    },
    "bf16 with accumulation": {"precision": "bf16", "gradient_accumulation_steps": 3},
    "fp16 while the scale moves": {"precision": FP16 | {"loss_scale": {"initial": 2.0**26, "growth_interval": 2}}},
    "bf16_pure": {"precision": "bf16_pure"},
    "at the end of an epoch, evaluated": {
        "model": DROPOUT,
        "data": {"source": "short.txt"},
        "micro_batch_size": 24,
        "gradient_accumulation_steps": 3,
        "training": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"},
    },
    "padded, with checkpointed activations": {
        "data": {"packing": False},
        "gradient_checkpointing": True,
        "training": {"gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_that_was_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(
    name: str, new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(topics[name] for name in sorted(topics))[:40_000]  # 3.6 global batches of "an epoch"
    tmp_path.joinpath("short.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    whole = new_run(**RESUMES[name])
    assert whole.train() == 0, whole.log()
    resumed = continue_from(whole, "checkpoint-4", new_run)
    assert len(whole.trajectory) == 8
    assert resumed.trajectory == whole.trajectory
    assert equal(resumed.weights(), whole.weights())
    first, second = whole.last_word(1), resumed.last_word(2)
    assert (first["train_loss"], first["eval_loss"]) == (second["train_loss"], second["eval_loss"])


def test_a_run_goes_on_bit_for_bit_before_the_short_last_step_of_an_epoch(
    new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has fewer samples than the plan says."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[:40_000]
    tmp_path.joinpath("short.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    changes = RESUMES["at the end of an epoch, evaluated"]
    whole = new_run(**changes | {"training": changes["training"] | {"save_steps": 3}})
    assert whole.train() == 0, whole.log()
    assert whole.steps[4]["tokens"] < whole.steps[3]["tokens"]
    resumed = continue_from(whole, "checkpoint-3", new_run)
    assert resumed.trajectory == whole.trajectory
    assert equal(resumed.weights(), whole.weights())


def test_a_changed_learning_rate_holds_over_that_of_the_checkpoint(fp32_run: Run, new_run: MakeRun) -> None:
    resumed = new_run(training={"learning_rate": 1e-3})
    shutil.copytree(fp32_run.directory.checkpoints / "checkpoint-4", resumed.directory.checkpoints / "checkpoint-4")
    shutil.copytree(fp32_run.path / "tokenizer", resumed.path / "tokenizer")
    assert resumed.train(2, "checkpoint-4") == 0, resumed.log(2)
    rates = {step: row["learning_rate"] for step, row in resumed.steps.items()}
    assert rates == pytest.approx({step: fp32_run.steps[step]["learning_rate"] / 3 for step in (5, 6, 7, 8)}, rel=1e-12)
    assert resumed.audit(2)["learning_rate"] == 1e-3


def test_resuming_at_the_last_step_trains_no_further_and_makes_the_final_model(fp32_run: Run, new_run: MakeRun) -> None:
    resumed = continue_from(fp32_run, "checkpoint-8", new_run)
    assert resumed.last_word(2)["step"] == 8
    assert equal(resumed.weights(), fp32_run.weights())


def test_a_run_directory_that_was_moved_goes_on_and_loads_its_best_checkpoint(new_run: MakeRun, tmp_path: Path) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    run = new_run(training=keys | {"load_best_model_at_end": True, "learning_rate": 0.3, "warmup_steps": 2})
    assert run.train() == 0, run.log()
    state = json.loads((run.directory.checkpoints / "checkpoint-8" / "trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    # Of all others only the newest is kept.
    assert {p.name for p in run.directory.checkpoints.iterdir()} == {f"checkpoint-{best}", "checkpoint-8"}
    assert equal(run.weights(), run.weights(run.directory.checkpoints / f"checkpoint-{best}"))
    assert run.last_word()["eval_loss"] == pytest.approx(losses[best])

    moved = new_run()
    moved.recipe = run.recipe
    moved.path.rmdir()
    shutil.move(run.path, moved.path)
    assert moved.train(2, "checkpoint-8") == 0, moved.log(2)
    assert moved.last_word(2)["eval_loss"] == pytest.approx(losses[best])


def test_a_loss_that_stays_not_finite_ends_the_run_before_it_reaches_the_weights(new_run: MakeRun) -> None:
    run = new_run(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 1})
    assert run.train() == 81, run.log()
    word = run.last_word()
    assert word["kind"] == "diverged"
    assert word["what"] in ("loss", "grad_norm")
    assert not math.isfinite(float(word["value"]))
    told = [event for event in run.events if event["kind"] == "health"]
    assert [event["action"] for event in told] == ["skip", "skip", "roll_back"]
    assert (told[-1]["step"], told[-1]["code"], word["onset"]) == (word["step"], word["code"], told[0]["step"])
    for folder in run.directory.checkpoints.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in run.weights(folder).values())
    assert not run.directory.final.exists()


@pytest.mark.fault(25)
def test_weights_that_are_poisoned_already_are_named_before_the_first_step(
    fp32_run: Run, new_run: MakeRun, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(fp32_run.directory.final)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    model.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(fp32_run.directory.final).save_pretrained(tmp_path / "poisoned")
    run = new_run(model=str(tmp_path / "poisoned"), tokenizer=None)
    assert run.train() == 81, run.log()
    word = run.last_word()
    assert (word["kind"], word["step"], word["code"], word["what"]) == ("diverged", 0, "N4", "weights")
    assert word["reason"] == "not finite before the first step: model.layers.1.mlp.down_proj.weight"
    assert run.steps == {}
    assert list(run.directory.checkpoints.iterdir()) == []


@pytest.mark.fault(25)
def test_a_checkpoint_that_is_poisoned_already_is_what_the_run_goes_back_from(fp32_run: Run, new_run: MakeRun) -> None:
    """Its step is the onset, so that an older checkpoint is taken and not the beginning."""
    run = new_run()
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.copytree(fp32_run.directory.checkpoints / name, run.directory.checkpoints / name)
    shutil.copytree(fp32_run.path / "tokenizer", run.path / "tokenizer")
    weights = run.directory.checkpoints / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    assert run.train(2, "checkpoint-8") == 81, run.log(2)
    word = run.last_word(2)
    assert (word["code"], word["step"], word["onset"]) == ("N4", 8, 8)
    target = checkpoints.roll_back_target(run.directory, word["onset"], margin=0)
    assert target is not None
    assert target.path.name == "checkpoint-4"


def wait_for(what: Callable[[], Any], seconds: float = 120, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(pause)


@pytest.mark.fault(5)
def test_sigterm_saves_at_the_next_step_and_the_run_goes_on_as_if_it_had_not_been(new_run: MakeRun) -> None:
    whole = new_run(training={"max_steps": 150, "save_steps": 1000})
    whole.is_fresh = True
    whole.prepare()
    process = whole.start()
    wait_for(lambda: whole.directory.metrics.exists() and len(whole.steps) >= 3)
    os.kill(process.pid, signal.SIGINT)  # Ctrl-C is the supervisor's
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 80, whole.log()
    word = whole.last_word()
    assert word["kind"] == "stopped"
    assert 3 <= word["step"] < 150
    assert whole.texts("stop_requested", "by") == ["SIGTERM"]
    assert checkpoints.verify(whole.directory.checkpoints / word["checkpoint"]) is None
    assert max(whole.steps) == word["step"]
    whole.is_fresh = False
    assert whole.train(2, word["checkpoint"]) == 0, whole.log(2)
    assert sorted(whole.steps) == list(range(1, 151))


@pytest.mark.fault(6)
@pytest.mark.parametrize("phase", ["saving", "evaluating"])
def test_sigterm_in_a_save_or_an_evaluation_lets_it_finish_and_stops_at_the_next_step(
    phase: str, new_run: MakeRun
) -> None:
    run = new_run(training={"save_steps": 3, "eval_strategy": "steps", "eval_steps": 3})
    run.prepare()
    process = run.start()
    beat = run.directory.attempt(1).heartbeat(0)
    wait_for(lambda: getattr(read_beat(beat), "phase", None) == phase or process.poll() is not None, pause=0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 80, run.log()
    assert run.last_word()["step"] == 4
    assert run.texts("checkpoint_saved", "name") == ["checkpoint-3", "checkpoint-4"]
    assert all(checkpoints.verify(path) is None for _, path in checkpoints.list_checkpoints(run.directory))
    assert run.texts("evaluated", "step") == [3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"config": LLAMA | {"hiden_size": 32}}}, ["hiden_size", "did you mean hidden_size"]),
        ({"data": {"source": "nowhere.txt"}}, ["nowhere.txt does not exist"]),
        (
            {"training": {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_steps": 3}},
            ["transformers refuses"],
        ),
        ({"data": {"sequence_length": 64, "eval_fraction": 0.999}}, ["less than one block"]),
    ],
)
def test_a_mistake_in_the_recipe_ends_with_exit_code_2_and_a_remedy(
    changes: dict[str, Any], words: list[str], new_run: MakeRun, tmp_path: Path
) -> None:
    if "eval_fraction" in str(changes):
        text = tmp_path / "short.txt"
        text.write_text("too short\n")
        changes = {"data": {"source": str(text)}}
    run = new_run(**changes)
    assert run.train() == 2, run.log()
    word = run.last_word()
    assert (word["kind"], word["exit_code"]) == ("failed", 2)
    assert all(part in word["problem"] for part in words), word
    assert word["remedy"]


def test_a_plan_for_another_machine_is_refused_before_a_step_is_made(new_run: MakeRun) -> None:
    run = new_run()
    run.prepare()
    plan = json.loads(run.directory.attempt(1).plan.read_text())
    plan["values"]["weights_dtype"]["value"] = "bf16"  # as if the model had been meant to be loaded so
    plan["values"]["optimizer_state_dtype"]["value"] = "bf16"
    run.directory.attempt(1).plan.write_text(json.dumps(plan))
    assert run.start().wait(timeout=120) == 3, run.log()
    word = run.last_word()
    assert "master_weights_dtype: planned ['fp32'], found ['bf16']" in word["problem"]
    assert run.texts("audit", "passed") == [False]
    assert not run.directory.metrics.exists() or not run.steps


def test_a_bug_keeps_its_traceback_in_the_log_and_is_called_a_bug(new_run: MakeRun) -> None:
    run = new_run()
    run.prepare()
    plan = json.loads(run.directory.attempt(1).plan.read_text())
    del plan["values"]["sequence_length"]
    run.directory.attempt(1).plan.write_text(json.dumps(plan))
    assert run.start().wait(timeout=120) == 1
    assert run.last_word()["problem"] == "KeyError: 'sequence_length'"
    assert "Traceback" in run.log()


def test_a_checkpoint_that_has_no_room_ends_the_run_as_a_storage_error(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"file_limit": 600 * 1024, "at": {"4": 2, "8": 2}, "on_rank": 0}  # optimizer.pt takes twice that
    assert run.train() == 83, run.log()
    assert run.last_word()["exit_code"] == 83
    assert run.texts("save_failed", "step") == [4, 8]  # and step 8 is the last
    assert not list(run.directory.checkpoints.glob("checkpoint-*"))


def test_the_heartbeat_tells_each_step_and_phase(fp32_run: Run) -> None:
    attempt = fp32_run.directory.attempt(1)
    beat = read_beat(attempt.heartbeat(0))
    assert beat is not None
    assert (beat.phase, beat.step, beat.steps_begun) == ("sampling", 8, 8)
    assert beat.count > 8
    assert attempt.stacks(0).read_text() == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 86),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 86),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), 86),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), 86),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"), 86),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 86),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 86),
        (MemoryError(), 86),
        (RuntimeError("the size of tensor a must match"), 1),
        (ValueError("out of memory."), 1),
        (OSError(28, "No space left on device"), 83),
    ],
)
def test_memory_that_ran_out_is_known_by_the_words_of_every_device(error: Exception, code: int) -> None:
    assert explain(error)[2] == code


def test_a_step_s_numbers_are_read_at_once_and_nothing_else_is(new_run: Callable[..., Run], tmp_path: Path) -> None:
    """Whatever is read of a tensor's value, item by item or in a truth test, makes the host wait for a GPU.

    transformers' mask asks whether positions begin anew (5.23, find_packed_sequence_indices): before the forward pass,
    where the host waits for the last update alone.
    """
    run = new_run(training={"logging_steps": 100, "save_strategy": "no"})
    run.fault = {"reads_in": str(tmp_path / "reads")}
    assert run.train() == 0, run.log()
    reads = [json.loads(line) for line in (tmp_path / "reads").read_text().splitlines()]
    # The audit looks before the first two updates; the eighth step is the last, and what follows is no step's.
    assert reads[2:8] == [["__bool__ in masking_utils.py", "tolist in step_watch.py"]] * 6
