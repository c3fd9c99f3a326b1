"""An incident's step made again: its batches in the place of the data, its weights in the place of the model's.

An attempt that was asked for it (`mpt.running.measured`) sets up engine, precision and model as its plan says, and is
handed by this what the incident holds. What follows is the run's own code: the same forward and backward passes, the
same verdict, the same autopsy.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mpt.errors import StorageError
from mpt.training.incidents import ITEMS, RANDOM_STATE, step_file, weights_file
from mpt.training.random_state import set_random_state
from mpt.training.tensor_file import whole


class Replay:
    """What a rank is given of an incident. Raises StorageError for one that this rank has nothing of."""

    def __init__(self, incident: Path, rank: int) -> None:
        file = incident / step_file(rank)
        if not file.exists():
            raise StorageError(f"{incident} has no {file.name}", remedy="Replay it under the run's own plan.")
        self._weights = weights_file(incident)
        kept = load_file(file)
        self._items = kept.pop(ITEMS, None)
        kinds = [key for key in kept if key.startswith(RANDOM_STATE)]
        self._random_state = {key.removeprefix(RANDOM_STATE): kept.pop(key) for key in kinds}
        self._batches: list[dict[str, torch.Tensor]] = []
        for key in sorted(kept, key=lambda key: int(key.partition("/")[0])):
            number, _, name = key.partition("/")
            if int(number) == len(self._batches):
                self._batches.append({})
            self._batches[int(number)][name] = kept[key]

    def samples(self, count: int) -> Sequence[dict[str, torch.Tensor]]:
        """Give as many samples as the Trainer needs to begin; it computes on none of them."""
        return [{"input_ids": self._batches[0]["input_ids"][0]}] * count

    def take(self, device: torch.device) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """Give the step's micro batches and its number of labels, and set torch's random state as it was."""
        set_random_state(self._random_state, device)
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in self._batches]
        return batches, None if self._items is None else self._items.to(device)

    def load_weights(self, model: torch.nn.Module) -> None:
        """Set the trained weights as they were; every rank calls it. The narrower dtypes round nothing: the file's
        numbers were theirs."""
        named = dict(model.named_parameters())
        with safe_open(self._weights, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                with whole(named[name], modified=True):
                    if named[name].numel():
                        named[name].copy_(file.get_tensor(name))
