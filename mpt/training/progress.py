"""Signs of life while data is prepared: whoever reads or tokenises says `beat()`, the session says who hears it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)


def beat() -> None:
    """Say that the preparation goes on; nobody may be listening."""
    listener = _listener.get()
    if listener is not None:
        listener()


@contextmanager
def heard_by(listener: Callable[[], None]) -> Iterator[None]:
    """Let `listener` be called at each sign of life."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
