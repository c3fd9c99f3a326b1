"""Checkpoints written while the training goes on: what is large is copied to the host's memory, and a thread writes the
copy. The training waits for the copy alone. `mpt.training.checkpointing` says when.

One save is under way at a time. A process that is killed meanwhile leaves a staging folder, as with any other save.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from mpt.errors import StorageError

Writes = list[Callable[[], None]]


@dataclass(slots=True)
class Pending:
    """A save that is under way: its step, and what is to be remembered of the moment. `future` is rank 0's alone."""

    step: int
    is_healthy: bool
    best: tuple[float | None, int | None]
    problem: StorageError | None = None
    future: "Future[StorageError | None] | None" = None


class Background:
    """The thread that writes, and the copies that it is given."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writes: Writes | None = None

    @property
    def is_copying(self) -> bool:
        """Whether a save asks for copies just now."""
        return self._writes is not None

    @contextmanager
    def copying(self) -> Iterator[Writes]:
        """Gather what `write_later` is given while the context lasts."""
        gathered: Writes = []
        self._writes = gathered
        try:
            yield gathered
        finally:
            self._writes = None

    def write_later(self, write: Callable[[Any], None], state: Any) -> None:
        """Copy a state's tensors to the host, and have `write` called with the copy, as often as that is tried.

        Raises StorageError where the host has no memory for it: then the training has to wait for the disk.
        """
        assert self._writes is not None, "nobody gathers"
        try:
            kept = copied(state)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise StorageError("no memory for a copy", remedy="Leave background_saving out.") from error
        # Some writers empty the dictionary that they are given (save_pretrained does).
        self._writes.append(lambda: write(tree_map(_same, kept)))

    def submit(self, job: Callable[[], StorageError | None]) -> "Future[StorageError | None]":
        """Have the thread do a job; what it raises comes out of the future."""
        return self._thread.submit(job)


def copied(state: Any) -> Any:
    """Copy every tensor of a nested state to the host's memory. Tensors that were one stay one: tied weights."""
    seen: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if type(value) not in (torch.Tensor, torch.nn.Parameter):  # torchao's quantised states have no storage to know
            return value.detach().to("cpu", copy=True)
        place = (value.untyped_storage()._cdata, value.storage_offset())
        key = (*place, value.dtype, value.shape, value.stride())
        if key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]

    return tree_map(copy, state)


def _same(value: Any) -> Any:
    return value


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Give the model's state; of a model with adapters, only what is trained: the rest is the checkpoint's it stands
    on."""
    state: dict[str, torch.Tensor] = model.state_dict()
    if not hasattr(model, "peft_config"):
        return state
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}
