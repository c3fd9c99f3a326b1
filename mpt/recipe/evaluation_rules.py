"""Rules across keys about labels and what an evaluation computes. Called by `mpt.recipe.rules`."""

from collections.abc import Iterator

from mpt.recipe.metrics import OF_NUMBERS, metrics_for, metrics_of
from mpt.recipe.schema import Recipe
from mpt.recipe.yaml_tree import Flaw
from mpt.terms import Task


def labels_fit(recipe: Recipe) -> Iterator[Flaw]:
    """A classifier's rows have labels, in a column of their own, and no more of them than the model is told."""
    if recipe.task is not Task.SEQUENCE_CLASSIFICATION:
        return
    data, config = recipe.data, recipe.model.config or {}
    if data.streaming:
        yield Flaw(("data", "streaming"), "the classes are counted before the training begins", "leave it out")
    for key, sources in (("source", data.source_names), ("eval_source", data.eval_source_names)):
        for source in sources:
            if source.startswith("builtin:") or source.lower().endswith((".txt", ".md")):
                yield Flaw(
                    ("data", key), f"{source} has no labels", "name .jsonl, .json, .csv or .parquet files, or hub:..."
                )
    columns = [key for key in (data.text_column, data.text_pair_column, data.label_column) if key is not None]
    if len(set(columns)) < len(columns):
        yield Flaw(
            ("data", "label_column"),
            f"text_column, text_pair_column and label_column are three columns, and here {', '.join(columns)}",
            "name each its own",
        )
    count, is_regression = config.get("num_labels"), data.labels == "regression"
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        yield Flaw(("model", "config", "num_labels"), f"is {count!r}", "write a whole number above 1, or leave it out")
    elif count is not None and (count == 1) != is_regression:
        yield Flaw(
            ("model", "config", "num_labels"),
            f"{count} is for {'regression' if count == 1 else 'classes'}, and data.labels is {data.labels}",
            "leave num_labels out, or set `data.labels: " + ("regression`" if count == 1 else "classes`"),
        )
    if is_regression and recipe.training_keys.get("label_smoothing_factor"):
        yield Flaw(
            ("training", "label_smoothing_factor"), "smooths classes, and data.labels is regression", "remove it"
        )


def early_stopping_evaluates(recipe: Recipe) -> Iterator[Flaw]:
    """Nothing is known of a gain without evaluations, nor of the best one without a step that is saved."""
    if recipe.early_stopping is not None and recipe.training_keys.get("eval_strategy", "no") == "no":
        yield Flaw(
            ("early_stopping",),
            "goes by evaluations, and training.eval_strategy is no",
            "set training.eval_strategy to steps or epoch",
        )


def metrics_fit(recipe: Recipe) -> Iterator[Flaw]:
    """A metric is one of the task's, and what the best checkpoint goes by is computed."""
    allowed = metrics_for(recipe)
    for index, metric in enumerate(recipe.metrics or ()):
        if metric not in allowed:
            what = "regression" if allowed == OF_NUMBERS else recipe.task
            yield Flaw(
                ("metrics", index),
                f"{metric} does not judge {what}",
                f"write {', '.join(allowed)}" if allowed else "leave metrics out: the task computes its own",
            )
    best = recipe.training_keys.get("metric_for_best_model")
    if best is None or not allowed:
        return
    computed = ["loss", *(metric.value for metric in metrics_of(recipe))]
    if best.removeprefix("eval_") not in computed:
        yield Flaw(
            ("training", "metric_for_best_model"),
            f"{best} is not among what is computed: {', '.join(computed)}",
            "name one of these, or add it to `metrics:`",
        )
