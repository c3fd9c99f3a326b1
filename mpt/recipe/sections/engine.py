"""How processes share the work and the model's state."""

from typing import Literal, Self

from pydantic import model_validator

from mpt.recipe.scalars import Text
from mpt.recipe.sections.base import PositiveInt, Section
from mpt.terms import OffloadDevice, Strategy


class DistributedSection(Section):
    """How processes share the work."""

    strategy: Literal["auto"] | Strategy = "auto"
    """single, ddp, zero1, zero2, zero3 (DeepSpeed) or fsdp2."""
    processes_per_node: PositiveInt | None = None
    """Training processes a node. Left out: one a device, and one on a CPU."""


class OffloadSection(Section):
    """What ZeRO keeps off the accelerator. `offload: cpu` is short for optimizer and parameters under zero3, and
    for the optimizer under zero1 and zero2."""

    optimizer: OffloadDevice = OffloadDevice.NONE
    """Optimizer states and fp32 master weights."""
    parameters: OffloadDevice = OffloadDevice.NONE
    """Parameters between their uses; zero3 only."""
    nvme_path: Text | None = None
    """Directory on a local NVMe drive."""

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> Self:
        if (OffloadDevice.NVME in (self.optimizer, self.parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path goes with nvme; give both or neither")
        return self
