"""What evaluations decide."""

from typing import Annotated

from pydantic import Field

from mpt.recipe.scalars import Number
from mpt.recipe.sections.base import PositiveInt, Section


class EarlyStoppingSection(Section):
    """End the training where evaluations show no more gain. Needs `training.eval_strategy`."""

    patience: PositiveInt = 3
    """Evaluations in a row without a new best value of `training.metric_for_best_model` (the evaluation loss where that
    is left out), after which the run is finished."""
    threshold: Annotated[Number, Field(ge=0)] = 0.0
    """How much better than the best a value must be to count as a gain."""
