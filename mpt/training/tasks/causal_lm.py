"""Next-token prediction: a causal language model on text."""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpt.planning.plan import Plan
from mpt.training import collation, data
from mpt.training.data import Documents, Samples, prepare_samples
from mpt.training.mixture import read_parts
from mpt.training.model import build_causal_lm
from mpt.training.row_files import TEXT


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Build the model, its weights drawn from `seed` where it is from scratch."""
    return build_causal_lm(plan, tokenizer, seed=seed)


def read_documents(plan: Plan, *, seed: int) -> Documents:
    """Read the text, and hold out what is evaluated on; `seed` divides it."""
    section = plan.recipe.data
    if section.has_plain_sources:
        return data.read_documents(section, seed=seed)
    return read_parts(section, data.read_texts, seed=seed)


def texts(documents: Documents) -> Iterator[str]:
    """Give the training text, a document at a time."""
    return (row[TEXT] for row in documents.train)


def prepare_data(plan: Plan, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Tokenise the documents and cut them into samples."""
    return prepare_samples(
        documents,
        tokenizer,
        sequence_length=plan.value("sequence_length"),
        packing=plan.value("packing"),
        workers=plan.value("data_workers"),
        source=", ".join(plan.recipe.data.source_names),
    )


def build_collator(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, Any]]:
    """Build what turns samples into a batch."""
    return collation.build_collator(plan, tokenizer)
