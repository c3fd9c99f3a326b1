"""What a task is judged by in evaluations: which metrics there are, which a recipe gets, and which way is better."""

from mpt.recipe.schema import Recipe
from mpt.terms import LANGUAGE_TASKS, Metric, Task

OF_CLASSES = (
    Metric.ACCURACY,
    Metric.F1,
    Metric.F1_MACRO,
    Metric.F1_WEIGHTED,
    Metric.PRECISION,
    Metric.RECALL,
    Metric.MATTHEWS,
)
OF_NUMBERS = (Metric.PEARSON, Metric.SPEARMAN, Metric.MSE, Metric.MAE)
OF_TOKENS = (Metric.PERPLEXITY, Metric.TOKEN_ACCURACY)
LESS_IS_BETTER = (Metric.PERPLEXITY, Metric.MSE, Metric.MAE)


def metrics_for(recipe: Recipe) -> tuple[Metric, ...]:
    """List the metrics that the recipe's task can be judged by; none of mpt's for a task of the user's own."""
    if recipe.task is Task.SEQUENCE_CLASSIFICATION:
        return OF_NUMBERS if recipe.data.labels == "regression" else OF_CLASSES
    return OF_TOKENS if recipe.task in LANGUAGE_TASKS else ()


def default_metrics(recipe: Recipe) -> tuple[Metric, ...]:
    """List those that a recipe gets which names none."""
    if recipe.task is Task.SEQUENCE_CLASSIFICATION:
        is_regression = recipe.data.labels == "regression"
        return (Metric.PEARSON, Metric.SPEARMAN) if is_regression else (Metric.ACCURACY, Metric.F1)
    return (Metric.PERPLEXITY,) if recipe.task in LANGUAGE_TASKS else ()


def metrics_of(recipe: Recipe) -> tuple[Metric, ...]:
    """List the metrics of a recipe: those that it names, each once, or its task's."""
    return default_metrics(recipe) if recipe.metrics is None else tuple(dict.fromkeys(recipe.metrics))


def is_less_better(metric: str) -> bool:
    """Whether the best checkpoint is the one where this is lowest; any loss is meant so.

    >>> [is_less_better(name) for name in ("eval_loss", "perplexity", "eval_accuracy", "mae")]
    [True, True, False, True]
    """
    name = metric.removeprefix("eval_")
    return name.endswith("loss") or name in LESS_IS_BETTER
