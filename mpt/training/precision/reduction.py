"""The format in which DDP sums gradients over ranks, where it is not that of the gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ReduceIn:
    """A communication hook for DistributedDataParallel: averages each bucket in `dtype`.

    torch has this for 16-bit sums of fp32 gradients (ddp_comm_hooks.default_hooks) and not the other way, for the fp32
    sums of bf16 gradients. `sent` is what really went over the wire, for the audit.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sent: torch.dtype | None = None

    def __call__(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        summed = buffer.to(self.dtype).div_(dist.get_world_size())
        self.sent = summed.dtype

        def copy_back(done: torch.futures.Future[Any]) -> torch.Tensor:
            return buffer.copy_(done.value()[0])

        return dist.all_reduce(summed, async_op=True).get_future().then(copy_back)


def reduce_in(model: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> ReduceIn | None:
    """Let a DDP model sum in `dtype`; None where its gradients are in that already."""
    gradients = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    if gradients == {dtype}:
        return None
    hook = ReduceIn(dtype)
    model.register_comm_hook(None, hook.__call__)
    return hook
