"""Tensors to a safetensors file one at a time, so that they are never in memory together; and ZeRO-3's made whole."""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch


def write_tensors(
    path: Path,
    shapes: Sequence[tuple[str, torch.Size]],
    tensors: Iterator[torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write fp32 tensors on the CPU as a safetensors file; `shapes` gives names and shapes in the order of `tensors`.

    The format: eight bytes of length, a JSON header, the data (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes:
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.reshape(-1).numpy().data)


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """Give a weight's shape; ZeRO-3 leaves an empty tensor behind."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def whole(weight: torch.Tensor, *, modified: bool = False) -> AbstractContextManager[Any]:
    """Put a weight together on every rank while the context lasts, where ZeRO-3 has divided it.

    `modified`: rank 0 writes into it, and every rank has its share of that afterwards.
    """
    if not hasattr(weight, "ds_shape"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if modified else None)
