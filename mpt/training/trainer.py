"""The Trainer of Hugging Face with hooks, and no loop of our own: bad numbers stop before the optimizer step,
checkpoints are staged and committed, metrics are written each step, a stop is agreed on by all ranks.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from transformers import Trainer, TrainerCallback

from mpt.errors import StorageError, UnsupportedError
from mpt.planning.plan import Plan
from mpt.running import checkpoints
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
from mpt.training.audit import Audit
from mpt.training.gradient_capture import Measurement
from mpt.training.outcome import Stopped
from mpt.training.precision.apply import DTYPES, fp8_context, fp8_recomputes, fp32_buffers, restore_buffers
from mpt.training.precision.loss_scaling import build_scaler, scale_at_floor
from mpt.training.precision.reduction import ReduceIn, reduce_in
from mpt.training.precision.transformer_engine import checkpoint_contexts
from mpt.training.saving import clear_staging, name_best_relatively, storage_errors
from mpt.training.step_watch import StepWatch

DEFAULT_KEPT_CHECKPOINTS = 2


class PlanTrainer(Trainer):
    """Trains what a plan says. `train` raises Diverged, Stopped, UnsupportedError (by the audit) or StorageError."""

    def __init__(
        self, *, plan: Plan, run: RunDirectory, journal: Journal, watch: StepWatch, audit: Audit, **keywords: Any
    ) -> None:
        self.plan = plan
        self.run = run
        self.journal = journal
        self.watch = watch
        self.audit = audit
        self.measurement = Measurement(run.attempt(watch.attempt), is_writer=watch.is_writer)
        self.newest_checkpoint: str | None = None
        self.last_evaluation: tuple[int, float | None] | None = None
        self.reduction: ReduceIn | None = None
        self._fp8 = fp8_context(plan)
        self._staging: Path | None = None
        if watch.is_writer:
            clear_staging(run.checkpoints)
        if fp8_recomputes(plan):
            arguments = keywords["args"]
            again = {"context_fn": checkpoint_contexts(self._fp8)}
            arguments.activation_checkpointing_kwargs = arguments.activation_checkpointing_kwargs | again
        super().__init__(**keywords)
        self.pad_token_id = getattr(self.model.config, "pad_token_id", None)
        self.add_callback(StepHooks(self))

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
        self.state.best_model_checkpoint = self._best_checkpoint()
        return state

    # --- the step

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """torch's loss scaler; None without fp16, and under DeepSpeed."""
        return getattr(self.accelerator, "scaler", None)

    def compute_loss_context_manager(self) -> Any:
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(self._fp8())
        return stack

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed at the last step: the loop of transformers would make one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **keywords)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        self.watch.begin(self.state.global_step + 1, self.optimizer.param_groups[0]["lr"])
        return super().get_batch_samples(*arguments, **keywords)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.watch.add_batch(inputs)
        self.audit.note_batch(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.is_deepspeed_enabled:  # there the engine has noted it before its own step
            self.watch.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float | None:
        """The last look before the optimizer step; DeepSpeed has made its step by now, after a look of its own."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.is_deepspeed_enabled:
            return norm
        scale = None if self.scaler is None else self.scaler._get_scale_async()
        step = self.watch.agree(torch.as_tensor(norm), scale, scale_at_floor(self.scaler))
        if self.plan.value("loss_scale") is not None:
            self.watch.judge_scale(is_static=self.plan.value("loss_scale").get("static") is not None)
        self.audit.before_first_step(self)
        self.measurement.before_first_step(self, step.grad_norm)
        return step.grad_norm

    # --- evaluation

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        self._phase("evaluating")
        with unchanged_randomness():
            metrics = super().evaluate(*arguments, **keywords)
        loss = metrics.get("eval_loss")
        self.last_evaluation = (self.state.global_step, loss)
        if self.watch.is_writer:
            self.journal.append("evaluated", step=self.state.global_step, eval_loss=loss)
        plain = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        self.watch.write_row(**{"step": self.state.global_step, "attempt": self.watch.attempt} | plain)
        if self.is_in_train:
            self._phase("training")
        return metrics

    # --- checkpoints

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **keywords: Any
    ) -> None:
        """Save at the last step too, so that a finished run can prove it, and where a stop was agreed on."""
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **keywords)
        is_last = self.state.global_step >= self.state.max_steps
        if (is_last or self.watch.stop_agreed) and self.state.global_step > 0:
            self._save_checkpoint(model, trial)
            if not is_last:
                raise Stopped(self.state.global_step, str(self.newest_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save into a staging folder, commit it under its name, and prune."""
        step = self.state.global_step
        name = f"checkpoint-{step}"
        if self.newest_checkpoint != name:
            self._phase("saving")
            self._refuse_bad_weights()
            staging = self.run.checkpoints / f".staging-{step}"
            self._staging = staging
            try:
                with storage_errors(self.run.checkpoints):
                    super()._save_checkpoint(model, trial)
            except StorageError:
                clear_staging(self.run.checkpoints)  # its room may be what is missing
                raise
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            best = self.state.best_global_step
            if self.watch.is_writer:
                with storage_errors(self.run.checkpoints):
                    best_name = f"checkpoint-{best}" if best else None
                    name_best_relatively(staging / name, best_name)
                    checkpoints.commit(
                        staging / name, self.run.checkpoints / name, step=step, world_size=self.args.world_size
                    )
                    staging.rmdir()
                    self.journal.append("checkpoint_saved", step=step, name=name)
                    keep = self.plan.recipe.training_keys.get("save_total_limit") or DEFAULT_KEPT_CHECKPOINTS
                    checkpoints.prune(self.run, keep, {best_name} if best_name else set())
            # A rank that ended now would have torchrun end the one that is still writing.
            self.accelerator.wait_for_everyone()
            self.newest_checkpoint = name
            self.state.best_model_checkpoint = self._best_checkpoint()
            self._phase("training")

    def _best_checkpoint(self) -> str | None:
        """Where the best checkpoint is now; what a checkpoint's state says may be of another place."""
        best = self.state.best_global_step
        folder = self.run.checkpoints / f"checkpoint-{best}"
        return str(folder) if best and folder.is_dir() else None

    def _refuse_bad_weights(self) -> None:
        """Keep a non-finite weight out of every checkpoint: the last good one must stay the newest."""
        kind = torch.float32 if self.args.device.type == "mps" else torch.float64
        bad = torch.zeros((), dtype=kind, device=self.args.device)
        for weight in self.model.parameters():
            if weight.requires_grad:
                held = getattr(weight, "ds_tensor", weight)  # ZeRO-3 holds a share of each
                bad += (~torch.isfinite(held.detach())).any().to(bad)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(bad)
        if bad.item():
            self.watch.fail("weights", math.nan)

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
        trainer.audit.after_set_up(trainer)
        trainer._phase("training")
        if trainer.watch.is_writer:
            trainer.journal.append(
                "training_started",
                step=state.global_step,
                max_steps=state.max_steps,
                epochs=args.num_train_epochs if args.max_steps <= 0 else state.num_train_epochs,
                samples=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
                tokens_per_step=trainer.plan.value("global_batch_size") * trainer.plan.value("sequence_length"),
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        trainer = self.trainer
        step = trainer.watch.step
        if trainer.scaler is not None and step is not None and step.skipped:
            # A fused optimizer skips inside its kernel, and accelerate believes that it stepped (accelerate#4242): the
            # learning rate would go on.
            trainer.optimizer._is_overflow = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.trainer.watch.heartbeat.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.trainer.watch.write_step()
        self.trainer.audit.after_first_step(self.trainer)
        self.trainer.measurement.after_step(self.trainer)


class WatchedEngine(DeepSpeedEngineWrapper):
    """DeepSpeed's optimizer step happens inside `backward`: look before it, and at its own verdict after it.

    Every ZeRO stage checks the gradient norm before it updates (deepspeed 0.19.8, `step` in zero/stage_1_and_2.py,
    zero/stage3.py and bf16_optimizer.py): with a non-finite one the update is left out and `was_step_applied()` is
    False. In fp16 that is loss scaling at work; in bf16 and fp32 it is the end.
    """

    def __init__(self, engine: Any, trainer: PlanTrainer) -> None:
        super().__init__(engine)
        self.trainer = trainer

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **keywords: Any) -> None:
        engine, watch = self.engine, self.trainer.watch
        watch.add_loss(loss)
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        engine.backward(loss, **keywords)
        if not sync_gradients:
            return
        is_fp16 = bool(engine.fp16_enabled())
        scale = torch.tensor(float(engine.optimizer.loss_scale), device=self.trainer.args.device) if is_fp16 else None
        watch.agree(None, scale)
        self.trainer.audit.before_first_step(self.trainer)
        self.trainer.measurement.before_first_step(self.trainer)
        loss_scale = self.trainer.plan.value("loss_scale")
        try:
            engine.step()
        except Exception as error:
            if scale is not None and "loss scale already at minimum" in str(error):
                watch.fail("loss_scale", float(engine.optimizer.loss_scale))
            raise
        norm = engine.get_global_grad_norm()
        value = float(norm) if norm is not None else 0.0
        watch.judge_norm(value, can_skip=is_fp16, applied=engine.was_step_applied())
        if is_fp16:
            watch.judge_scale(is_static=(loss_scale or {}).get("static") is not None)


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leave torch's random state as it was: making a data loader draws from it, and a resumed run must not differ by an
    evaluation that it need not repeat."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
