"""Guessing the tokens that are hidden from it: a model that reads in both directions, on text (Devlin et al. 2019)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.training.data import Documents, Samples, prepare_samples
from mpt.training.masking import FixedMasks, MaskedCollator, mask_one
from mpt.training.model import build_with_head
from mpt.training.tasks import causal_lm

MARKS_TEXT = True
EVALUATION_SEED = 0


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Build the model, its weights drawn from `seed` where it is from scratch."""
    keys = {} if plan.recipe.model.config is None else {"pad_token_id": tokenizer.pad_token_id}
    return build_with_head(AutoModelForMaskedLM, plan, tokenizer, seed=seed, keys=keys)


def read_documents(plan: Plan, *, seed: int) -> Documents:
    """Read the text, and hold out what is evaluated on; `seed` divides it."""
    return causal_lm.read_documents(plan, seed=seed)


def texts(documents: Documents) -> Iterator[str]:
    """Give the training text, a document at a time."""
    return causal_lm.texts(documents)


def prepare_data(plan: Plan, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Tokenise the documents and cut them into samples; those to evaluate on are masked once and for all.

    Raises MptError for a tokenizer without a mask or a padding token.
    """
    for token in ("mask_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise MptError(
                f"masked_lm needs a tokenizer with a {token}, and {tokenizer.name_or_path or 'this one'} has none",
                remedy="Take the tokenizer of a model such as BERT or RoBERTa, or have one trained: "
                "`tokenizer: {train: byte_level_bpe}` with a model.config.",
            )
    samples = prepare_samples(
        documents,
        tokenizer,
        sequence_length=plan.value("sequence_length"),
        packing=plan.value("packing"),
        workers=plan.value("data_workers"),
        source=", ".join(plan.recipe.data.source_names),
        marks_text=True,
    )
    if samples.held_out is None:
        return samples
    collator = build_collator(plan, tokenizer)
    if has_length(samples.held_out):
        return replace(samples, held_out=FixedMasks(samples.held_out, collator, EVALUATION_SEED))
    mask = partial(mask_one, collator=collator, seed=EVALUATION_SEED)
    return replace(samples, held_out=samples.held_out.map(mask, with_indices=True))


def build_collator(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> MaskedCollator:
    """Build what turns samples into a batch, masked."""
    return MaskedCollator(
        tokenizer,
        plan.recipe.data.mask_probability,
        multiple=plan.value("pad_to_multiple_of"),
        limit=plan.value("sequence_length"),
    )
