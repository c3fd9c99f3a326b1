"""A task of the user's own: a module that is named by its dotted path, with the functions that a task has.

It is looked for as Python looks, and then in the recipe's folder and where mpt was started. What is wrong with it is
one message: no such module, an error in it, or a function that it lacks.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mpt.errors import MptError

NEEDED = ("read_documents", "prepare_data", "build_model", "build_collator")


def own_task(name: str, folder: str | None) -> ModuleType:
    """Import the module. Raises MptError where it can't be, or is no task."""
    for place in (folder, str(Path.cwd())):
        if place is not None and place not in sys.path:
            sys.path.append(place)  # last: a user's file named as a library must not stand in its place
    looked_in = " and ".join(dict.fromkeys(filter(None, (folder, str(Path.cwd())))))
    with _explained(name, looked_in):
        module = import_module(name)
    missing = [function for function in NEEDED if not callable(getattr(module, function, None))]
    if missing:
        raise MptError(
            f"task: {getattr(module, '__file__', None) or name} has no {', '.join(missing)}",
            remedy="A task is a module with the functions that the README lists under `A task of your own`.",
        )
    return module


@contextmanager
def _explained(name: str, looked_in: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise MptError(
                f"task: there is no module {name}",
                remedy=f"mpt looked in PYTHONPATH, {looked_in}: a.b is a/b.py there. mpt's own tasks have no dot.",
            ) from error
        raise _broken(name, error) from error
    except Exception as error:  # the user's code may raise anything
        traceback.print_exc()
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> MptError:
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((one for one in reversed(frames) if "importlib" not in one.filename), frames[-1])
        where = f"{frame.filename}:{frame.lineno}"
    said = " ".join(str(error).split())[:300]
    return MptError(
        f"task: {name} can't be imported: {where}: {type(error).__name__}: {said}", remedy="Mend that line."
    )
