"""Which metrics an evaluation computes, whether the packages for them are here, and when they end a run. Pure."""

from typing import Any

from mpt.errors import UnsupportedError
from mpt.planning.decision import Decision, Origin
from mpt.recipe.metrics import metrics_of
from mpt.recipe.schema import Recipe
from mpt.terms import Metric

# The library that computes each of the others is at hand: perplexity and token accuracy are sums of ours.
NEEDS = {Metric.PERPLEXITY: "", Metric.TOKEN_ACCURACY: "", Metric.PEARSON: "scipy", Metric.SPEARMAN: "scipy"}


def choose_metrics(recipe: Recipe, packages: frozenset[str] | None) -> Decision[list[str]]:
    """Choose what is computed beside the loss. `packages` as in `resolve`.

    Raises UnsupportedError where one that a metric needs is missing.
    """
    metrics = metrics_of(recipe)
    needed = {metric: NEEDS.get(metric, "sklearn") for metric in metrics}
    missing = [
        metric for metric, package in needed.items() if package and packages is not None and package not in packages
    ]
    if missing:
        library = {"sklearn": "scikit-learn", "scipy": "scipy"}[needed[missing[0]]]
        raise UnsupportedError(
            f"metrics: {', '.join(missing)} need {library}, which is not installed",
            remedy="pip install 'mpt[classification]', or write `metrics: []` to be judged by the loss alone.",
        )
    if recipe.metrics is not None:
        return Decision([metric.value for metric in metrics], Origin.ASKED, "the recipe asks for them")
    reason = "what the task is usually judged by" if metrics else "the loss, and what the task computes itself"
    return Decision([metric.value for metric in metrics], Origin.AUTO, f"mpt's default: {reason}")


def best_metric(recipe: Recipe) -> str | None:
    """Name what the best checkpoint goes by; None where nothing asks for one."""
    asked = recipe.training_keys.get("metric_for_best_model")
    return "loss" if asked is None and recipe.early_stopping is not None else asked


def choose_early_stopping(recipe: Recipe) -> Decision[dict[str, Any] | None]:
    """Choose when a run ends before its steps are made: after so many evaluations without a gain, or never."""
    section = recipe.early_stopping
    if section is None:
        return Decision(None, Origin.AUTO, "only when asked")
    told = {"metric": best_metric(recipe), "patience": section.patience, "threshold": section.threshold}
    return Decision(told, Origin.ASKED, "the recipe's early_stopping")
