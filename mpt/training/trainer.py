"""The Trainer of Hugging Face with hooks, and no loop of our own: bad numbers stop before the optimizer step,
checkpoints are staged and committed, metrics are written each step, a stop is agreed on by all ranks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DummyOptim
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from mpt.errors import MptError, UnsupportedError
from mpt.planning.data_window import windows_of
from mpt.planning.loss import chunk_tokens
from mpt.planning.plan import Plan
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
from mpt.terms import LANGUAGE_TASKS, Metric, Packing, Task
from mpt.training.audit import Audit
from mpt.training.background import trained_state
from mpt.training.checkpointing import Saver
from mpt.training.data_order import SAMPLE_IDS, SAMPLE_TOKENS, DataOrder, Placed, PlacedCollator, keep_order
from mpt.training.dead_adapters import unreached_adapters
from mpt.training.early_stopping import EarlyStop
from mpt.training.findings import plain_model
from mpt.training.finite import bad_gradients, bad_weights
from mpt.training.gradient_capture import Measurement
from mpt.training.health import Action, Code, Verdict
from mpt.training.incidents import Evidence, hold_inquest
from mpt.training.metrics import metrics_in, perplexity
from mpt.training.outcome import Diverged, Stopped
from mpt.training.packing import LENGTHS, lengths_of
from mpt.training.precision.apply import DTYPES, fp8_context, fp8_recomputes, fp32_buffers, restore_buffers
from mpt.training.precision.chunked_loss import foretold_scale, install_chunked_loss
from mpt.training.precision.loss_scaling import build_scaler, hold_deepspeed_knobs, scale_at_floor
from mpt.training.precision.reduction import ReduceIn, reduce_in
from mpt.training.precision.transformer_engine import checkpoint_contexts
from mpt.training.regional_compile import compile_blocks
from mpt.training.replay import Replay
from mpt.training.step_watch import StepWatch
from mpt.training.token_loss import TokenLoss, ignore_repeated
from mpt.training.trackers import keep_tracker_runs


class PlanTrainer(Trainer):
    """Trains what a plan says. `train` raises Diverged, Stopped, UnsupportedError (by the audit) or StorageError."""

    def __init__(
        self,
        *,
        plan: Plan,
        run: RunDirectory,
        journal: Journal,
        watch: StepWatch,
        audit: Audit,
        replay: Replay | None = None,
        **keywords: Any,
    ) -> None:
        self.plan = plan
        self.replay = replay
        self.run = run
        self.journal = journal
        self.watch = watch
        self.watch.blame = lambda: bad_gradients(self)
        self.audit = audit
        self.measurement = Measurement(run.attempt(watch.attempt), is_writer=watch.is_writer)
        self.last_evaluation: tuple[int, float | None, dict[str, float]] | None = None
        self.write_samples: Callable[[], None] | None = None
        """What is called after each evaluation of the training."""
        self.sampled_at: int | None = None
        self._token_loss: TokenLoss | None = None  # of the evaluation under way
        self.reduction: ReduceIn | None = None
        self.evidence = Evidence()
        self.order: DataOrder | None = None
        self._fp8 = fp8_context(plan)
        self.saver = Saver(self)
        if fp8_recomputes(plan):
            arguments = keywords["args"]
            again = {"context_fn": checkpoint_contexts(self._fp8)}
            arguments.activation_checkpointing_kwargs = arguments.activation_checkpointing_kwargs | again
        keywords["data_collator"] = PlacedCollator(keywords["data_collator"], data_seed(keywords["args"]))
        super().__init__(**keywords)
        if plan.value("task") not in (Task.CAUSAL_LM, Task.SFT):
            # Their models take any keyword, and their losses are means over a micro batch all the same: the Trainer
            # would not divide by the micro batches, and multiply by the processes (transformers 5.23, compute_loss).
            self.model_accepts_loss_kwargs = False
        if plan.value("compile") == "regional":
            compile_blocks(self.model, varies=plan.value("packing") != Packing.BLOCKS, **compile_options(plan))
        if plan.value("loss") == "chunked":
            tokens = chunk_tokens(plan.facts.vocab_size, on_cpu=plan.machine.is_cpu)
            install_chunked_loss(plain_model(self), tokens, lambda: foretold_scale(self.scaler))
        self.pad_token_id = getattr(self.model.config, "pad_token_id", None)
        self.add_callback(StepHooks(self))
        self.early_stop = EarlyStop.of(plan)
        if self.early_stop is not None:
            self.add_callback(self.early_stop)

    # --- set-up

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.plan.value("loss_scale") is not None and not self.is_deepspeed_enabled:
            # On a CPU accelerate leaves fp16 out altogether; native_amp is what makes it wrap the forward in autocast.
            self.accelerator.native_amp = True
            self.accelerator.scaler = build_scaler(self.plan.value("loss_scale"), self.accelerator.device.type)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer; where DeepSpeed makes it, give it the Trainer's own groups.

        transformers hands DeepSpeed one group, and weight decay would then pull on biases and norms too: other dynamics
        than the same recipe has without DeepSpeed.
        """
        optimizer = super().create_optimizer(model)
        if isinstance(self.optimizer, DummyOptim) and not isinstance(self.optimizer.params[0], dict):
            decayed = set(self.get_decay_parameter_names(self.model))
            named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
            groups = [
                {"params": [w for name, w in named if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [w for name, w in named if name not in decayed], "weight_decay": 0.0},
            ]
            self.optimizer.params = [group for group in groups if group["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        buffers = fp32_buffers(self.model)
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        except ValueError as error:
            if "not supported on your device" not in str(error):
                raise
            raise UnsupportedError(  # an fp16 engine on a CPU without AVX512-FP16, which torch.autocast does emulate
                f"DeepSpeed: {error}", remedy="Ask for `precision: bf16`, or for `distributed: {strategy: ddp}`."
            ) from error
        if self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped = WatchedEngine(
                self.accelerator.deepspeed_engine_wrapped.engine, self
            )
        restore_buffers(self.model, buffers)
        if isinstance(self.model_wrapped, torch.nn.parallel.DistributedDataParallel):
            self.reduction = reduce_in(self.model_wrapped, DTYPES[self.plan.value("reduce_dtype")])
        return prepared

    def _init_training_state(self, *arguments: Any, **keywords: Any) -> Any:
        state = super()._init_training_state(*arguments, **keywords)
        self.state.best_model_checkpoint = self.saver.best_checkpoint()
        return state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take over a checkpoint's state, and let what the plan says of it now stand: the rate, the scaler's knobs."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if hold_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate):
            self._rewarm(int(Path(checkpoint).name.rpartition("-")[2]))
        if self.is_deepspeed_enabled and self.plan.value("loss_scale") is not None:
            hold_deepspeed_knobs(self.model_wrapped.optimizer, self.plan.value("loss_scale"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Take over the loss scale, unless recovery has left fp16 since: then there is none any more."""
        if self.scaler is not None:
            super()._load_scaler(checkpoint)

    def _rewarm(self, start: int) -> None:
        """Let a rate that recovery has lowered begin small once more after step `start`."""
        steps = [repair["values"]["warmup_steps"] for repair in self.plan.repairs if repair["kind"] == "learning_rate"]
        if steps and steps[-1] and hasattr(self.lr_scheduler, "lr_lambdas"):
            warm_up_again(self.optimizer, self.lr_scheduler, steps[-1], lambda: self.state.global_step - start)

    # --- the data

    def _get_dataloader(self, dataset: Any, *arguments: Any, is_training: bool = False, **keywords: Any) -> Any:
        """Let training data with a length follow a data order of ours (`mpt.training.data_order`)."""
        if not is_training or not has_length(dataset):
            return super()._get_dataloader(dataset, *arguments, is_training=is_training, **keywords)
        loader = super()._get_dataloader(Placed(dataset), *arguments, is_training=True, **keywords)
        self.order = keep_order(loader, data_seed(self.args), windows_of(self.plan.repairs))
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        samples = train_dataset.samples if isinstance(train_dataset, Placed) else train_dataset
        lengths = lengths_of(samples)
        if self.args.train_sampling_strategy == "group_by_length" and lengths is not None:
            # The Trainer's own way to the lengths is to read every sample, one by one.
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(size, lengths=lengths.tolist())
        return super()._get_train_sampler(samples)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what tells a collator where documents end; the Trainer drops what `forward` does not name."""
        super()._set_signature_columns_if_needed()
        if LENGTHS not in self._signature_columns:
            self._signature_columns.append(LENGTHS)

    # --- the step

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """torch's loss scaler; None without fp16, and under DeepSpeed."""
        return getattr(self.accelerator, "scaler", None)

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train; where the numbers went bad for good, look into the batch before its weights are gone."""
        try:
            return super().train(*arguments, **keywords)
        except Diverged as diverged:
            hold_inquest(self, diverged, self.evidence)
            raise
        finally:
            self.saver.finish()

    def compute_loss_context_manager(self) -> Any:
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(self._fp8())
        return stack

    def _run_epoch(self, model: Any, epoch: int, *arguments: Any, **keywords: Any) -> None:
        if self.order is not None:
            self.order.set_epoch(
                epoch
            )  # accelerate does not reach it in a run that was taken up again on several ranks
        if self.state.global_step >= self.state.max_steps or self.has_stopped_early:
            # Resumed at the last step: the loop of transformers would make one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *arguments, **keywords)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        self.watch.begin(self.state.global_step + 1, self.optimizer.param_groups[0]["lr"])
        # Loader processes that last are started once, which draws a random number: a resumed run has drawn it before.
        starts_anew = self.args.dataloader_persistent_workers and self.plan.resume_from is not None
        with unchanged_randomness() if starts_anew else nullcontext():
            batches, items = super().get_batch_samples(*arguments, **keywords)
        if self.replay is not None:
            batches, items = self.replay.take(self.args.device)
        self.evidence.begin([batch.pop(SAMPLE_IDS, None) for batch in batches])
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        sample_tokens = inputs.pop(SAMPLE_TOKENS, None)
        self.watch.add_batch(inputs, sample_tokens)
        if self.replay is None and sample_tokens is not None:
            self.audit.note_batch(len(sample_tokens))
        self.evidence.add_batch(inputs, num_items_in_batch)
        with unreached_adapters(self):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.is_deepspeed_enabled:  # there the engine has noted it before its own step
            self.watch.add_loss(loss)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip as torch does, but leave gradients whose norm is not finite as they came, so that they can be named:
        torch would multiply all of them by that norm."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        norm = self._plain_grad_norm(model)
        held = torch.where(torch.isfinite(norm), norm, 0.0)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, held)
        return norm

    def _plain_grad_norm(self, model: Any) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([w.grad for w in model.parameters() if w.grad is not None])

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float | None:
        """The last look before the optimizer step; DeepSpeed has made its step by now, after a look of its own."""
        if self.is_deepspeed_enabled:
            return super()._get_grad_norm(model, grad_norm)
        norm = self._plain_grad_norm(model) if grad_norm is None else grad_norm
        limit = self.args.max_grad_norm
        scale = None if self.scaler is None else self.scaler._get_scale_async()
        step = self.watch.agree(torch.as_tensor(norm), scale, scale_at_floor(self.scaler))
        self.audit.before_first_step(self)
        self.measurement.before_first_step(self, step.grad_norm)
        if step.skipped:
            # An optimizer leaves a weight without a gradient alone, decay and moments included.
            self.model.zero_grad(set_to_none=True)
        elif step.clip_to is not None and step.grad_norm is not None:
            self._scale_gradients(step.clip_to / (min(step.grad_norm, limit) if limit > 0 else step.grad_norm))
        return step.grad_norm

    def _scale_gradients(self, factor: float) -> None:
        """Make every gradient smaller; the Trainer has clipped them to its own limit by now."""
        if factor < 1:
            torch._foreach_mul_([w.grad for w in self.model.parameters() if w.grad is not None], factor)

    # --- evaluation

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        if self._token_loss is not None:
            ignore_repeated(inputs, self.accelerator)
        inputs.pop(SAMPLE_TOKENS, None)
        return super().prediction_step(model, inputs, *arguments, **keywords)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._token_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]  # label smoothing takes them out
        # Without a number of items a model gives the mean of this process's own batch.
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self._token_loss.add(loss, labels)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        self._phase("evaluating")
        with unchanged_randomness():
            metrics = super().evaluate(*arguments, **keywords)
        loss, others = metrics.get("eval_loss"), metrics_in(metrics)
        self.last_evaluation = (self.state.global_step, loss, others)
        place: dict[str, Any] = {"step": self.state.global_step}
        if self.best_step is not None:
            place["best_step"] = self.best_step
        if self.watch.is_writer:
            self.journal.append("evaluated", **place, eval_loss=loss, metrics=others)
        plain = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        self.watch.write_row(**place | {"attempt": self.watch.attempt} | plain)
        if self.is_in_train:
            if self.write_samples is not None:
                self._phase("sampling")
                self.write_samples()
                self.sampled_at = self.state.global_step
            self._phase("training")
        return metrics

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Average a language model's loss over the tokens, and add the perplexity, which follows from it, where
        trackers and the choice of the best model see them."""
        task = self.plan.value("task")
        self._token_loss = TokenLoss(shift=task != Task.MASKED_LM) if task in LANGUAGE_TASKS else None
        prefix = keywords.get("metric_key_prefix", "eval")
        try:
            output = super().evaluation_loop(*arguments, **keywords)
            if self._token_loss is not None:
                output.metrics[f"{prefix}_loss"] = self._token_loss.mean(self.accelerator)
        finally:
            self._token_loss = None
        loss = output.metrics.get(f"{prefix}_loss")
        if loss is not None and Metric.PERPLEXITY in self.plan.value("metrics"):
            output.metrics[f"{prefix}_perplexity"] = perplexity(loss)
        return output

    @property
    def best_step(self) -> int | None:
        """The step of the weights that were loaded at the end as the best ones; None where the last ones stand."""
        best = self.state.best_model_checkpoint
        if self.is_in_train or not self.args.load_best_model_at_end or best is None:
            return None
        return int(Path(best).name.rpartition("-")[2])

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        asked = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if math.isnan(metrics.get(asked, 0.0)):
            return False  # nothing is greater than nan: it would stay the best
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise MptError(
                f"training.metric_for_best_model is {self.args.metric_for_best_model}, and the evaluation gives "
                f"{', '.join(['loss', *metrics_in(metrics)])}",
                remedy="Name one of these.",
            ) from error

    @property
    def has_stopped_early(self) -> bool:
        """Whether evaluations have ended the training."""
        return self.early_stop is not None and self.early_stop.is_reached

    # --- checkpoints

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **keywords: Any
    ) -> None:
        """Save at the last step too, so that a finished run can prove it, and where a stop was agreed on."""
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **keywords)
        is_last = self.state.global_step >= self.state.max_steps or self.has_stopped_early
        if (is_last or self.watch.stop_agreed) and self.state.global_step > 0:
            self._save_checkpoint(model, trial)
            if not is_last:
                raise Stopped(self.state.global_step, str(self.saver.newest))

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.saver.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save through the saver, which has `super()` write aside. The last checkpoint of a run has to be written."""
        is_last = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        write = partial(super()._save_checkpoint, model, trial)
        self.saver.save(write, is_needed=is_last or self.watch.stop_agreed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model, on rank 0; where it is saved in the background, a copy of it, later. A barrier follows."""
        background = self.saver.background
        with self.saver.holding():
            if background is None or not background.is_copying:
                super()._save(output_dir, state_dict)
                return
            if not self.args.should_save:
                return
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)  # the small files come first
            weights = trained_state(self.model) if state_dict is None else state_dict
            background.write_later(partial(super()._save, output_dir), weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        background = self.saver.background
        if background is None or not background.is_copying:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            folder = Path(output_dir)
            with self.saver.holding():
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
                save = partial(torch.save, f=folder / OPTIMIZER_NAME)
                background.write_later(save, self.optimizer.state_dict())

    def _refuse(self, bad: str | None, where: str) -> None:
        """End the attempt where something is not finite: the last good checkpoint must stay the newest."""
        if bad is not None:
            self.watch.roll_back(Verdict(Action.ROLL_BACK, Code.N4, "weights", math.nan, f"{where}: {bad}"))

    def _phase(self, phase: str) -> None:
        self.watch.heartbeat.phase(phase)
        if self.watch.is_writer:
            self.journal.append("phase", phase=phase)


class StepHooks(TrainerCallback):
    """What happens around a step that the Trainer has a callback for."""

    def __init__(self, trainer: PlanTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        trainer = self.trainer
        # The Trainer has copied the tokenizer's pad into the configuration. A model built from that again would freeze
        # the embedding of that token, which here is often the end of text (torch.nn.Embedding, padding_idx).
        trainer.model.config.pad_token_id = trainer.pad_token_id
        trainer.saver.restore()
        if trainer.replay is not None:
            trainer.replay.load_weights(trainer.model)
        trainer.watch.go_on_from(state.global_step)
        if trainer.replay is None:
            trainer._refuse(bad_weights(trainer), "not finite before the first step")
        trainer.audit.after_set_up(trainer)
        trainer._phase("training")
        if trainer.watch.is_writer:
            keep_tracker_runs(trainer.run, trainer.plan.value("trackers"))
            trainer.journal.append(
                "training_started",
                step=state.global_step,
                max_steps=state.max_steps,
                epochs=args.num_train_epochs if args.max_steps <= 0 else state.num_train_epochs,
                samples=len(trainer.train_dataset) if has_length(trainer.train_dataset) else None,
                # None also where no window of the data could be left out: the sampler makes whole batches.
                steps_per_epoch=None if trainer.order is None else steps_per_epoch(args, keywords["train_dataloader"]),
                tokens_per_step=trainer.plan.value("global_batch_size") * trainer.plan.value("sequence_length"),
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        trainer = self.trainer
        step = trainer.watch.step
        if step is None:
            return
        # The learning rate counts applied steps. accelerate believes that a fused optimizer stepped (accelerate#4242),
        # knows nothing of an update that the watch left out, and asks DeepSpeed's bf16 optimizer for what it lacks.
        if trainer.is_deepspeed_enabled:
            trainer.optimizer.__has_overflow__ = True
            trainer.model_wrapped.optimizer.overflow = step.skipped
        else:
            trainer.optimizer._is_overflow = step.skipped

    def on_prediction_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.trainer.watch.heartbeat.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        trainer, step = self.trainer, self.trainer.watch.step
        trainer.watch.write_step()
        if not trainer.is_deepspeed_enabled and step is not None:  # DeepSpeed's step was judged where it was made
            trainer.watch.conclude(applied=not step.skipped)
        trainer.saver.promote()
        self.trainer.audit.after_first_step(self.trainer)
        self.trainer.measurement.after_step(self.trainer)


class WatchedEngine(DeepSpeedEngineWrapper):
    """DeepSpeed's optimizer step happens inside `backward`: look before it, and at its own verdict after it.

    Every ZeRO stage checks the gradient norm before it updates (deepspeed 0.19.8, `step` in zero/stage_1_and_2.py,
    zero/stage3.py and bf16_optimizer.py): with a non-finite one the update is left out and `was_step_applied()` is
    False. In fp16 that is loss scaling at work; in bf16 and fp32 it is a bad step.
    """

    def __init__(self, engine: Any, trainer: PlanTrainer) -> None:
        super().__init__(engine)
        self.trainer = trainer
        self._clip_grad = float(engine.gradient_clipping())

    def _clip_spikes(self) -> float | None:
        """Have the engine clip what the health monitor would take for a spike, and give the norm that it clips such a
        gradient to; None where nothing is a spike yet. The norm itself is known within the engine's step alone."""
        limit = self.trainer.watch.health.norm_limit()
        is_lower = limit is not None and (self._clip_grad == 0 or limit < self._clip_grad)
        self.engine.optimizer.clip_grad = limit if is_lower else self._clip_grad
        return limit if limit is None or is_lower else self._clip_grad

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **keywords: Any) -> None:
        engine, watch = self.engine, self.trainer.watch
        watch.add_loss(loss)
        # A loss that is not finite may have finite gradients, and those are what the engine looks at.
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss)
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        with self.trainer.audit.watching_backward():
            engine.backward(loss, **keywords)
        if not sync_gradients:
            return
        is_fp16 = bool(engine.fp16_enabled())
        scale = torch.tensor(float(engine.optimizer.loss_scale), device=self.trainer.args.device) if is_fp16 else None
        watch.agree(None, scale)
        self.trainer.audit.before_first_step(self.trainer)
        self.trainer.measurement.before_first_step(self.trainer)
        limit = self._clip_spikes()
        try:
            engine.step()
        except Exception as error:
            if scale is not None and "loss scale already at minimum" in str(error):
                watch.give_up_scale()
            raise
        finally:
            engine.optimizer.clip_grad = self._clip_grad  # it goes into DeepSpeed's checkpoints
        norm = engine.get_global_grad_norm()
        norm = 0.0 if norm is None else float(norm)
        watch.conclude(applied=engine.was_step_applied(), grad_norm=norm, limit=limit)


def compile_options(plan: Plan) -> dict[str, Any]:
    """Give torch.compile's options under its own names."""
    keys = {"backend": "torch_compile_backend", "mode": "torch_compile_mode"}
    asked = plan.recipe.training_keys
    return {name: asked[key] for name, key in keys.items() if asked.get(key) is not None}


def data_seed(arguments: TrainingArguments) -> int:
    """Give the seed of the data order."""
    return int(arguments.seed if arguments.data_seed is None else arguments.data_seed)


def steps_per_epoch(arguments: TrainingArguments, loader: Any) -> int | None:
    """Count the optimizer steps of one pass over the data; None where it has no length."""
    return max(1, math.ceil(len(loader) / arguments.gradient_accumulation_steps)) if has_length(loader) else None


def hold_learning_rate(optimizer: Any, scheduler: Any, rate: float) -> bool:
    """Let `rate` be what the schedule multiplies, where a checkpoint brought another one; say whether it did.

    A checkpoint's optimizer and scheduler carry the rate of back then, and torch takes it over the caller's. Nothing
    moves where it is the same.
    """
    is_other = any(group.get("initial_lr", rate) != rate for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        before = group.get("initial_lr", rate)
        if before != rate:
            group["initial_lr"] = rate
            group["lr"] = group["lr"] * rate / before if before else rate
    if any(base != rate for base in getattr(scheduler, "base_lrs", ())):
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return is_other


def warm_up_again(optimizer: Any, scheduler: Any, steps: int, passed: Callable[[], int]) -> None:
    """Multiply a LambdaLR's rates by a ramp over `steps` steps, of which `passed()` are over."""

    def ramp(ahead: int) -> float:
        return min(1.0, (max(0, passed()) + ahead) / steps)

    # The schedule is asked inside a step, for the rate of the next one.
    scheduler.lr_lambdas = [lambda step, planned=planned: planned(step) * ramp(2) for planned in scheduler.lr_lambdas]
    for group in optimizer.param_groups:
        group["lr"] *= ramp(1)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leave torch's random state as it was: making a data loader draws from it, and a resumed run must not differ by an
    evaluation that it need not repeat."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
