"""The format in which DDP sums gradients over ranks, where it is not that of the gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ReduceIn:
    """A communication hook for DistributedDataParallel: averages each bucket in `dtype`.

    torch has this for 16-bit sums of fp32 gradients (ddp_comm_hooks.default_hooks) and not the other way, for the fp32
    sums of bf16 gradients. `narrows` False: a bucket of wider gradients, those of fp32 islands, is summed as it is.
    `sent` is what really went over the wire, for the audit, such buckets aside.
    """

    def __init__(self, dtype: torch.dtype, *, narrows: bool = True) -> None:
        self.dtype = dtype
        self.narrows = narrows
        self.sent: torch.dtype | None = None

    def __call__(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        is_kept = not self.narrows and buffer.dtype.itemsize > self.dtype.itemsize
        summed = buffer.to(buffer.dtype if is_kept else self.dtype, copy=True).div_(dist.get_world_size())
        if not is_kept:
            self.sent = summed.dtype

        def copy_back(done: torch.futures.Future[Any]) -> torch.Tensor:
            return buffer.copy_(done.value()[0])

        return dist.all_reduce(summed, async_op=True).get_future().then(copy_back)


def reduce_in(model: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> ReduceIn | None:
    """Let a DDP model sum in `dtype`; None where its gradients are in that already.

    Where some are and others are wider, those are an island's: asked for in fp32, and summed in it.
    """
    gradients = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    if gradients == {dtype}:
        return None
    hook = ReduceIn(dtype, narrows=dtype not in gradients)
    model.register_comm_hook(None, hook.__call__)
    return hook
