"""Loss scaling of fp16 (Micikevicius et al. 2018, section 3.2) outside DeepSpeed, which brings its own.

accelerate makes no scaler on a CPU and then trains in fp32 without a word (accelerate 1.15, `Accelerator.__init__`),
and takes no scaler options from the Trainer: so the scaler is made here, for every device.
"""

from collections.abc import Mapping
from typing import Any

import torch

NEVER = 2**31 - 1


class StaticScaler(torch.amp.GradScaler):
    """A fixed scale: an overflow still skips its step, and the scale stays."""

    def __init__(self, device: str, scale: float) -> None:
        super().__init__(device, init_scale=scale, growth_interval=NEVER)
        self._static = scale

    def update(self, new_scale: Any = None) -> None:
        """Clear what the last step recorded, and set the same scale again."""
        super().update(self._static)


def build_scaler(loss_scale: Mapping[str, Any], device: str) -> torch.amp.GradScaler:
    """Build the scaler that the plan's `loss_scale` describes."""
    if loss_scale.get("static") is not None:
        return StaticScaler(device, float(loss_scale["static"]))
    return torch.amp.GradScaler(
        device,
        init_scale=float(loss_scale["initial"]),
        growth_factor=float(loss_scale["growth_factor"]),
        backoff_factor=float(loss_scale["backoff_factor"]),
        growth_interval=int(loss_scale["growth_interval"]),
    )
