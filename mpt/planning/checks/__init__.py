"""The preflight: what would quietly spoil or slow a run, from the plan and from what is known of the data. Pure.

To add a check: a code in `mpt.terms.Check`, a line in `MEANINGS`, and a function here that yields findings.
"""

from collections.abc import Iterator, Sequence

from mpt.errors import MptError
from mpt.planning.checks import of_data, of_plan
from mpt.planning.checks.data_facts import DataFacts
from mpt.planning.checks.finding import Finding, Severity, in_order
from mpt.planning.plan import Plan
from mpt.terms import Check

MEANINGS: dict[Check, str] = {
    Check.PLAN_REFUSED: "what `mpt plan` refuses: the recipe contradicts itself, the model or the machine",
    Check.DOES_NOT_FIT: "the plan needs more memory than there is",
    Check.NO_ENGINE: "what this version plans and can't train",
    Check.DATA_REFUSED: "the data or the tokenizer can't be read or used",
    Check.LEARNING_RATE: "a rate far from those reported for the method, the size and the optimizer",
    Check.POSITIONS: "samples shorter than mpt's default, because the model has no more positions",
    Check.DIMENSIONS: "sizes that are no multiples of 8 (fp8: 16), on a device with tensor cores",
    Check.SMALL_PASS: "passes of fewer than 2048 tokens, on a device with tensor cores",
    Check.VOCABULARY: "tokens without an embedding, or embeddings without a token",
    Check.END_OF_TEXT: "a tokenizer without an end-of-text token",
    Check.PADDING_TOKEN: "padded samples, and a tokenizer without a padding token",
    Check.CHAT_TEMPLATE: "conversations, and no chat template in the tokenizer or the recipe",
    Check.ANSWERS_UNMARKED: "a chat template without {% generation %}",
    Check.TRUNCATED: "samples cut at data.sequence_length, and the tokens lost",
    Check.NOTHING_LEARNT: "samples all of whose labels are masked",
    Check.EMPTY_ROWS: "rows without text",
    Check.DUPLICATE_ROWS: "rows that repeat an earlier one",
    Check.UNKNOWN_TOKENS: "text that the tokenizer has no tokens for",
    Check.EVALUATION_OVERLAP: "evaluation rows that stand in the training data too",
    Check.PADDING: "a fifth or more of the positions is padding, and other batches would leave less",
}
OF_PLAN = (of_plan.learning_rate, of_plan.positions, of_plan.dimensions, of_plan.small_pass)
OF_DATA = (
    of_data.nothing_learnt,
    of_data.vocabulary,
    of_data.unknown_tokens,
    of_data.evaluation_overlap,
    of_data.truncated,
    of_data.empty_rows,
    of_data.duplicate_rows,
    of_data.special_tokens,
    of_data.chat_template,
    of_data.padding,
)


def judge(plan: Plan, facts: DataFacts | None) -> tuple[Finding, ...]:
    """Say what there is to say of a plan that can be trained, and of its data where that is known; the worst first."""
    return in_order(list(_found(plan, facts)), plan.recipe.preflight.ignore)


def check_findings(findings: Sequence[Finding]) -> None:
    """Raise MptError with every finding that stops a run."""
    stopping = [finding for finding in findings if finding.stops]
    if not stopping:
        return
    listed = "; ".join(f"{finding.code}: {finding.problem}" for finding in stopping)
    remedies = " ".join(dict.fromkeys(finding.remedy for finding in stopping))
    codes = ", ".join(finding.code for finding in stopping)
    raise MptError(listed, remedy=f"{remedies} Or accept it with `preflight: {{ignore: [{codes}]}}`.")


def _found(plan: Plan, facts: DataFacts | None) -> Iterator[Finding]:
    for of_the_plan in OF_PLAN:
        yield from of_the_plan(plan)
    if facts is not None:
        for of_the_data in OF_DATA:
            yield from of_the_data(plan, facts)


__all__ = ["MEANINGS", "DataFacts", "Finding", "Severity", "check_findings", "judge"]
