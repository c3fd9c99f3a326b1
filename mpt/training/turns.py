"""Rank 0 first, then the others: whoever prepares data writes it, and the others read what is there.

The others wait for a file of the attempt. A barrier of the process group would end after half an hour (transformers'
`ddp_timeout`), and a preparation may take hours. A rank that waits gives signs of life; rank 0 is judged by its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpt.training.progress import beat

WAIT_S = 0.1


@contextmanager
def rank_0_first(folder: Path, what: str, *, rank: int, world_size: int) -> Iterator[None]:
    """Let rank 0 run the block, and the others after it. Where it fails the launcher ends those that wait."""
    done = folder / f"done-{what}"
    if world_size == 1:
        yield
    elif rank == 0:
        yield
        done.touch()
    else:
        wait_for(done)
        yield


def wait_for(path: Path) -> None:
    """Wait until there is such a file or folder."""
    while not path.exists():
        beat()
        time.sleep(WAIT_S)
