"""The plug-in seam: a task is a module with these functions.

- `read_documents(plan, *, seed) -> Documents`: the rows to train on and those held out
- `texts(documents) -> Iterable[str]`: the training text, for a tokenizer that is trained on it
- `prepare_data(plan, documents, tokenizer) -> Samples`: tokenised samples
- `special_tokens(plan) -> tuple[str, ...]`, optional: tokens that a tokenizer trained for the run must have
- `ready_tokenizer(plan, documents, tokenizer) -> list[str]`, optional: changes the tokenizer in place, to what the task
  needs, before anything is tokenised; says what was changed. `documents` is None where a replay has none
- `build_model(plan, tokenizer, *, seed) -> PreTrainedModel`, with `from_data` too where `Samples.from_data` says
  anything
- `build_collator(plan, tokenizer)`: what turns samples into a batch
- `evaluation(plan) -> dict`, optional: `compute_metrics` and `preprocess_logits_for_metrics` for the Trainer, in the
  place of the plan's metrics (`mpt.training.metrics`)
- `MARKS_TEXT = True`, optional: a tokenizer that is trained for it has [CLS], [SEP] and [MASK], and no end of text
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.training import metrics
from mpt.training.data import Samples
from mpt.training.tasks.own_task import own_task

EVALUATION_KEYS = {"compute_metrics", "preprocess_logits_for_metrics"}


def task_module(task: str, folder: str | None = None) -> ModuleType:
    """Find a task's module: mpt's, or by a dotted path the user's own, which may lie in `folder`.

    Raises MptError for one of the user's that can't be imported or is no task.
    """
    return own_task(task, folder) if "." in task else import_module(f"mpt.training.tasks.{task}")


def special_tokens_of(task: ModuleType, plan: Plan) -> tuple[str, ...]:
    """Name the tokens that a task asks of a tokenizer that is trained for the run."""
    return tuple(task.special_tokens(plan)) if hasattr(task, "special_tokens") else ()


def ready_tokenizer(task: ModuleType, plan: Plan, documents: Any, tokenizer: Any) -> list[str]:
    """Let a task change the tokenizer in place; give its notices."""
    return list(task.ready_tokenizer(plan, documents, tokenizer)) if hasattr(task, "ready_tokenizer") else []


def evaluation_of(task: ModuleType, plan: Plan) -> dict[str, Any]:
    """Give the Trainer's keywords for the metrics of a task; none where the loss says it all.

    Raises MptError for a task of the user's own that gives others.
    """
    if not hasattr(task, "evaluation"):
        return metrics.evaluation(plan)
    given = dict(task.evaluation(plan))
    if odd := sorted(given.keys() - EVALUATION_KEYS):
        raise MptError(
            f"task: evaluation() of {task.__name__} gives {', '.join(odd)}",
            remedy=f"It may give {' and '.join(sorted(EVALUATION_KEYS))}.",
        )
    return given


def model_of(task: ModuleType, plan: Plan, tokenizer: Any, samples: Samples, *, seed: int) -> Any:
    """Build a task's model, with what the data says of it."""
    said = {"from_data": samples.from_data} if samples.from_data else {}
    return task.build_model(plan, tokenizer, seed=seed, **said)
