"""What a run does about bad numbers: leaves an update out before it touches a weight, and gives up for a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.training.tiny_runs import FP16, Run

MakeRun = Callable[..., Run]
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def health(run: Run) -> list[tuple[int, str, str]]:
    return [(event["step"], event["code"], event["action"]) for event in run.events if event["kind"] == "health"]


@pytest.fixture(scope="module")
def once(new_run: MakeRun) -> Callable[[str], Run]:
    """Train with one bad step, the third, in a precision."""
    done: dict[str, Run] = {}

    def of(precision: str) -> Run:
        if precision not in done:
            run = new_run(precision=PRECISIONS[precision])
            run.fault = {"nan_loss_at": [3]} if precision != "fp16" else {"nan_gradient_at": [3], "of": UP_PROJ}
            assert run.train() == 0, run.log()
            done[precision] = run
        return done[precision]

    return of


PRECISIONS: dict[str, Any] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "bf16_pure": "bf16_pure",
    "fp8": {"mode": "fp8", "allow_emulation": True},
    "fp16": FP16,
}


@pytest.mark.slow
@pytest.mark.fault(22)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_bad_step_costs_one_update_and_no_more(precision: str, once: Callable[[str], Run]) -> None:
    run = once(precision)
    assert [step for step, row in run.steps.items() if row["skipped"]] == [3]
    assert all(tensor.isfinite().all() for tensor in run.weights().values())
    if precision == "fp16":  # where an overflow is loss scaling at work
        assert [row["loss_scale"] for row in run.steps.values()] == [65536.0] * 3 + [32768.0] * 5
        assert health(run) == []
    else:
        assert health(run) == [(3, "N2", "skip")]
        assert run.steps[3]["loss"] == "nan"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_learning_rate_counts_the_updates_that_were_applied(precision: str, once: Callable[[str], Run]) -> None:
    # 8 steps of linear decay from 3e-3: the fourth step makes the third update.
    rates = [row["learning_rate"] for row in once(precision).steps.values()]
    assert rates == pytest.approx([3e-3 * (8 - applied) / 8 for applied in (0, 1, 2, 2, 3, 4, 5, 6)])


@pytest.mark.slow
@pytest.mark.fault(26)
def test_ten_overflows_are_no_event_and_leave_scheduler_and_optimizer_at_one_count(new_run: MakeRun) -> None:
    """With torch's fused AdamW, which lets accelerate believe that a skipped step was made."""
    run = new_run(precision=FP16, training={"max_steps": 14, "save_steps": 14})
    run.fault = {"nan_gradient_at": list(range(3, 13)), "of": UP_PROJ}
    assert run.train() == 0, run.log()
    assert [step for step, row in run.steps.items() if row["skipped"]] == list(range(3, 13))
    assert health(run) == []
    assert run.steps[14]["loss_scale"] == 2.0 ** (16 - 10)
    folder = run.directory.checkpoints / "checkpoint-14"
    optimizer, scheduler = torch.load(folder / "optimizer.pt"), torch.load(folder / "scheduler.pt")
    assert optimizer["param_groups"][0]["fused"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {4}
    assert scheduler["last_epoch"] == 4
    assert run.steps[14]["learning_rate"] == pytest.approx(3e-3 * (14 - 3) / 14)


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_left_out_update_changes_no_weight_and_no_moment(once: Callable[[str], Run], fp32_run: Run) -> None:
    """The steps before are those of a run without a fault, and the next one starts from the same weights."""
    run = once("fp32")
    assert [run.steps[step]["loss"] for step in (1, 2)] == [fp32_run.steps[step]["loss"] for step in (1, 2)]
    assert run.steps[4]["loss"] < fp32_run.steps[3]["loss"]  # one update fewer than there, and a batch of its own


@pytest.mark.slow
def test_an_infinite_loss_with_finite_gradients_is_left_out_too(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"inf_loss_at": [2, 5]}
    assert run.train() == 0, run.log()
    assert health(run) == [(2, "N2", "skip"), (5, "N2", "skip")]


@pytest.mark.slow
@pytest.mark.fault(24)
def test_a_gradient_that_is_not_finite_is_left_out(new_run: MakeRun) -> None:
    run = new_run(precision="bf16")
    run.fault = {"nan_gradient_at": [4], "of": UP_PROJ}
    assert run.train() == 0, run.log()
    assert health(run) == [(4, "N3", "skip")]
    assert isinstance(run.steps[4]["loss"], float)
    # And no other: a clip by a norm that is not finite would make every gradient so.
    assert run.texts("health", "reason")[0].endswith(f"; not finite: {UP_PROJ}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_rank_and_engine_leaves_the_same_update_out(strategy: str, new_run: MakeRun) -> None:
    precision = "fp32" if strategy == "ddp" else "bf16"
    run = new_run(precision=precision, distributed={"strategy": strategy, "processes_per_node": 2})
    run.fault = {"nan_loss_at": [3]}
    assert run.train(processes=2) == 0, run.log()
    assert [step for step, row in run.steps.items() if row["skipped"]] == [3]
    assert health(run) == [(3, "N2", "skip")]
    rates = [row["learning_rate"] for row in run.steps.values()]
    assert rates == pytest.approx([3e-3 * (8 - applied) / 8 for applied in (0, 1, 2, 2, 3, 4, 5, 6)])
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


@pytest.mark.slow
@pytest.mark.fault(25)
def test_a_weight_that_went_bad_is_kept_out_of_every_checkpoint(new_run: MakeRun) -> None:
    run = new_run(training={"save_steps": 2, "max_steps": 6})
    run.fault = {"nan_weight_after": 4, "of": UP_PROJ}
    assert run.train() == 81, run.log()
    word = run.last_word()
    assert (word["kind"], word["step"], word["code"]) == ("diverged", 4, "N4")
    assert UP_PROJ in word["reason"]
    assert sorted(path.name for path in run.directory.checkpoints.iterdir()) == ["checkpoint-2"]


@pytest.mark.slow
def test_a_checkpoint_is_known_good_after_healthy_updates(new_run: MakeRun) -> None:
    run = new_run(health={"known_good_after": 3}, training={"save_steps": 2})
    assert run.train() == 0, run.log()
    assert [event["step"] for event in run.events if event["kind"] == "checkpoint_good"] == [2, 4]
    restless = new_run(health={"known_good_after": 3}, training={"save_steps": 2})
    restless.fault = {"nan_loss_at": [4]}
    assert restless.train() == 0, restless.log()
    good = [(event["name"]) for event in restless.events if event["kind"] == "checkpoint_good"]
    assert good == ["checkpoint-2"]  # the fourth step was a bad one: what was saved there is no candidate


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_clips_a_spike_of_the_gradient_within_its_own_step(strategy: str, new_run: MakeRun) -> None:
    run = new_run(
        distributed={"strategy": strategy},
        training={"save_steps": 8, "max_grad_norm": 0.0},
        health={"min_seen": 4, "window": 8},
    )
    run.fault = {"times_loss_at": [8], "by": 1e4}
    assert run.train() == 0, run.log()
    (event,) = [event for event in run.events if event["kind"] == "health"]
    assert (event["code"], event["action"], event["step"]) == ("N5", "clip", 8)
    (file,) = run.directory.checkpoints.glob("checkpoint-8/global_step*/*_optim_states.pt")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    moments = state.get("base_optimizer_state", state.get("optimizer_state_dict"))["state"].values()
    # A tenth of the gradient goes into the first moment: of the whole one that would be a tenth of its norm.
    assert all(moment["exp_avg"].norm() < 1e-3 * run.steps[8]["grad_norm"] for moment in moments)
