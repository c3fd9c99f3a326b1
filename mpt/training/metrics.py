"""The numbers of an evaluation beside its loss, by scikit-learn and scipy. Called by the session for every task.

What is kept of a batch until the end is as little as the metrics need: the logits of a classifier, which are few, and
of a language model two counts a sample.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpt.planning.plan import Plan
from mpt.terms import Metric, Task
from mpt.training.collation import IGNORED

# What the Trainer adds to the metrics of an evaluation: its loss, and how long it took.
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def evaluation(plan: Plan) -> dict[str, Any]:
    """Give the Trainer's keywords for the plan's metrics; none where the loss says it all."""
    metrics: list[str] = plan.value("metrics")
    if plan.value("task") == Task.SEQUENCE_CLASSIFICATION:
        if not metrics:
            return {}
        compute = of_numbers if plan.recipe.data.labels == "regression" else of_classes
        return {
            "compute_metrics": lambda prediction: compute(metrics, prediction.predictions, prediction.label_ids),
            "preprocess_logits_for_metrics": lambda logits, labels: first_of(logits),
        }
    if Metric.TOKEN_ACCURACY not in metrics:
        return {}  # perplexity follows from the loss (`mpt.training.trainer`)
    shift = plan.value("task") != Task.MASKED_LM
    return {
        "compute_metrics": lambda prediction: {Metric.TOKEN_ACCURACY.value: share(prediction.predictions)},
        "preprocess_logits_for_metrics": lambda logits, labels: count_right(first_of(logits), labels, shift=shift),
    }


def of_classes(metrics: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute metrics of a classifier. f1, precision and recall are those of the second class where there are two, and
    the mean over the classes otherwise; a class without predictions counts 0 there.

    >>> of_classes(["accuracy", "f1"], np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]]), np.array([0, 1, 0]))
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
    """
    from sklearn import metrics as sklearn

    count = logits.shape[-1]
    guessed = logits.argmax(-1)
    average: dict[str, Any] = {"average": "binary" if count == 2 else "macro", "zero_division": 0.0}
    if count != 2:
        average["labels"] = np.arange(count)  # one that the held-out rows lack counts too
    everywhere = {"labels": np.arange(count), "zero_division": 0.0}
    known: dict[str, Callable[[], float]] = {
        Metric.ACCURACY: lambda: sklearn.accuracy_score(labels, guessed),
        Metric.F1: lambda: sklearn.f1_score(labels, guessed, **average),
        Metric.F1_MACRO: lambda: sklearn.f1_score(labels, guessed, average="macro", **everywhere),
        Metric.F1_WEIGHTED: lambda: sklearn.f1_score(labels, guessed, average="weighted", **everywhere),
        Metric.PRECISION: lambda: sklearn.precision_score(labels, guessed, **average),
        Metric.RECALL: lambda: sklearn.recall_score(labels, guessed, **average),
        Metric.MATTHEWS: lambda: sklearn.matthews_corrcoef(labels, guessed),
    }
    return {name: float(known[name]()) for name in metrics}


def of_numbers(metrics: Sequence[str], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute metrics of a regression. A correlation with outputs that are all the same is not a number.

    >>> of_numbers(["mae", "mse"], np.array([[1.0], [2.0], [3.0]]), np.array([1.5, 2.5, 3.5]))
    {'mae': 0.5, 'mse': 0.25}
    """
    from scipy import stats
    from sklearn import metrics as sklearn

    given = outputs.reshape(len(labels)).astype(np.float64)
    wanted = labels.astype(np.float64)
    known: dict[str, Callable[[], float]] = {
        Metric.PEARSON: lambda: stats.pearsonr(wanted, given)[0] if len(wanted) > 1 else np.nan,
        Metric.SPEARMAN: lambda: stats.spearmanr(wanted, given)[0] if len(wanted) > 1 else np.nan,
        Metric.MSE: lambda: sklearn.mean_squared_error(wanted, given),
        Metric.MAE: lambda: sklearn.mean_absolute_error(wanted, given),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return {name: float(known[name]()) for name in metrics}


def first_of(logits: Any) -> torch.Tensor:
    """Some models give hidden states with their logits."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def count_right(logits: torch.Tensor, labels: torch.Tensor, *, shift: bool) -> torch.Tensor:
    """Count, a sample, the tokens guessed right and those asked for; `shift`: what is asked for is the next one."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    right = (logits.argmax(-1) == labels) & asked
    return torch.stack([right.sum(-1), asked.sum(-1)], dim=-1)


def share(counts: np.ndarray) -> float:
    """Give the share of the tokens that were guessed right, of `count_right`'s counts."""
    right, asked = counts.reshape(-1, 2).sum(axis=0).tolist()
    return right / asked if asked else float("nan")


def metrics_in(evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Pick the metrics beside the loss out of what an evaluation gives.

    >>> metrics_in({"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "epoch": 1.0})
    {'accuracy': 0.75}
    """
    named = {key.removeprefix("eval_"): value for key, value in evaluated.items() if key.startswith("eval_")}
    return {
        name: float(value)
        for name, value in named.items()
        if name not in ("loss", *TIMES) and isinstance(value, (int, float))
    }


def perplexity(loss: float) -> float:
    """Give exp(loss); of a loss beyond what a double can hold, infinity."""
    return math.exp(loss) if loss < 700 else math.inf
