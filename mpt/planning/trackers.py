"""Where the numbers of a run go besides its own directory: decided with what is installed, before anything starts."""

from typing import Any

from mpt.errors import UnsupportedError
from mpt.planning.decision import Decision, Origin
from mpt.recipe.schema import Recipe
from mpt.recipe.trackers import TRACKERS, asked_trackers


def choose_trackers(recipe: Recipe, packages: frozenset[str] | None) -> Decision[list[str]]:
    """Name the trackers; `packages` None: nobody knows what is installed (a named machine).

    Raises UnsupportedError for one whose package is missing.
    """
    asked = asked_trackers(recipe)
    if not asked:
        return Decision([], Origin.AUTO, "the run's own directory alone; training.report_to names trackers")
    if asked == ["all"]:
        if packages is None:
            return Decision(["tensorboard"], Origin.DERIVED, "all: mpt[train] brings it, the rest nobody knows")
        there = [name for name, tracker in TRACKERS.items() if tracker.packages and packages >= set(tracker.packages)]
        return Decision(there, Origin.DERIVED, "all: those that are installed")
    for name in asked:
        missing = sorted(set(TRACKERS[name].packages) - packages) if packages is not None else []
        if missing:
            raise UnsupportedError(
                f"training.report_to asks for {name}, and {', '.join(missing)} is not installed",
                remedy=f"pip install {TRACKERS[name].requirement}, or leave {name} out of training.report_to.",
            )
    return Decision(asked, Origin.ASKED, "the recipe's training.report_to")


def tracker_arguments(trackers: list[str], recipe: Recipe, name: str) -> dict[str, Any]:
    """Give the keywords of TrainingArguments: the list, and the run's name, which trackers show."""
    if not trackers:
        return {"report_to": "none"}
    return {"report_to": trackers, "run_name": recipe.training_keys.get("run_name") or name}
