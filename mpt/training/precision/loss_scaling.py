"""Loss scaling of fp16 (Micikevicius et al. 2018, section 3.2) outside DeepSpeed, which brings its own.

accelerate makes no scaler on a CPU and then trains in fp32 without a word (accelerate 1.15, `Accelerator.__init__`),
and takes no scaler options from the Trainer: so the scaler is made here, for every device. torch's own has no floor and
no hysteresis; with either of them the scale moves as DeepSpeed's does, so that a recipe means the same in both.
"""

from collections.abc import Mapping
from typing import Any

import torch

NEVER = 2**31 - 1


class DynamicScaler(torch.amp.GradScaler):
    """torch's scaler, with the plan's knobs also where it goes on from a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where the scale stood. torch would take the knobs of back then with it, over the recipe's."""
        # The count of clean steps must be able to meet the interval: torch compares for equality.
        clean = min(int(state_dict["_growth_tracker"]), self._growth_interval - 1)
        knobs = {
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
        }
        super().load_state_dict(state_dict | knobs | {"_growth_tracker": clean})


class StaticScaler(DynamicScaler):
    """A fixed scale: an overflow still skips its step, and the scale stays."""

    def __init__(self, device: str, scale: float) -> None:
        super().__init__(device, init_scale=scale, growth_interval=NEVER)
        self._static = scale

    def update(self, new_scale: Any = None) -> None:
        """Clear what the last step recorded, and set the same scale again."""
        super().update(self._static)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the fixed scale, whatever the checkpoint's was."""
        super().load_state_dict(state_dict | {"scale": self._static})


class HysteresisScaler(DynamicScaler):
    """A dynamic scale that takes `hysteresis` overflows before it shrinks, and never shrinks below `minimum`.

    It moves step for step as DynamicLossScaler does (deepspeed 0.19.8, runtime/fp16/loss_scaler.py, with
    consecutive_hysteresis False): the first `hysteresis - 1` overflows leave the scale as it is, each one after them
    shrinks it, and only its growth refills them. The first clean step, and the first after an overflow, does not count
    towards `growth_interval`, where torch counts it. Everything stays on the device: no synchronisation but torch's.
    """

    def __init__(self, device: str, *, minimum: float | None, hysteresis: int, **knobs: Any) -> None:
        super().__init__(device, **knobs)
        self.minimum = minimum
        self._hysteresis = hysteresis
        self._init_hysteresis_left = hysteresis
        self._hysteresis_left: torch.Tensor | None = None
        self._init_growth_tracker = -1

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._hysteresis_left = torch.full((), self._init_hysteresis_left, dtype=torch.int32, device=dev)

    def is_at_floor(self) -> torch.Tensor | None:
        """Say on the device whether an overflow could not lower the scale; None without a floor."""
        if self.minimum is None:
            return None
        scale, left = self._scale, self._hysteresis_left
        assert scale is not None and left is not None, "there is no scale before the first backward pass"
        return (scale <= self.minimum) & (left <= 1)

    def update(self, new_scale: Any = None) -> None:
        """Move the scale by whether this step overflowed; a scale given by hand is set as it is."""
        if new_scale is not None:
            super().update(new_scale)
            return
        scale, clean_steps = self._check_scale_growth_tracker("update")
        left = self._hysteresis_left
        assert left is not None
        found = [
            count.to(scale.device, non_blocking=True)
            for state in self._per_optimizer_states.values()
            for count in state["found_inf_per_device"].values()
        ]
        overflowed = torch.stack(found).sum() > 0
        grows = ~overflowed & (clean_steps + 1 == self._growth_interval)
        before = scale.clone()
        super().update()
        shrunk = scale if self.minimum is None else scale.clamp(min=self.minimum)
        scale.copy_(torch.where(overflowed, torch.where(left > 1, before, shrunk), scale))
        clean_steps.sub_(overflowed.to(clean_steps))
        left.copy_(torch.where(overflowed, (left - 1).clamp(min=1), left.masked_fill(grows, self._hysteresis)))

    def state_dict(self) -> dict[str, Any]:
        """Give torch's state and how many overflows are left, counting the one that shrinks the scale."""
        left = self._hysteresis_left
        held = self._init_hysteresis_left if left is None else int(left.item())
        return super().state_dict() | {"hysteresis_left": held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where the scale stood; a checkpoint of a run without hysteresis begins with all of it."""
        scale = state_dict["scale"] if self.minimum is None else max(state_dict["scale"], self.minimum)
        super().load_state_dict(state_dict | {"scale": scale})
        self._init_hysteresis_left = min(int(state_dict.get("hysteresis_left", self._hysteresis)), self._hysteresis)
        if self._hysteresis_left is not None:
            self._hysteresis_left.fill_(self._init_hysteresis_left)


def build_scaler(loss_scale: Mapping[str, Any], device: str) -> torch.amp.GradScaler:
    """Build the scaler that the plan's `loss_scale` describes; without `min` and `hysteresis` it moves as torch's."""
    if loss_scale.get("static") is not None:
        return StaticScaler(device, float(loss_scale["static"]))
    knobs: dict[str, Any] = {
        "init_scale": float(loss_scale["initial"]),
        "growth_factor": float(loss_scale["growth_factor"]),
        "backoff_factor": float(loss_scale["backoff_factor"]),
        "growth_interval": int(loss_scale["growth_interval"]),
    }
    minimum, hysteresis = loss_scale.get("min"), loss_scale.get("hysteresis")
    if minimum is None and hysteresis is None:
        return DynamicScaler(device, **knobs)
    return HysteresisScaler(
        device,
        minimum=None if minimum is None else float(minimum),
        hysteresis=1 if hysteresis is None else int(hysteresis),
        **knobs,
    )


def hold_deepspeed_knobs(optimizer: Any, loss_scale: Mapping[str, Any]) -> None:
    """Let the plan's knobs stand where DeepSpeed has loaded a checkpoint's whole scaler over them.

    `optimizer` is ZeRO's (deepspeed 0.19.8, `_load_global_state` in zero/stage_1_and_2.py and zero/stage3.py). A
    dynamic scale goes on from where it was; a fixed one is the plan's.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    loaded = optimizer.loss_scaler
    static = loss_scale.get("static")
    if static is not None:
        optimizer.loss_scaler, optimizer.dynamic_loss_scale = LossScaler(scale=float(static)), False
        return
    minimum = 1 if loss_scale.get("min") is None else float(loss_scale["min"])
    planned = DynamicLossScaler(
        init_scale=max(loaded.cur_scale, minimum),
        scale_window=int(loss_scale["growth_interval"]),
        min_scale=minimum,
        delayed_shift=2 if loss_scale.get("hysteresis") is None else int(loss_scale["hysteresis"]),
        consecutive_hysteresis=False,
    )
    if isinstance(loaded, DynamicLossScaler):
        planned.cur_iter, planned.last_overflow_iter = loaded.cur_iter, loaded.last_overflow_iter
        planned.cur_hysteresis = min(loaded.cur_hysteresis, planned.delayed_shift)
    optimizer.loss_scaler, optimizer.dynamic_loss_scale = planned, True


def scale_at_floor(scaler: torch.amp.GradScaler | None) -> torch.Tensor | None:
    """Say on the device whether an overflow in this step could not lower the scale; None where it has no floor."""
    return scaler.is_at_floor() if isinstance(scaler, HysteresisScaler) else None
