"""Two processes on one machine: the same training as one process with the same global batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.training.tiny_runs import FP16, Run, continue_from

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]


def has_fp16_engine() -> bool:
    """DeepSpeed's own test of a CPU (deepspeed/accelerator/cpu_accelerator.py)."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


NEEDS_FP16 = pytest.mark.skipif(not has_fp16_engine(), reason="DeepSpeed has no fp16 on a CPU without AVX512-FP16")


def two_processes(strategy: str, **changes: Any) -> dict[str, Any]:
    return {"distributed": {"strategy": strategy, "processes_per_node": 2}, "micro_batch_size": 4} | changes


def furthest(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_train_what_one_does_with_the_same_global_batch(
    strategy: str, new_run: MakeRun, fp32_run: Run
) -> None:
    run = new_run(**two_processes(strategy, sample={"prompt": "The ", "max_new_tokens": 4}))
    run.is_fresh = strategy == "ddp"
    assert run.train(processes=2) == 0, run.log()
    found = run.audit()
    assert (found["distributed.strategy"], found["world_size"], found["global_batch_size"]) == (strategy, 2, 8)
    for step, row in fp32_run.steps.items():
        # fp32 sums in another order; AdamW's first steps divide by tiny numbers and magnify it.
        assert run.steps[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert run.steps[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert run.steps[step]["learning_rate"] == pytest.approx(row["learning_rate"])
        assert run.steps[step]["tokens"] == row["tokens"]
    assert furthest(run.weights(), fp32_run.weights()) < 1e-4
    assert len([event for event in run.events if event["kind"] == "finished"]) == 1
    assert len(run.texts("sample", "text")) == 1


def test_weight_decay_skips_biases_and_norms_under_deepspeed_too(new_run: MakeRun) -> None:
    decay = {"training": {"weight_decay": 5.0, "max_steps": 4}}
    alone, divided = new_run(**decay), new_run(**two_processes("zero2", **decay))
    assert alone.train() == 0, alone.log()
    assert divided.train(processes=2) == 0, divided.log()
    assert furthest(divided.weights(), alone.weights()) < 1e-4
    assert (divided.weights()["model.norm.weight"] > 0.98).all()  # decayed it would be near 1 - 4 * 0.003 * 5


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("zero2", "bf16"),
        ("zero3", "bf16"),
        pytest.param("zero2", "fp16", marks=NEEDS_FP16),
        pytest.param("zero3", "fp16", marks=NEEDS_FP16),
    ],
)
def test_zero_in_16_bits_keeps_fp32_master_weights_and_resumes_exactly(
    strategy: str, precision: str, new_run: MakeRun, fp32_run: Run
) -> None:
    asked = FP16 | {"loss_scale": {"initial": 2.0**22, "hysteresis": 1}} if precision == "fp16" else precision
    whole = new_run(**two_processes(strategy, precision=asked))
    assert whole.train(processes=2) == 0, whole.log()
    found = whole.audit()
    assert (set(found["matrix multiplications"]), found["weights_dtype"]) == ({precision}, [precision])
    assert found["optimizer_state_dtype"] == ["fp32"]
    assert (found["reduce_dtype"], found["grad_accum_dtype"]) == ("fp32", "fp32")
    final = whole.weights()
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
    # Master weights hold what 16 bits can't.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in final.values())
    if precision == "bf16":
        assert whole.steps[8]["loss"] == pytest.approx(fp32_run.steps[8]["loss"], rel=0.01)
    else:
        assert whole.steps[1]["skipped"] and not whole.steps[8]["skipped"]
        assert whole.steps[2]["loss_scale"] == 2.0**21
    resumed = continue_from(whole, "checkpoint-4", new_run, processes=2)
    assert resumed.trajectory == whole.trajectory
    assert all(torch.equal(final[name], tensor) for name, tensor in resumed.weights().items())


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "fp32"), ("zero2", "bf16"), ("zero3", "fp32")])
def test_what_is_not_finite_stops_every_process_before_the_update(
    strategy: str, precision: str, new_run: MakeRun
) -> None:
    run = new_run(**two_processes(strategy, precision=precision, training={"learning_rate": 1e30, "save_steps": 1}))
    assert run.train(processes=2) != 0
    word = run.last_word()
    assert word["kind"] == "diverged", run.log()
    assert [event["kind"] for event in run.events].count("diverged") == 1
    for folder in run.directory.checkpoints.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in run.weights(folder).values())


@pytest.mark.fault(27)
@NEEDS_FP16
def test_a_loss_scale_that_deepspeed_may_not_lower_ends_the_run(new_run: MakeRun) -> None:
    scale = {"initial": 2.0**40, "min": 2.0**39}
    run = new_run(**two_processes("zero2", precision=FP16 | {"loss_scale": scale}))
    assert run.train(processes=2) != 0
    word = run.last_word()
    assert (word["kind"], word["what"], word["value"]) == ("diverged", "loss_scale", 2.0**39), run.log()


def test_all_processes_stop_at_one_step(new_run: MakeRun) -> None:
    run = new_run(**two_processes("ddp", training={"max_steps": 500, "save_steps": 1000}))
    run.prepare()
    run.directory.attempt(1).stop.touch()
    assert run.start(processes=2).wait(timeout=200) != 0
    assert run.last_word()["kind"] == "stopped"
    assert run.last_word()["step"] == 1
    assert (run.directory.checkpoints / "checkpoint-1").is_dir()
