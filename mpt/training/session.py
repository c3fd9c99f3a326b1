"""One attempt's training from plan to final model. Called by `mpt.training.worker`, after everything light is done."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from mpt.errors import MptError
from mpt.planning.number_formats import TORCH_ADAMW
from mpt.planning.plan import Plan
from mpt.running.from_data import read_from_data
from mpt.running.heartbeat import Heartbeat
from mpt.running.journal import Journal, spell_non_finite
from mpt.running.measured import asked_measure, evaluation_file
from mpt.running.metrics import read_rows
from mpt.running.run_directory import AttemptDirectory, RunDirectory, write_json
from mpt.terms import LANGUAGE_TASKS
from mpt.training.adapters import add_adapters, load_adapters, save_trained
from mpt.training.arguments import build_arguments, refused_keys
from mpt.training.audit import Audit
from mpt.training.data import Samples
from mpt.training.health import HealthMonitor, Thresholds
from mpt.training.outcome import StopRequest
from mpt.training.precision.apply import DTYPES, apply_precision
from mpt.training.precision.pure_bf16 import PureBf16AdamW
from mpt.training.preflight import look
from mpt.training.preparation import prepare
from mpt.training.progress import heard_by
from mpt.training.replay import Replay
from mpt.training.sampling import write_samples
from mpt.training.saving import full_weights, save_final
from mpt.training.step_watch import StepWatch
from mpt.training.tasks import evaluation_of, model_of, ready_tokenizer, task_module
from mpt.training.tokenizer import is_trained, load_tokenizer, read_tokenizer
from mpt.training.trackers import Trackers
from mpt.training.trainer import PlanTrainer


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


def _no_barrier() -> None:
    return None
