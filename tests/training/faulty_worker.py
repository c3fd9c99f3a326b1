"""The real worker with a fault in what it stands on: `faulty_worker.py FAULT RUN ATTEMPT`, FAULT as JSON.

- `{"nan_loss_at": [3]}`: transformers' loss is not a number at those steps, counted from 1; `{"inf_loss_at": ...}`: it
  is infinite, with finite gradients; `{"times_loss_at": [8], "by": 1e4}`: it is so many times larger;
- `{"nan_gradient_at": [3], "of": NAME}`: a weight's gradient is not a number there, at most `times` times;
  `{"nan_weight_after": 3, "of": NAME}`: a weight is, after that step;
- `{"poisoned_at": 6, "kept_in": FILE}`: the loss is infinite wherever a sample of the sixth step is in the batch, in
  every attempt that knows the file; `{"collator": "drawing"}`: the collator replaces tokens by random ones;
- `{"waits_at": 3, "for": FILE}`: step 3 begins when the file is gone;
- `{"file_limit": BYTES, "at": {"3": 2}, "on_rank": 1}`: no file that this rank writes may be larger (EFBIG) in the
  first two tries to save step 3; `{"file_limit": BYTES, "in_background": [4]}`: none that a thread writes for step 4
  (`"tries": 1`: at its first try);
  `{"dies_in_background": 8}`: the process is killed when all of step 8 is written and nothing committed;
- `{"no_memory_above": 2}`: a micro batch of more samples does not fit; `{"loader_sleeps_at": 3}`: the data of step 3 do
  not come; `{"evaluation_takes": SECONDS}`: an evaluation says nothing for so long;
- `{"detached": "layers.1.mlp"}`: nothing flows back through the modules whose names end so;
- `{"loss_raised": {"by": 5.0, "at": [[20, 25]]}}`: it is so much higher from step to step, with the same gradients;
- `{"raises_at": 3, "naming": ["HF_TOKEN"]}`: step 3 raises, and says what these environment variables hold, as
  libraries do with the request that failed; `{"finds_libraries": true}`: it imports from the folder `$LIBRARIES` too;
- `{"reads_in": FILE}`: no fault, but a line a step of who read a tensor's value, each for which a GPU would be waited;
- `{"logits_times": 2.0}`: a Llama takes its loss from so many times its head's output.

`"in_attempts": [1, 2]` keeps a fault to those; a list of faults is all of them.
"""

import json
import math
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def install(fault: dict[str, Any] | list[dict[str, Any]], attempt: int) -> None:
    """Put the fault into transformers' Trainer, below ours, if it is one of this attempt's."""
    if isinstance(fault, list):
        for one in fault:
            install(one, attempt)
    elif attempt in fault.get("in_attempts", [attempt]):
        install_one(fault)


def install_one(fault: dict[str, Any]) -> None:
    import transformers

    if fault.get("finds_libraries"):
        sys.path.insert(0, os.environ["LIBRARIES"])
    if "logits_times" in fault:
        own = transformers.loss.loss_utils.ForCausalLMLoss
        transformers.LlamaForCausalLM.loss_function = staticmethod(
            lambda logits, **keywords: own(logits * fault["logits_times"], **keywords)
        )
    base, struck = transformers.Trainer, [0]
    reads: list[str] = note_reads() if "reads_in" in fault else []
    compute_loss = base.compute_loss

    def number(trainer: Any) -> int:
        return int(trainer.state.global_step) + 1

    def faulty_loss(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if "reads_in" in fault:
            with Path(fault["reads_in"]).open("a") as file:
                file.write(json.dumps(reads) + "\n")  # since the last step's loss
            reads.clear()
        if "detached" in fault and not struck[0]:
            struck[0] = 1
            for name, module in self.model.named_modules():
                if name.endswith(fault["detached"]):
                    module.register_forward_hook(lambda module, inputs, output: output.detach())
        loss = compute_loss(self, *arguments, **keywords)
        if not self.model.training:
            return loss
        if len(arguments[1]["input_ids"]) > fault.get("no_memory_above", math.inf):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if number(self) == fault.get("raises_at"):
            told = " ".join(os.environ[name] for name in fault["naming"])
            print(f"headers: {told}", flush=True)
            raise RuntimeError(f"401 Client Error for https://me:{os.environ[fault['naming'][0]]}@hub/api with {told}")
        raised = fault.get("loss_raised", {"at": ()})
        if any(first <= number(self) <= last for first, last in raised["at"]):
            return loss + raised["by"]
        if number(self) in fault.get("nan_loss_at", ()):
            return loss * math.nan
        if "poisoned_at" in fault and is_poisoned(self, fault):
            return loss + math.inf
        if number(self) in fault.get("times_loss_at", ()):
            return loss * fault["by"]
        if number(self) in fault.get("inf_loss_at", ()):
            return loss + math.inf
        if number(self) in fault.get("nan_gradient_at", ()) and struck[0] < fault.get("times", math.inf):
            struck[0] += 1
            weight = dict(self.model.named_parameters())[fault["of"]]
            handles: list[Any] = []
            handles.append(weight.register_hook(lambda gradient: spoilt(gradient, handles)))
        return loss

    base.compute_loss = faulty_loss
    if "in_background" in fault or "dies_in_background" in fault:
        strike_in_background(fault)
    if "on_rank" in fault and os.environ.get("RANK", "0") == str(fault["on_rank"]):
        limit_files(base, fault["file_limit"], {int(step): tries for step, tries in fault["at"].items()})
    if fault.get("collator") == "drawing":
        from mpt.training.tasks import causal_lm

        causal_lm.build_collator = lambda plan, tokenizer: draw_tokens  # type: ignore[assignment]
    if "loader_sleeps_at" in fault:
        get_batch_samples = base.get_batch_samples

        def late_samples(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if number(self) == fault["loader_sleeps_at"]:
                time.sleep(600)
            return get_batch_samples(self, *arguments, **keywords)

        base.get_batch_samples = late_samples
    if "evaluation_takes" in fault:
        evaluation_loop = base.evaluation_loop

        def late_evaluation(self: Any, *arguments: Any, **keywords: Any) -> Any:
            time.sleep(fault["evaluation_takes"])
            return evaluation_loop(self, *arguments, **keywords)

        base.evaluation_loop = late_evaluation
    if "waits_at" in fault:
        training_step = base.training_step

        def late_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
            while number(self) == fault["waits_at"] and Path(fault["for"]).exists():
                time.sleep(0.01)
            return training_step(self, *arguments, **keywords)

        base.training_step = late_step
    if "nan_weight_after" in fault:
        step_end = transformers.trainer_callback.CallbackHandler.on_step_end

        def faulty_end(self: Any, args: Any, state: Any, control: Any) -> Any:
            if state.global_step == fault["nan_weight_after"]:
                with torch.no_grad():
                    dict(self.model.named_parameters())[fault["of"]].view(-1)[0] = math.nan
            return step_end(self, args, state, control)

        transformers.trainer_callback.CallbackHandler.on_step_end = faulty_end


def note_reads() -> list[str]:
    """Note each read of a tensor's value from now on: by which method, and in which file."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        own = getattr(torch.Tensor, name)

        def noted(self: Any, *arguments: Any, name: str = name, own: Any = own) -> Any:
            reads.append(f"{name} in {Path(sys._getframe(1).f_code.co_filename).name}")
            return own(self, *arguments)

        setattr(torch.Tensor, name, noted)
    return reads


def is_poisoned(trainer: Any, fault: dict[str, Any]) -> bool:
    """Whether the micro batch under way holds a sample that is poisoned; the first time it comes there, one is."""
    evidence, kept = trainer.evidence, Path(fault["kept_in"])
    ids = evidence.sample_ids[len(evidence.batches) - 1].tolist()
    if not kept.exists():
        if trainer.state.global_step + 1 != fault["poisoned_at"]:
            return False
        kept.write_text(json.dumps(ids[:1]))
    return bool(set(ids) & set(json.loads(kept.read_text())))


def draw_tokens(samples: Any) -> dict[str, torch.Tensor]:
    """Collate blocks with a tenth of their tokens drawn from each generator that a collator may use."""
    tokens = torch.stack([torch.as_tensor(sample["input_ids"]) for sample in samples])
    drawn = torch.rand(tokens.shape) < 0.1
    return {
        "input_ids": torch.where(drawn, random.randrange(100) + np.random.randint(100), tokens),
        "labels": tokens,
    }


def limit_files(base: Any, limit: int, tries: dict[int, int]) -> None:
    """Let files grow to `limit` bytes only, while a step of `tries` is saved and as often as it says."""
    save = base._save_checkpoint
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(self: Any, *arguments: Any, **keywords: Any) -> Any:
        left = tries.get(self.state.global_step, 0)
        tries[self.state.global_step] = left - 1
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if left > 0 else hard, hard))
        try:
            return save(self, *arguments, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    base._save_checkpoint = limited


def strike_in_background(fault: dict[str, Any]) -> None:
    """Let the thread that writes checkpoints meet a full disk, or a kill."""
    from mpt.training.checkpointing import Saver

    write_and_commit, commit, prune = Saver._write_and_commit, Saver._commit, Saver._prune
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(self: Any, copied: Any, staging: Path, step: int) -> Any:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step in fault.get("in_background", ()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_limit"], hard))
        try:
            return write_and_commit(self, copied, staging, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def killed(self: Any, staging: Path, step: int) -> Any:
        if step == fault.get("dies_in_background"):
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(self, staging, step)

    def freed(self: Any) -> None:
        if fault.get("tries") == 1:  # what a try that failed then makes is enough room
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        prune(self)

    Saver._prune = freed  # type: ignore[method-assign]
    Saver._write_and_commit = limited  # type: ignore[method-assign]
    Saver._commit = killed  # type: ignore[method-assign]


def spoilt(gradient: torch.Tensor, handles: list[Any]) -> torch.Tensor:
    handles.pop().remove()
    return gradient * math.nan


def main(arguments: list[str]) -> int:
    from mpt.training import worker

    worker.quiet_libraries()
    install(json.loads(arguments[0]), attempt=int(arguments[2]))
    return worker.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
