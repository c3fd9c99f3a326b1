"""Prepare a run's data: read, tokenise and, where it is a stream, let it begin again. Called by the session and by
`mpt.training.check`, so that a preflight looks at what is trained on."""

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from transformers import TrainingArguments

from mpt.planning.padding import describe
from mpt.planning.plan import Plan
from mpt.recipe.rules import groups_by_length
from mpt.running.data_record import record
from mpt.running.from_data import keep_from_data
from mpt.running.journal import Journal
from mpt.running.run_directory import AttemptDirectory, RunDirectory
from mpt.terms import Task
from mpt.training.cache import digest
from mpt.training.data_facts import padding_of
from mpt.training.fingerprint import fingerprint
from mpt.training.preflight import Prepared
from mpt.training.repeated_stream import RepeatedStream, Resume
from mpt.training.tasks import ready_tokenizer, special_tokens_of
from mpt.training.tokenizer import is_trained, load_tokenizer, trained_tokenizer
from mpt.training.trainer import data_seed
from mpt.training.turns import rank_0_first


def prepare(
    plan: Plan,
    run: RunDirectory,
    attempt: AttemptDirectory,
    arguments: TrainingArguments,
    journal: Journal,
    task: ModuleType,
) -> Prepared:
    """Read the text, load or train the tokenizer, and tokenise: rank 0 first, the others from its cache."""
    in_turn = partial(rank_0_first, attempt.path, rank=arguments.process_index, world_size=arguments.world_size)
    with in_turn("reading"):
        documents = task.read_documents(plan, seed=data_seed(arguments))
        if not is_trained(plan.recipe):
            tokenizer = load_tokenizer(plan.recipe)
    if is_trained(plan.recipe):
        section = plan.recipe.tokenizer
        asked = section.vocab_size if section is not None else plan.facts.vocab_size
        tokenizer = trained_tokenizer(
            run.path / "tokenizer",
            lambda: task.texts(documents),
            asked,
            is_writer=arguments.process_index == 0,
            marks_text=getattr(task, "MARKS_TEXT", False),
            special_tokens=special_tokens_of(task, plan),
        )
        if len(tokenizer) < asked and arguments.process_index == 0:
            journal.append(
                "notice",
                text=f"the text yields {len(tokenizer)} tokenizer entries of {asked}; the model keeps its planned size",
            )
    had_template = tokenizer.chat_template is not None
    told = ready_tokenizer(task, plan, documents, tokenizer)
    with in_turn("tokenising"):
        samples = task.prepare_data(plan, documents, tokenizer)
    if plan.recipe.data.streaming:
        known = fingerprint(plan.recipe.data, documents, samples, tokenizer)
        draws = getattr(task.build_collator(plan, tokenizer), "draws_random_numbers", True)
        samples = replace(samples, train=_repeated(plan, run, arguments, samples.train, known, draws_numbers=draws))
    found = None
    if arguments.process_index == 0:
        keep_from_data(run, samples.from_data)
        found = fingerprint(plan.recipe.data, documents, samples, tokenizer)
        record(run, journal, found)
        for notice in (*told, *samples.notices):
            journal.append("notice", text=notice)
        tell_padding(plan, samples.train, journal)
    return Prepared(tokenizer, documents, samples, had_template, found)


def tell_padding(plan: Plan, samples: Any, journal: Journal) -> None:
    """Say how much of the batches is padding, by the real lengths, and what other ways to make them would leave."""
    shares = padding_of(plan, samples)
    if shares is None:
        return
    is_grouped, padding_free = groups_by_length(plan.recipe), plan.value("padding_free")
    can_pack = plan.value("task") in (Task.CAUSAL_LM, Task.SFT)
    told = describe(shares, plan.value("packing"), is_grouped=is_grouped, padding_free=padding_free, can_pack=can_pack)
    journal.append("padding", packing=plan.value("packing"), padding_free=padding_free, shares=shares.to_json())
    journal.append("notice", text=told)


def _repeated(
    plan: Plan,
    run: RunDirectory,
    arguments: TrainingArguments,
    stream: Any,
    known: dict[str, Any],
    *,
    draws_numbers: bool,
) -> RepeatedStream:
    """Let a stream begin again when it ends, and be gone on with where the run was.

    A collator that draws random numbers has to see every sample that was, or it would draw others afterwards.
    """
    if draws_numbers:
        return RepeatedStream(stream)
    size, world = arguments.per_device_train_batch_size, arguments.world_size
    follows_from = (known, plan.recipe.data, data_seed(arguments), size, world, arguments.dataloader_num_workers)
    bookmarks = run.path / "stream" / f"{digest(follows_from)}-{arguments.process_index}"
    resume = None
    if plan.resume_from is not None:
        batches = int(plan.resume_from.rpartition("-")[2]) * arguments.gradient_accumulation_steps
        # accelerate lets rank 0 read for all of them, or each rank read everything and keep its share.
        is_dispatched = arguments.accelerator_config.dispatch_batches is not False
        resume = Resume(batches * world, size) if is_dispatched else Resume(batches, size * world)
    return RepeatedStream(stream, bookmarks=bookmarks, resume=resume)
