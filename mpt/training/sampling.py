"""The recipe's samples: text that the model writes, at the end of a run and at its evaluations. Called by the trainer's
evaluation and by the session.

Nothing of the training changes by it: the random state and the model's mode are as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mpt.errors import MptError
from mpt.training.generation import generate, to_prompt


def write_samples(trainer: Any, tokenizer: Any, *, is_chat: bool) -> None:
    """Generate from each of the recipe's prompts and journal the texts, with the step. Every rank calls this: where the
    weights are divided (ZeRO-3) all of them take part."""
    section = trainer.plan.recipe.sample
    is_divided = trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() == 3
    if section is None or not (trainer.watch.is_writer or is_divided):
        return
    if not trainer.accelerator.unwrap_model(trainer.model).can_generate():  # a task of the user's own
        raise MptError("sample: the task's model generates no text", remedy="Leave sample out.")
    with _generating(trainer):
        for asked in section.prompts:
            torch.manual_seed(trainer.args.seed)
            prompt = to_prompt(
                tokenizer,
                [{"role": "user", "content": asked}],
                max_new_tokens=section.max_new_tokens,
                max_positions=trainer.plan.facts.max_positions,
                is_chat=is_chat,
            )
            tokens = generate(
                trainer.model,
                tokenizer,
                prompt,
                device=trainer.args.device,
                temperature=section.temperature,
                synced_gpus=is_divided,
            )
            trainer.watch.heartbeat.beat()
            if trainer.watch.is_writer:
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                told = {"step": trainer.state.global_step, "prompt": asked, "text": text, "is_answer": is_chat}
                trainer.journal.append("sample", **told)


@contextmanager
def _generating(trainer: Any) -> Iterator[None]:
    """Put the model into evaluation, uncompiled: each length of a text would be compiled anew."""
    was_training = trainer.model.training
    trainer.model.eval()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    eagerly = torch.compiler.set_stance("force_eager") if trainer.plan.value("compile") else nullcontext()
    try:
        # Under autocast: modules that adapters train whole are fp32 in a 16-bit model.
        with torch.random.fork_rng(devices=devices), trainer.accelerator.autocast(), eagerly:
            yield
    finally:
        trainer.model.train(was_training)
