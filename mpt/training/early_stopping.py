"""The end of a training that no longer gets better: transformers' own callback, whose count survives an interruption.

transformers restores a callback's state only where it may replace the callback with one that has the old settings
(`restore_callback_states_from_checkpoint`); here the plan's settings stand, and the count alone is taken over.
"""

from typing import Any

from transformers import EarlyStoppingCallback

from mpt.planning.plan import Plan


class EarlyStop(EarlyStoppingCallback):
    """Counts the evaluations in a row that were no better than the best, and stops the training at the limit."""

    @classmethod
    def of(cls, plan: Plan) -> "EarlyStop | None":
        """Make the plan's; None where it has none."""
        asked = plan.value("early_stopping")
        return None if asked is None else cls(asked["patience"], asked["threshold"])

    @property
    def is_reached(self) -> bool:
        """Whether the training is over."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        kept = kept[0] if isinstance(kept, list) else kept
        self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)

    def told(self, args: Any, state: Any) -> dict[str, Any]:
        """Say why it has stopped: the metric, its best value, and the step and patience of that."""
        metric = args.metric_for_best_model.removeprefix("eval_")
        best, step = state.best_metric, state.best_global_step
        return {"metric": metric, "best": best, "best_step": step, "patience": self.early_stopping_patience}
