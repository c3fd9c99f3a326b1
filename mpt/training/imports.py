"""Importing torch and transformers, and leaving a process that has, without looking for garbage: there is none.

Their million objects are looked through again and again while they are made, and twice more when the interpreter ends:
3 of the 10 seconds of CPU that such a process takes to start and to end (torch 2.13, transformers 5.23, AMD EPYC).
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Collect nothing meanwhile, and never look at what was imported again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(status: int) -> NoReturn:
    """Exit; what runs at the exit runs, and what is unreachable by then is left to the kernel."""
    gc.freeze()
    sys.exit(status)
