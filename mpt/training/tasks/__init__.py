"""The plug-in seam: a task is a module with `build_model`, `prepare_data` and `build_collator`."""

from types import ModuleType

from mpt.errors import UnsupportedError
from mpt.terms import Task


def task_module(task: str) -> ModuleType:
    """Find a task's module. Raises UnsupportedError for one that this mpt can't train."""
    if task == Task.CAUSAL_LM:
        from mpt.training.tasks import causal_lm

        return causal_lm
    raise UnsupportedError(f"task {task} can't be trained yet", remedy=f"This version trains `task: {Task.CAUSAL_LM}`.")
