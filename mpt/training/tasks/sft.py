"""Supervised fine-tuning: a causal language model on conversations, which learns the answers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpt.planning.plan import Plan
from mpt.recipe.chat_template import BUILT_IN, control_tokens, read_template
from mpt.terms import Method, Packing
from mpt.training import chat_format, collation
from mpt.training.conversation_rows import CONVERSATION, read_conversations
from mpt.training.conversation_samples import prepare_conversations
from mpt.training.data import Documents, Samples, pack_apart
from mpt.training.mixture import read_parts
from mpt.training.model import build_causal_lm


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Build the model, its weights drawn from `seed` where it is from scratch."""
    return build_causal_lm(plan, tokenizer, seed=seed)


def read_documents(plan: Plan, *, seed: int) -> Documents:
    """Read the conversations, and hold out what is evaluated on; `seed` divides them."""
    return read_parts(plan.recipe.data, read_conversations, seed=seed)


def texts(documents: Documents) -> Iterator[str]:
    """Give the training text, a turn at a time."""
    for row in documents.train:
        conversation = json.loads(row[CONVERSATION])
        yield from conversation.get("text", ())
        yield from (message["content"] for message in conversation.get("messages", ()) if "content" in message)


def special_tokens(plan: Plan) -> tuple[str, ...]:
    """Name the tokens that a tokenizer which is trained for the run must have, for its chat template."""
    asked = plan.recipe.data.chat_template or chat_format.DEFAULT
    return BUILT_IN[asked] if asked in BUILT_IN else control_tokens(read_template(asked))


def ready_tokenizer(plan: Plan, documents: Documents | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give the tokenizer its chat template; say what was changed. Texts that are taken as they stand need none."""
    if documents is not None and not _has_messages(documents) and plan.recipe.data.chat_template is None:
        if tokenizer.eos_token is None:
            return ["the tokenizer has no end-of-text token: a completion is learnt without an end"]
        return []
    return chat_format.ready_tokenizer(
        tokenizer,
        plan.recipe.data.chat_template,
        vocab_size=plan.facts.vocab_size,
        learns_tokens=_learns_tokens(plan),
    )


def prepare_data(plan: Plan, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Tokenise the conversations, with labels for what is learnt."""
    samples = prepare_conversations(
        documents,
        tokenizer,
        sequence_length=plan.value("sequence_length"),
        train_on=plan.recipe.data.train_on,
        source=", ".join(plan.recipe.data.source_names),
        workers=plan.value("data_workers"),
    )
    samples = replace(samples, is_chat=_has_messages(documents))
    return pack_apart(samples, plan.value("sequence_length")) if plan.value("packing") == Packing.BEST_FIT else samples


def build_collator(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, Any]]:
    """Build what turns samples into a batch."""
    return collation.build_collator(plan, tokenizer)


def _learns_tokens(plan: Plan) -> bool:
    """Whether the tables of the tokens are trained: with every weight, or whole beside adapters."""
    if plan.value("method") == Method.FULL:
        return True
    saved = {name.rpartition(".")[2] for name in plan.recipe.lora.modules_to_save} if plan.recipe.lora else set()
    return bool(saved & {"embed_tokens", "wte", "embed_in"}) and (
        plan.facts.tied_embeddings or bool(saved & {"lm_head", "embed_out"})
    )


def _has_messages(documents: Documents) -> bool:
    """Whether there are conversations for a template to write, beside texts that are taken as they stand."""
    if not isinstance(documents.train, datasets.Dataset):
        return any("messages" in json.loads(row[CONVERSATION]) for row in islice(documents.train, 100))
    return bool(pc.any(pc.starts_with(documents.train.data.column(CONVERSATION), '{"messages"')).as_py())
