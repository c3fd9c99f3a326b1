"""Samples on the way: they are journalled by step, and the training does not notice them."""

from collections.abc import Callable

import pytest
import torch

from tests.training.tiny_runs import Run

pytestmark = pytest.mark.slow


def test_samples_at_each_evaluation_leave_the_training_bit_for_bit_as_it_was(
    new_run: Callable[..., Run], fp32_run: Run
) -> None:
    prompts = ["The ", "A lambda expression "]
    run = new_run(
        sample={"prompt": prompts, "max_new_tokens": 8, "temperature": 0.8, "every_eval": True},
        training={"eval_strategy": "steps", "eval_steps": 3},
    )
    assert run.train() == 0, run.log()
    written = [(event["step"], event["prompt"]) for event in run.events if event["kind"] == "sample"]
    assert written == [(step, prompt) for step in (3, 6, 8) for prompt in prompts]
    assert all(text.strip() for text in run.texts("sample", "text"))
    assert run.texts("sample", "text")[0] != run.texts("sample", "text")[2]  # other weights by then
    assert run.trajectory == fp32_run.trajectory
    ours, theirs = run.weights(), fp32_run.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_last_evaluation_s_samples_are_not_written_twice(new_run: Callable[..., Run]) -> None:
    run = new_run(
        sample={"prompt": "The ", "max_new_tokens": 4, "every_eval": True},
        training={"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4},
    )
    assert run.train() == 0, run.log()
    assert run.texts("sample", "step") == [4]
