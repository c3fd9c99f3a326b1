"""Findings that follow from the data and the tokenizer. Pure: facts in, findings out.

The thresholds are mpt's: a note says that it happens at all, a warning that it may tell in the result, an error that
the run can't come to what it is meant to.
"""

from collections.abc import Iterator

from mpt.planning.checks.data_facts import Count, DataFacts
from mpt.planning.checks.finding import Finding, Severity
from mpt.planning.plan import Plan
from mpt.terms import Check, Task

NOTABLE = 0.05
"""A share of samples, or of tokens, that a result may depend on."""
FEW = 0.01
SOME = 10
WRONG_TOKENIZER = 0.1
LARGE_PADDING = 0.2
WORTH_PACKING = 0.1
WIDE_VOCABULARY = 1.25


def truncated(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Samples that were cut, and what was lost with that."""
    if not facts.truncated.count:
        return
    lost = Count(facts.lost_tokens or 0, facts.tokens + (facts.lost_tokens or 0))
    told = "" if facts.lost_tokens is None else f": {lost} tokens are lost"
    is_much = facts.truncated.share >= NOTABLE or lost.share >= NOTABLE
    limit, room = plan.value("sequence_length"), plan.facts.max_positions
    longer = 2 * limit if room is None else min(2 * limit, room)
    keys = {"data.sequence_length": longer} if longer > limit else {}
    yield Finding(
        Check.TRUNCATED,
        Severity.WARNING if is_much else Severity.NOTE,
        f"{facts.truncated} samples are longer than {limit} tokens and are cut{told}",
        "Make samples longer, or divide long documents before." if keys else "Divide long documents before.",
        facts.truncated.examples,
        keys,
    )


def nothing_learnt(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Samples all of whose labels are masked."""
    found = facts.nothing_learnt
    if not found.count:
        return
    if found.count == found.of:
        severity, said = Severity.ERROR, "no sample has anything to learn: every label is masked"
    else:
        severity = Severity.WARNING if found.share >= FEW else Severity.NOTE
        said = f"{found} samples have nothing to learn: every label is masked"
    yield Finding(
        Check.NOTHING_LEARNT,
        severity,
        said,
        "The answers may lie behind the cut: make samples longer, or see what data.train_on learns from.",
        found.examples,
        {"data.sequence_length": 2 * plan.value("sequence_length")} if facts.truncated.count else {},
    )


def empty_rows(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Rows without a visible character, which are left out."""
    if facts.empty.count:
        yield Finding(
            Check.EMPTY_ROWS,
            Severity.WARNING if facts.empty.share >= NOTABLE else Severity.NOTE,
            f"{facts.empty} rows are empty and are left out",
            "Remove them, or look why they are empty.",
            facts.empty.examples,
        )


def duplicate_rows(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Rows that repeat another, which are learnt as often as they stand there (Lee et al. 2022, arXiv:2107.06499)."""
    if facts.duplicates.count:
        yield Finding(
            Check.DUPLICATE_ROWS,
            Severity.WARNING if facts.duplicates.share >= FEW and facts.duplicates.count >= SOME else Severity.NOTE,
            f"{facts.duplicates} rows repeat an earlier one: they are learnt as often, and by heart",
            "Remove the repetitions, unless their weight is meant.",
            facts.duplicates.examples,
        )


def unknown_tokens(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Text that the tokenizer has no tokens for."""
    if not facts.unknown.count:
        return
    is_wrong = facts.unknown.share >= WRONG_TOKENIZER
    yield Finding(
        Check.UNKNOWN_TOKENS,
        Severity.ERROR if is_wrong else Severity.WARNING if facts.unknown.share >= 0.001 else Severity.NOTE,
        f"{facts.unknown} tokens are the unknown one: what stood there can't be learnt",
        "Take a tokenizer that knows this script or language, or mend the text's encoding.",
        facts.unknown.examples,
    )


def vocabulary(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """A tokenizer that is not the model's."""
    size, rows = facts.tokenizer.size, plan.facts.vocab_size
    is_from_scratch = plan.recipe.model.config is not None
    mend = {"model.config.vocab_size": size} if is_from_scratch else {}
    if facts.highest_token >= rows:
        yield Finding(
            Check.VOCABULARY,
            Severity.ERROR,
            f"the data holds token {facts.highest_token}, and the model has {rows} embeddings: the first such token "
            "ends the run",
            "Take the model's own tokenizer (leave `tokenizer:` out)." if not mend else "Make the model's larger.",
            (f"the tokenizer has {size} tokens",),
            mend,
        )
    elif size > rows:
        yield Finding(
            Check.VOCABULARY,
            Severity.WARNING,
            f"the tokenizer has {size} tokens and the model {rows} embeddings; this data uses none beyond",
            "Is this the model's tokenizer? Text with such a token would end the run.",
            recipe=mend,
        )
    elif is_from_scratch and rows > WIDE_VOCABULARY * size:
        idle = (rows - size) * plan.facts.hidden_size / 1e6
        yield Finding(
            Check.VOCABULARY,
            Severity.NOTE,
            f"the model has {rows} embeddings and the tokenizer {size} tokens: {idle:.1f} million parameters learn "
            "nothing",
            "Make the one as large as the other.",
            recipe=_vocabulary_keys(plan, size),
        )


def _vocabulary_keys(plan: Plan, size: int) -> dict[str, str | int]:
    """Say how a model from scratch gets as many embeddings as its tokenizer has tokens."""
    tokenizer = plan.recipe.tokenizer
    if tokenizer is not None and tokenizer.train is None:
        return {"model.config.vocab_size": size}
    return {"tokenizer.train": "byte_level_bpe", "tokenizer.vocab_size": size}


def special_tokens(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """A tokenizer without an end, or without padding."""
    if plan.value("task") in (Task.CAUSAL_LM, Task.SFT) and facts.tokenizer.eos_id is None:
        yield Finding(
            Check.END_OF_TEXT,
            Severity.WARNING,
            "the tokenizer has no end-of-text token: the model never learns to stop, and documents follow one another "
            "unmarked",
            "Take a tokenizer whose tokenizer_config.json names an eos_token.",
        )
    if facts.padding and facts.tokenizer.pad_id is None and plan.value("packing") in (False, "none"):
        yield Finding(
            Check.PADDING_TOKEN,
            Severity.NOTE,
            "the tokenizer has no padding token; another one stands in padded places, masked from attention and loss",
            "Nothing. A pad_token in the tokenizer's tokenizer_config.json would be taken.",
        )


def chat_template(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Conversations that are written in a form the model may not know."""
    tokenizer = facts.tokenizer
    is_from_scratch = plan.recipe.model.config is not None  # it will know the template that it is taught
    if tokenizer.has_template is False and plan.recipe.data.chat_template is None and not is_from_scratch:
        yield Finding(
            Check.CHAT_TEMPLATE,
            Severity.WARNING,
            f"the tokenizer has no chat template, and the recipe names none: conversations are written as "
            f"{tokenizer.template or 'text'}",
            "Say so in the recipe, or name the template that the model was trained with.",
            recipe={} if tokenizer.template is None else {"data.chat_template": tokenizer.template},
        )
    if tokenizer.marks_answers is False:
        yield Finding(
            Check.ANSWERS_UNMARKED,
            Severity.NOTE,
            "the chat template marks no answers with {% generation %}: they are found by writing each conversation in "
            "part, which takes longer",
            "Nothing; a template with {% generation %} around the answers says it itself.",
        )


def evaluation_overlap(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Evaluation rows that training has too (Lee et al. 2022, section 6: they flatter the model)."""
    found = facts.overlap
    if found is None or not found.count:
        return
    # A few rows that are held out by chance, from data that repeats itself, are no mistake of the recipe.
    is_given = plan.recipe.data.eval_source is not None or plan.recipe.data.eval_split is not None
    is_worthless = found.share >= 0.5 and (is_given or found.count >= SOME)
    yield Finding(
        Check.EVALUATION_OVERLAP,
        Severity.ERROR if is_worthless else Severity.WARNING if found.share >= FEW else Severity.NOTE,
        f"{found} rows of the evaluation stand in the training data too: the evaluation loss flatters the model",
        "Remove them from one of the two"
        + (", or leave data.eval_source out: a part of the training data is held out then." if is_given else "."),
        found.examples,
    )


def padding(plan: Plan, facts: DataFacts) -> Iterator[Finding]:
    """Positions that are computed for nothing, and what other batches would leave of them."""
    shares = facts.padding
    now, best_fit = shares.get("now", 0.0), shares.get("best_fit")
    if now < LARGE_PADDING or best_fit is None or now - best_fit < WORTH_PACKING:
        return
    can_pack = plan.value("task") in (Task.CAUSAL_LM, Task.SFT)
    other = best_fit if can_pack else shares.get("grouped", now)
    if now - other < WORTH_PACKING:
        return
    keys = {"data.packing": "best_fit"} if can_pack else {"training.train_sampling_strategy": "group_by_length"}
    how = "packing" if can_pack else "batches of like length"
    yield Finding(
        Check.PADDING,
        Severity.WARNING,
        f"{now:.0%} of the positions are padding; {how} would leave {other:.0%}: {(1 - other) / (1 - now):.1f} times "
        "the tokens a second",
        "Pack whole documents, which do not see one another."
        if can_pack
        else "Let samples of like length share a batch.",
        recipe=keys,
    )
