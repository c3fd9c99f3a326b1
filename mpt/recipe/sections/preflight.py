"""What of a preflight's findings the author of a recipe accepts."""

from typing import Self

from pydantic import Field, model_validator

from mpt.recipe.sections.base import Section
from mpt.terms import Check

# Without a plan or data there is no run, whoever accepts that.
NEVER_ACCEPTED = (Check.PLAN_REFUSED, Check.DOES_NOT_FIT, Check.NO_ENGINE, Check.DATA_REFUSED)


class PreflightSection(Section):
    """What is looked at before a run: the plan, the data, the tokenizer. `mpt check` does the same without a run."""

    ignore: list[Check] = Field(default=[])
    """Codes of findings that are meant as they are: an error among them stops no run, and none is told again."""

    @model_validator(mode="after")
    def _can_be_accepted(self) -> Self:
        never = [code.value for code in self.ignore if code in NEVER_ACCEPTED]
        if never:
            raise ValueError(f"ignore names {', '.join(never)}, with which no run can start; leave it out")
        return self
