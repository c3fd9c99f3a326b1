"""The plug-in seam: a task is a module with these functions.

- `read_documents(plan, *, seed) -> Documents`: the rows to train on and those held out
- `texts(documents) -> Iterable[str]`: the training text, for a tokenizer that is trained on it
- `prepare_data(plan, documents, tokenizer) -> Samples`: tokenised samples
- `build_model(plan, tokenizer, *, seed) -> PreTrainedModel`
- `build_collator(plan, tokenizer)`: what turns samples into a batch
- `evaluation(plan) -> dict`, optional: `compute_metrics` and `preprocess_logits_for_metrics` for the Trainer
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from mpt.planning.plan import Plan


def task_module(task: str) -> ModuleType:
    """Find a task's module; `mpt.planning.engines` has refused what has none."""
    return import_module(f"mpt.training.tasks.{task}")


def evaluation_of(task: ModuleType, plan: Plan) -> dict[str, Any]:
    """Give the Trainer's keywords for the metrics of a task; none where the loss says it all."""
    return dict(task.evaluation(plan)) if hasattr(task, "evaluation") else {}
