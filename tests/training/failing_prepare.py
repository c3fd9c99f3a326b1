"""A preparation that fails, in a module that costs little to import: processes of their own do."""

import os
import signal
from typing import Any

import datasets

from mpt.errors import MptError


class Failing:
    """Prepares nothing but trouble."""

    identity = ("failing",)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})

    def __init__(self, *, kills: bool) -> None:
        self.kills = kills

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Raise, or kill the process."""
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        raise MptError("a row is wrong", remedy="Mend it.")
