"""One attempt's training from plan to final model. Called by `mpt.training.worker`, after everything light is done."""

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.import_utils import enable_tf32

from mpt.errors import MptError
from mpt.planning.number_formats import TORCH_ADAMW
from mpt.planning.padding import describe
from mpt.planning.plan import Plan
from mpt.recipe.rules import groups_by_length
from mpt.running.data_record import record
from mpt.running.from_data import keep_from_data, read_from_data
from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal, spell_non_finite
from mpt.running.measured import asked_measure, evaluation_file
from mpt.running.metrics import read_rows
from mpt.running.run_directory import AttemptDirectory, RunDirectory, write_json
from mpt.terms import LANGUAGE_TASKS, DeviceKind, Feature, Task
from mpt.training.adapters import add_adapters, load_adapters, save_trained
from mpt.training.audit import Audit
from mpt.training.cache import digest
from mpt.training.data import Samples
from mpt.training.data_facts import padding_of
from mpt.training.fingerprint import fingerprint
from mpt.training.health import HealthMonitor, Thresholds
from mpt.training.outcome import StopRequest
from mpt.training.precision.apply import DTYPES, apply_precision
from mpt.training.precision.pure_bf16 import PureBf16AdamW
from mpt.training.preflight import Prepared, look
from mpt.training.progress import heard_by
from mpt.training.repeated_stream import RepeatedStream, Resume
from mpt.training.replay import Replay
from mpt.training.sampling import write_samples
from mpt.training.saving import full_weights, save_final
from mpt.training.step_watch import StepWatch
from mpt.training.tasks import evaluation_of, model_of, ready_tokenizer, special_tokens_of, task_module
from mpt.training.tokenizer import is_trained, load_tokenizer, read_tokenizer, trained_tokenizer
from mpt.training.trackers import Trackers
from mpt.training.trainer import PlanTrainer, data_seed
from mpt.training.turns import rank_0_first


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished run came to. `eval_loss` None: nothing was held out. `metrics` are what was evaluated beside."""

    step: int
    train_loss: float | None
    eval_loss: float | None
    metrics: Mapping[str, float]
    stopped_early: Mapping[str, Any] | None = None


def train(
    plan: Plan,
    run: RunDirectory,
    attempt: AttemptDirectory,
    number: int,
    journal: Journal,
    stop: StopRequest,
    rank: int,
    heartbeat: Heartbeat,
) -> Finished:
    """Carry out the plan. Raises MptError, Diverged or Stopped; each rank calls this."""
    is_writer = rank == 0

    def phase(name: str) -> None:
        heartbeat.phase(name)
        if is_writer:
            journal.append("phase", phase=name)

    datasets.disable_progress_bars()
    arguments = build_arguments(plan, run)
    task = task_module(plan.value("task"), plan.task_folder)
    # accelerate writes this process's place in the group into the arguments; a barrier is a no-op on one process.
    barrier = dist.barrier if arguments.world_size > 1 else _no_barrier

    asked = asked_measure(attempt)
    replay = None if asked is None or asked.incident is None else Replay(Path(asked.incident), rank)
    phase("data")
    if replay is None:
        with heard_by(heartbeat.beat):
            prepared = prepare(plan, run, attempt, arguments, journal, task)
            if is_writer and asked is None:
                look(plan, prepared, journal)
        tokenizer, samples = prepared.tokenizer, prepared.samples
    else:
        tokenizer = read_tokenizer(run.tokenizer) if is_trained(plan.recipe) else load_tokenizer(plan.recipe)
        ready_tokenizer(task, plan, None, tokenizer)
        samples = Samples(replay.samples(plan.value("global_batch_size")), None, from_data=read_from_data(run))

    phase("model")
    model = model_of(task, plan, tokenizer, samples, seed=arguments.seed)
    apply_precision(model, plan)
    evaluates = asked is not None and asked.evaluates
    model = load_adapters(model, asked.adapter) if asked is not None and evaluates else add_adapters(model, plan)

    phase("setup")
    watch = StepWatch(
        journal,
        run.metrics,
        build_monitor(plan),
        attempt=number,
        rank=rank,
        stop=stop,
        device=arguments.device,
        heartbeat=heartbeat,
    )
    with refused_keys():
        trainer = PlanTrainer(
            plan=plan,
            run=run,
            journal=journal,
            watch=watch,
            audit=Audit(plan, journal, attempt.audit, is_writer=is_writer),
            replay=replay,
            model=model,
            args=arguments,
            train_dataset=samples.train,
            eval_dataset=samples.held_out,
            data_collator=task.build_collator(plan, tokenizer),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=pure_bf16_optimizer(plan, arguments),
            **evaluation_of(task, plan),
        )
    if evaluates:
        return _evaluate(trainer, attempt)
    resume_from = None if plan.resume_from is None else str(run.checkpoints / plan.resume_from)
    if plan.recipe.sample is not None and plan.recipe.sample.every_eval:
        trainer.write_samples = partial(write_samples, trainer, tokenizer, is_chat=samples.is_chat)
    trackers = Trackers(trainer, journal)
    try:
        trainer.train(resume_from_checkpoint=resume_from)
        return _finish(plan, run, trainer, tokenizer, phase, barrier, is_chat=samples.is_chat)
    finally:
        trackers.close()


def _evaluate(trainer: PlanTrainer, attempt: AttemptDirectory) -> Finished:
    """Evaluate the weights as they were loaded, and write down what came of it."""
    samples = trainer.eval_dataset
    if samples is None:
        raise MptError(
            "the evaluation data hold no sample: their text is too short",
            remedy="Give more text, or set data.sequence_length lower behind the recipe.",
        )
    found = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    seconds = found.pop("runtime", 0.0)
    loss = found.pop("loss", None)
    found.pop("perplexity", None)  # the reader takes it from the loss
    own = {key: value for key, value in found.items() if not key.endswith(("_per_second", "_time")) and key != "epoch"}
    if trainer.watch.is_writer:
        came = {"loss": loss, "metrics": own, "samples": len(samples) if has_length(samples) else None}
        write_json(evaluation_file(attempt), spell_non_finite(came | {"seconds": seconds}))
    return Finished(0, None, loss, own)


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


@contextmanager
def refused_keys() -> Iterator[None]:
    """Turn what transformers says of the recipe's `training:` keys into an MptError: trying again would not help."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise MptError(
            f"training: transformers refuses these keys: {' '.join(str(error).split())[:500]}",
            remedy="Mend the keys of the recipe's `training:` block that the message names.",
        ) from error


def build_arguments(plan: Plan, run: RunDirectory) -> TrainingArguments:
    """Build TrainingArguments from the plan's keywords. Raises MptError for a value that transformers refuses."""
    keywords = dict(plan.training_arguments)
    keywords["output_dir"] = str(run.checkpoints)
    if plan.deepspeed is not None:
        keywords["deepspeed"] = json.loads(json.dumps(dict(plan.deepspeed)))
        _stand_alone_rendezvous()
    if "tensorboard" in str(keywords.get("report_to", "")):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    with refused_keys():
        arguments = TrainingArguments(**keywords)
    if plan.deepspeed is not None:
        _join_deepspeed()
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device: the Trainer would wrap the model in DataParallel
    if plan.machine.kind is DeviceKind.CUDA and plan.machine.all_compute(Feature.TF32):
        enable_tf32(plan.value("tf32"))
    return arguments


def build_monitor(plan: Plan) -> HealthMonitor:
    """Build what watches the numbers, by the recipe's `health:` block."""
    thresholds = Thresholds(**plan.recipe.health.model_dump())
    # The loss of every other task is no cross entropy over the vocabulary.
    vocabulary = plan.facts.vocab_size if plan.value("task") in LANGUAGE_TASKS else None
    scale = plan.value("loss_scale")
    has_own_end = scale is not None and (scale.get("static") is not None or scale.get("min") is not None)
    lowest = {"lowest_scale": 0.0} if has_own_end else {}
    return HealthMonitor(thresholds, vocabulary=vocabulary, is_scaled=scale is not None, **lowest)


def pure_bf16_optimizer(plan: Plan, arguments: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """Give the Trainer the optimizer that rounds bf16 weights; None where the Trainer's own is planned."""
    if plan.value("rounding") is None or plan.value("optimizer") not in TORCH_ADAMW:
        return None
    return PureBf16AdamW, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "rounding": plan.value("rounding"),
        "state_dtype": DTYPES[plan.value("optimizer_state_dtype")],
        "master_weights": plan.value("master_weights_dtype") == "fp32",
        "seed": arguments.seed,
        # ZeRO gives each rank other weights; DDP's replicas must round alike.
        "shard": arguments.process_index if plan.deepspeed is not None else 0,
    }


def _finish(
    plan: Plan, run: RunDirectory, trainer: PlanTrainer, tokenizer: Any, phase: Any, barrier: Any, *, is_chat: bool
) -> Finished:
    step = trainer.state.global_step
    stop = trainer.early_stop
    is_early = stop is not None and stop.is_reached and step < trainer.state.max_steps
    stopped_early = stop.told(trainer.args, trainer.state) if stop is not None and is_early else None
    if stopped_early is not None and trainer.watch.is_writer:
        trainer.journal.append("stopped_early", step=step, **stopped_early)
    eval_loss: float | None = None
    metrics: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        # These very weights may have been evaluated at the last step; the best ones, loaded since then, have not.
        known = None if trainer.args.load_best_model_at_end else trainer.last_evaluation
        if known is None or known[0] != step:
            trainer.evaluate()
            known = trainer.last_evaluation
        assert known is not None
        _, eval_loss, metrics = known
    phase("saving")
    state_dict = full_weights(trainer.model, keep=trainer.watch.is_writer) if trainer.is_deepspeed_enabled else None
    if trainer.watch.is_writer:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        write = partial(save_trained, trained, plan=plan, state_dict=state_dict)
        save_final(run.final, write, tokenizer, state_dict)
    barrier()
    # As with the evaluation: these very weights may have written at the last step.
    if plan.recipe.sample is not None and (trainer.sampled_at != step or trainer.args.load_best_model_at_end):
        phase("sampling")
        write_samples(trainer, tokenizer, is_chat=is_chat)
    barrier()
    train_loss = _train_loss(run) if trainer.watch.is_writer else None
    return Finished(step, train_loss, eval_loss, metrics, stopped_early)


def _train_loss(run: RunDirectory) -> float | None:
    """Average the loss over every step of the run, whichever attempt made it."""
    losses = [float(row["loss"]) for row in read_rows(run).values()]
    return math.fsum(losses) / len(losses) if losses else None


def _stand_alone_rendezvous() -> None:
    """Give a single process the rendezvous that DeepSpeed wants; without it DeepSpeed asks for mpi4py."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)


def _join_deepspeed() -> None:
    """Let DeepSpeed know the process group before it divides a model; on a CPU transformers leaves that out."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _no_barrier() -> None:
    return None
