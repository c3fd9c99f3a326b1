"""The real worker with a fault in what it stands on: `faulty_worker.py FAULT RUN ATTEMPT`, FAULT as JSON.

`{"nan_loss_at": [3]}`: transformers' loss is not a number at those steps, counted from 1; `{"inf_loss_at": ...}`: it is
infinite, with finite gradients; `{"nan_gradient_at": [3], "of": NAME}`: a weight's gradient is not a number there, at
most `times` times;
`{"nan_weight_after": 3, "of": NAME}`: a weight is, after that step.
"""

import json
import math
import sys
from typing import Any

import torch


def install(fault: dict[str, Any]) -> None:
    """Put the fault into transformers' Trainer, below ours."""
    import transformers

    base, struck = transformers.Trainer, [0]
    compute_loss = base.compute_loss

    def number(trainer: Any) -> int:
        return int(trainer.state.global_step) + 1

    def faulty_loss(self: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = compute_loss(self, *arguments, **keywords)
        if not self.model.training:
            return loss
        if number(self) in fault.get("nan_loss_at", ()):
            return loss * math.nan
        if number(self) in fault.get("inf_loss_at", ()):
            return loss + math.inf
        if number(self) in fault.get("nan_gradient_at", ()) and struck[0] < fault.get("times", math.inf):
            struck[0] += 1
            weight = dict(self.model.named_parameters())[fault["of"]]
            handles: list[Any] = []
            handles.append(weight.register_hook(lambda gradient: spoilt(gradient, handles)))
        return loss

    base.compute_loss = faulty_loss
    if "nan_weight_after" in fault:
        step_end = transformers.trainer_callback.CallbackHandler.on_step_end

        def faulty_end(self: Any, args: Any, state: Any, control: Any) -> Any:
            if state.global_step == fault["nan_weight_after"]:
                with torch.no_grad():
                    dict(self.model.named_parameters())[fault["of"]].view(-1)[0] = math.nan
            return step_end(self, args, state, control)

        transformers.trainer_callback.CallbackHandler.on_step_end = faulty_end


def spoilt(gradient: torch.Tensor, handles: list[Any]) -> torch.Tensor:
    handles.pop().remove()
    return gradient * math.nan


if __name__ == "__main__":
    from mpt.training.worker import main, quiet_libraries

    quiet_libraries()
    install(json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
